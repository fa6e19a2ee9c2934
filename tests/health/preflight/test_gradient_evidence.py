"""What gradients show before the first step: what backward computes again, and at which scale it arrives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

from bench.faults.patches import Backward, before_step, on_output, rebound, wrap
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.gradient import connected, every_tensor, right_derivative
from ris_fast.health.preflight.one_step import one_step
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.recomputed import recomputed
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small
from tests.health.preflight.test_scene_evidence import said


def checkpointed(dropout: bool = True, **options: Any) -> Trainer:
    trainer = Trainer(small("backprojection"))
    blocks = trainer.model.blocks
    if dropout:
        on_output(blocks, lambda x: fn.dropout(x, 0.3, trainer.model.training))
    wrap(blocks, "forward", lambda forward: partial(checkpoint, forward, **options))
    return trainer


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_names_other_random_numbers_in_backward(reentrant: bool) -> None:
    wrong = checkpointed(use_reentrant=reentrant, preserve_rng_state=False)
    assert said(recomputed, wrong) == [("recomputed_differently", True)] and said(right_derivative, wrong) == []
    right = checkpointed(use_reentrant=reentrant)
    assert said(recomputed, right) == said(right_derivative, right) == []


class Mask(torch.autograd.Function):
    """A dropout that draws its mask again in backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * (torch.rand_like(value) > 0.3) / 0.7

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (torch.rand_like(grad) > 0.3) / 0.7


def test_recomputed_names_a_mask_drawn_in_backward_and_a_changed_buffer() -> None:
    trainer = Trainer(small("backprojection"))
    on_output(trainer.model.blocks, Mask.apply)
    assert said(recomputed, trainer) == [("recomputed_differently", True)]
    trainer, calls = Trainer(small("backprojection")), iter(range(10**6))
    wrap(trainer.model.blocks[0].inner, "forward", lambda forward: lambda x: forward(x) * (1 + next(calls)))
    wrap(trainer.model.blocks, "forward", lambda forward: partial(checkpoint, forward, use_reentrant=False))
    (finding,) = recomputed(PreflightContext(trainer))
    assert finding.certain and "blocks.0.inner" in finding.evidence


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, lambda width: nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))]
)
def test_recomputed_allows_layers_that_change_with_each_pass(norm: Callable) -> None:
    trainer = Trainer(small("backprojection"))
    trainer.model.norm = norm(32)
    assert said(recomputed, trainer) == []


def test_derivatives_pass_reentrant_checkpoints() -> None:
    given, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    weight.grad = kept = torch.ones(4, 4)

    def loss(call: Callable) -> Tensor:
        return call(lambda x: (x @ weight).tanh(), 2 * given).sum()

    plain = derivatives(loss(lambda block, x: block(x)), [given, weight])
    again = derivatives(loss(partial(checkpoint, use_reentrant=True)), [given, weight])
    assert all(torch.allclose(a, b) for a, b in zip(plain, again))
    assert weight.grad is kept and given.grad is None


# ---- scales
# -----------------------------------------------------------------------------------------------------------


def scaled(value: float, how: str, part: str = "head") -> Trainer:
    trainer = Trainer(small("backprojection"))
    module = getattr(trainer.model, part)
    if how == "hook":
        for parameter in module.parameters():
            parameter.register_hook(lambda grad: value * grad)
    elif how == "operator":
        on_output(module, lambda x: Backward.apply(x, lambda grad: value * grad))
    else:
        on_output(module, lambda x: value * x + (1 - value) * x.detach())
    return trainer


@pytest.mark.parametrize("how", ["hook", "operator", "detached"])
def test_right_derivative_names_a_constant_multiple(how: str) -> None:
    (finding,) = right_derivative(PreflightContext(scaled(0.031, how, "norm")))
    assert finding.cause == "gradient_scale_differs" and "0.031" in finding.evidence and not finding.certain


def test_right_derivative_tells_a_scale_from_a_wrong_backward() -> None:
    trainer = Trainer(small("backprojection"))
    on_output(trainer.model.norm, lambda x: Backward.apply(x, lambda grad: grad.roll(1, -1)))
    assert said(right_derivative, trainer) == [("wrong_backward", True)]


def test_one_step_names_a_tensor_at_another_scale_and_allows_clipping() -> None:
    for where in ("behind backward", "before the step"):
        trainer = Trainer(small("hybrid"))
        parameter = next(trainer.model.parameters())
        if where == "behind backward":
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.03) is None or None)
        else:
            before_step(trainer, lambda parameter=parameter: parameter.grad.mul_(0.03))
        assert ("gradient_scale_differs", False) in said(one_step, trainer)
    for twin in ("half", "accumulate"):
        trainer = Trainer(small(twin))
        for parameter in trainer.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-1e-3, 1e-3) is None or None)
        assert not {"gradient_scale_differs", "rank_gradient_missing"} & {cause for cause, _ in said(one_step, trainer)}


# ---- no gradient
# ------------------------------------------------------------------------------------------------------


def test_connected_names_the_layer_behind_which_the_gradient_is_lost() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(trainer.model, "trunk", torch.no_grad())
    rebound(trainer)
    (finding,) = connected(PreflightContext(trainer))
    assert finding.cause == "detached_backbone" and "the whole forward runs under no_grad" in finding.evidence
    assert "no_grad" in finding.advice and "named" not in finding.advice
    trainer = Trainer(small("backprojection"))
    on_output(trainer.model.head, Tensor.detach)
    (finding,) = connected(PreflightContext(trainer))
    assert "the last layer whose answer requires one is norm, and head is without" in finding.evidence


# ---- networks that are unusual and right
# ------------------------------------------------------------------------------


def test_gradient_checks_allow_layers_left_out_by_chance() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(
        trainer.model.blocks[0],
        "forward",
        lambda forward: lambda x: forward(x) if torch.rand(()) < 0.3 else x,
    )
    torch.manual_seed(0)
    assert torch.rand(()) > 0.3 and said(every_tensor, trainer) == []


def test_gradient_checks_allow_running_statistics_in_the_forward_pass() -> None:
    trainer = Trainer(small("backprojection"))
    trainer.model.norm.register_buffer("variance", torch.ones(32))

    def normalise(x: Tensor) -> Tensor:
        trainer.model.norm.variance.lerp_(x.detach().square().mean(0), 0.2)
        return x / trainer.model.norm.variance.sqrt()

    on_output(trainer.model.norm, normalise)
    assert said(right_derivative, trainer) == []


# ---- the loss that is printed, and what a step makes of the weights
# ---------------------------------------------------


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda total: 0.031 * total + (1 - 0.031) * total.detach(), [("gradient_scale_differs", False)]),
        (lambda total: Backward.apply(total, lambda grad: 20 * grad), [("gradient_scale_differs", False)]),
        (torch.sqrt, []),
        (lambda total: 1e-3 * total, []),
    ],
)
def test_right_derivative_holds_the_gradient_to_the_printed_loss(change: Any, expected: list) -> None:
    trainer = Trainer(small("backprojection"))
    wrap(trainer.loss, "forward", lambda forward: lambda *given: (change((made := forward(*given))[0]), made[1]))
    assert said(right_derivative, trainer) == expected


def test_one_step_tells_who_else_moves_the_weights() -> None:
    def stepped(action: Callable[[Trainer], Any]) -> list[tuple[str, bool]]:
        trainer = Trainer(small("backprojection"))
        acting = action(trainer)
        trainer.optimizer.register_step_post_hook(lambda *_: acting())
        return said(one_step, trainer)

    def decayed(trainer: Trainer) -> Callable:
        return torch.no_grad()(lambda: [each.mul_(0.9) for each in trainer.model.head.parameters()])

    def broken(trainer: Trainer) -> Callable:
        return torch.no_grad()(lambda: trainer.model.head.bias.fill_(torch.nan))

    assert stepped(decayed) == [("weights_changed_outside", False)]
    assert stepped(broken) == [("nonfinite_step", True)]
    trainer = Trainer(small("backprojection"))
    other = torch.optim.SGD(trainer.model.head.parameters(), 1e3)
    trainer.optimizer.register_step_pre_hook(lambda *_: other.step() and None)
    assert said(one_step, trainer) == [("duplicate_parameters", True)]
