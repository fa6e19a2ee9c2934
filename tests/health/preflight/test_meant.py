"""What is meant and looks like a mistake: checks are silent about it, and name the mistake beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.patches import Backward, after_step, layers, on_answer, on_batches, on_output, wrap
from ris_fast.health.preflight.calls import same_network
from ris_fast.health.preflight.derivative import right_derivative
from ris_fast.health.preflight.distributions import distributions
from ris_fast.health.preflight.kernels import loss_kernel
from ris_fast.health.preflight.modes import randomness
from ris_fast.health.preflight.own_terms import own_term
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.reach import output_reach
from ris_fast.health.preflight.rereads import scenes_again
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.health.preflight.validation import same_loss
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small

ANGLES = ("azimuth", "elevation")


def _masked(scenes: Scenes) -> Scenes:
    kept = torch.rand(scenes.batch, 1, scenes.snapshots.shape[2], 1) < 0.7
    return replace(scenes, snapshots=scenes.snapshots * kept)


@pytest.mark.parametrize("split, named", [("train", []), ("val", ["scenes_change"])])
def test_a_mask_drawn_anew_is_meant_in_training_alone(split: str, named: list[str]) -> None:
    trainer = Trainer(small("hybrid"))
    on_batches(trainer, _masked, split)
    assert causes(scenes_again, trainer) == named
    assert causes(physics, trainer) == []
    assert split == "val" or causes(distributions, trainer) == []


@pytest.mark.slow
def test_a_rounding_passed_straight_through_is_meant() -> None:
    trainer = Trainer(small("hybrid"))
    on_output(trainer.model.fuse, lambda x: x + ((8.0 * x).round() / 8.0 - x).detach())
    assert causes(right_derivative, trainer) == []


class Chosen(nn.Module):
    """A wide layer of which only some numbers go on, by a choice that no gradient sees; `backward` changes theirs."""

    def __init__(self, choose: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wide, self.narrow = nn.Linear(32, 2048), nn.Linear(2048, 32)
        self.choose, self.backward = choose, backward

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        x = x * self.choose(x)
        return self.narrow(x if self.backward is None else Backward.apply(x, self.backward))


@pytest.mark.parametrize("backward", [None, lambda grad: grad.roll(1, -1)], ids=["right", "wrong"])
@pytest.mark.parametrize(
    "choose",
    [lambda x: x >= x.topk(300).values[..., -1:], lambda x: x.abs() > x.abs().median(-1, keepdim=True).values],
    ids=["the largest", "a threshold"],
)
def test_a_choice_of_the_largest_is_meant(choose: Callable, backward: Callable | None) -> None:
    trainer = Trainer(small("backprojection"))
    trainer.model.norm = Chosen(choose, backward)
    assert causes(right_derivative, trainer) == ([] if backward is None else ["wrong_backward"])


@pytest.mark.parametrize(
    "made, certain",
    [
        (lambda x: x - x.round(), False),  # as an angle that is wrapped
        (lambda x: x + 0.1 * (100.0 * x).round(), True),
    ],
    ids=["wrapped", "rounded"],
)
def test_a_wrap_is_right_between_its_jumps(made: Callable, certain: bool) -> None:
    trainer = Trainer(small("backprojection"))
    trainer.model.norm = nn.Sequential(nn.Linear(32, 2048), nn.Linear(2048, 32))
    on_output(trainer.model.norm[0], lambda x: made(4.0 * x))
    found = [(each.cause, each.certain) for each in right_derivative(PreflightContext(trainer))]
    assert found == [("non_differentiable", certain)]


class Spike(torch.autograd.Function):
    """A step with the derivative of a smooth one, as in spiking networks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / (1 + 5 * ctx.saved_tensors[0].abs()).square()


class Clip(torch.autograd.Function):
    """Changes nothing but the gradient, number by number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1e-4, 1e-4)


class Square(torch.autograd.Function):
    """With a factor of the gradient left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize(
    "made, certain",
    [
        (Spike.apply, False),
        (Clip.apply, False),
        (lambda x: x + Square.apply(x), True),
        (lambda x: Spike.apply(x) + Square.apply(x), True),
    ],
    ids=["spike", "clip", "square", "both"],
)
def test_a_substitute_derivative_may_be_meant(made: Callable, certain: bool) -> None:
    trainer = Trainer(small("backprojection"))
    on_output(trainer.model.norm, made)
    assert [each.cause for each in right_derivative(PreflightContext(trainer))] == ["wrong_backward"]
    assert [each.certain for each in right_derivative(PreflightContext(trainer))] == [certain]


@pytest.mark.parametrize("middle, named", [(0.0, []), (15.0, ["loss_sign"])])
def test_weights_of_scenes_are_meant_and_not_below_zero(middle: float, named: list[str]) -> None:
    trainer = Trainer(small("hybrid"))

    def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda factor, scenes, **how: (scenes.snr_db - middle) * nmse(factor, scenes, **how)

    wrap(trainer.loss, "nmse", make)
    assert causes(loss_kernel, trainer) == named


def _half_moments(trainer: Trainer) -> None:
    @torch.no_grad()
    def stored() -> None:
        for state in trainer.optimizer.state.values():
            state["exp_avg_sq"].copy_(state["exp_avg_sq"].half())

    after_step(trainer, stored)


def _kept_rate(trainer: Trainer) -> None:
    def make(take: Callable) -> Callable:
        def replayed(*args: Any) -> Any:
            planned = [group["lr"] for group in trainer.optimizer.param_groups]
            for group in trainer.optimizer.param_groups:
                group["lr"] = 1e-5
            answer = take(*args)
            for group, rate in zip(trainer.optimizer.param_groups, planned):
                group["lr"] = rate
            return answer

        return replayed

    wrap(trainer.optimizer, "step", make)


@pytest.mark.parametrize(
    "change, cause", [(_half_moments, "gradient_underflow"), (_kept_rate, "learning_rate_off_plan")]
)
def test_several_steps_name_what_the_optimizer_was_given(change: Callable[[Trainer], None], cause: str) -> None:
    trainer = Trainer(small("hybrid"))
    assert causes(several_steps, trainer) == []
    change(trainer)
    assert cause in causes(several_steps, trainer)


def _turned(factor: Tensor, spread: float) -> Tensor:
    """A phase a scene, drawn anew in each pass, and noise of this size beside the factor."""
    phase = torch.polar(torch.ones(len(factor)), 6.3 * torch.rand(len(factor)))[:, None, None]
    noise = spread * factor.detach().square().mean().sqrt() * torch.randn_like(factor)
    return torch.view_as_real(torch.view_as_complex(factor.contiguous()) * phase) + noise


def _seeded(factor: Tensor) -> Tensor:
    torch.manual_seed(0)
    return fn.dropout(factor, 0.1)


@pytest.mark.parametrize(
    "change, named",
    [
        (partial(_turned, spread=0.0), []),
        (partial(_turned, spread=3.0), ["heavy_dropout"]),
        (_seeded, ["losses_differ"]),
        (lambda factor: fn.dropout(factor, 0.1), []),
    ],
    ids=["phase", "noise", "seed", "dropout"],
)
def test_randomness_of_training_is_told_by_covariances(change: Callable[[Tensor], Tensor], named: list[str]) -> None:
    trainer = Trainer(small("hybrid"))
    on_answer(trainer, lambda factor: change(factor) if trainer.model.training else factor)
    assert causes(randomness, trainer) == named


def test_reach_names_an_output_without_a_sign() -> None:
    trainer = Trainer(small("hybrid"))
    assert causes(output_reach, trainer) == []
    wrap(
        trainer.step,
        "network",
        lambda network: (
            lambda *inputs: (lambda answer: answer._replace(azimuth=answer.azimuth.abs()))(network(*inputs))
        ),
    )
    assert causes(output_reach, trainer) == ["limited_output"]


def _cosines(prediction: Prediction, scenes: Scenes) -> Tensor:
    """Of the covariance of every answer with that of every scene, (B, B)."""
    factors = (to_complex(each) for each in (prediction.factor, scenes.factor))
    found, true = (fn.normalize(torch.view_as_real(each @ each.mH).flatten(1), dim=1) for each in factors)
    return found @ true.mT


def _distances(prediction: Prediction, scenes: Scenes) -> Tensor:
    return 2.0 - 2.0 * _cosines(prediction, scenes)


def _contrast(temperature: float) -> Callable[[Prediction, Scenes], Tensor]:
    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        logits = _cosines(prediction, scenes) / temperature
        return fn.cross_entropy(logits, torch.arange(len(logits)), reduction="none")

    return term


def _overflowing(prediction: Prediction, scenes: Scenes) -> Tensor:
    powers = (_cosines(prediction, scenes) / 0.01).exp()
    return -(powers.diagonal() / powers.sum(1)).log()


def _triplet(prediction: Prediction, scenes: Scenes) -> Tensor:
    away = _distances(prediction, scenes)
    return (0.1 + away.diagonal() - away.roll(1, 1).diagonal()).relu()


@pytest.mark.parametrize(
    "term, named",
    [
        (_contrast(1.0), []),
        (_contrast(0.01), []),
        (_triplet, []),
        (_overflowing, ["nonfinite_gradients"]),
        (lambda *given: _distances(*given).mean(1), ["shapes_broadcast"]),
        (lambda *given: _distances(*given).roll(1, 1).diagonal(), ["shapes_broadcast"]),
    ],
)
def test_a_term_that_tells_scenes_apart_is_meant_and_not_one_that_mixes_them_up(
    term: Callable[[Prediction, Scenes], Tensor], named: list[str]
) -> None:
    def own(prediction: Prediction, scenes: Scenes) -> Tensor:
        return term(prediction, scenes)

    assert causes(own_term, Trainer(small("backprojection"), loss=own)) == named


def _turned(scenes: Scenes, *, draws: int, inputs_too: bool = True) -> Scenes:
    """The surface turned round in half of the scenes, for the labels by the last draw."""
    drawn = torch.rand(draws, scenes.batch) < 0.5

    def some(which: Tensor, value: Tensor, axis: int) -> Tensor:
        return torch.where(which.view(-1, *[1] * (value.dim() - 1)), value.flip(axis), value)

    labels = {"factor": some(drawn[-1], scenes.factor, 1)}
    labels |= {name: torch.where(drawn[-1][:, None], -getattr(scenes, name), getattr(scenes, name)) for name in ANGLES}
    codes, channel = (some(drawn[0], each, 2) for each in (scenes.with_own_codes().codes, scenes.channel))
    return replace(scenes, **labels, **({"codes": codes, "channel": channel} if inputs_too else {}))


@pytest.mark.parametrize(
    "change, split, named",
    [
        (partial(_turned, draws=1), "train", []),
        (partial(_turned, draws=1), "val", ["scenes_change"]),
        (partial(_turned, draws=2), "train", ["parts_unrelated"]),
        (partial(_turned, draws=1, inputs_too=False), "train", ["scenes_change"]),
        (lambda scenes: replace(scenes[torch.randperm(scenes.batch)], index=scenes.index), "train", ["scenes_change"]),
    ],
    ids=["one draw", "in validation", "two draws", "labels alone", "other scenes"],
)
def test_a_turn_of_whole_scenes_is_meant_in_training_alone(
    change: Callable[[Scenes], Scenes], split: str, named: list[str]
) -> None:
    trainer = Trainer(small("backprojection"))
    on_batches(trainer, change, split)
    assert causes(scenes_again, trainer) == named


def _in_bytes(trainer: Trainer, *, once: bool) -> None:
    """What evaluates has the outputs of its layers in 8 bits, with ranges that are measured in each call or once."""
    ranges: dict[nn.Module, Tensor] = {}

    def rounded(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        step = (ranges.setdefault(layer, output.abs().amax()) if once else output.abs().amax()) / 127.0
        return (output / step).round().clamp(-127, 127) * step

    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def call(*inputs: Tensor) -> Prediction:
            hooks = [] if torch.is_grad_enabled() else [each.register_forward_hook(rounded) for each in parts]
            answer = network(*inputs)
            for hook in hooks:
                hook.remove()
            return answer

        return call

    parts = layers(trainer.model)
    wrap(trainer.step, "network", make)


def _answering(change: Callable[[Tensor], Tensor]) -> Callable[[Trainer], None]:
    """What evaluates changes the factors of the network."""

    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def call(*inputs: Tensor) -> Prediction:
            answer = network(*inputs)
            return answer if torch.is_grad_enabled() else answer._replace(factor=change(answer.factor))

        return call

    return lambda trainer: wrap(trainer.step, "network", make)


@pytest.mark.parametrize(
    "engine, named",
    [
        (partial(_in_bytes, once=False), []),
        (_answering(lambda factor: factor.bfloat16().float()), []),
        (partial(_in_bytes, once=True), ["stale_compiled_graph"]),
        (_answering(lambda factor: torch.cat((factor[:-1], 0.9 * factor[-1:]))), ["compiled_differs"]),
    ],
    ids=["bytes", "bfloat16", "calibrated once", "last scene"],
)
def test_an_engine_that_rounds_in_evaluation_is_meant_and_not_one_that_departs(
    engine: Callable[[Trainer], None], named: list[str]
) -> None:
    trainer = Trainer(small("hybrid"))
    engine(trainer)
    found = list(same_network(PreflightContext(trainer)))
    assert [each.cause for each in found] == named
    assert named != ["compiled_differs"] or found[0].certain
    if not named:
        assert causes(same_loss, trainer) == [] and causes(randomness, trainer) == []
