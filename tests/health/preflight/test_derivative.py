"""The gradient's value in preflight: kinks, jumps and gradients stopped on purpose are no wrong backward; a wrong
backward is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.faults.healthy_twins import TWINS
from bench.faults.patches import Backward, on_answer, wrap
from ris_fast import load_config
from ris_fast.config.schema import Loss
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import StoppedValues
from ris_fast.health.preflight.derivative import loss_inputs, parts, right_derivative
from ris_fast.health.preflight.loss import dead_terms
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.terms import term_errors
from ris_fast.physics.real_complex import conj, matmul
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.trainer import Trainer

SMALL = [
    "task.ris_horizontal=4",
    "task.ris_vertical=4",
    "task.bs_antennas=4",
    "task.snapshots=8",
    "training.precision=fp32",
    "data.train_scenes=64",
    "data.val_scenes=32",
    "data.test_scenes=32",
    "model.options.width=32",
    "model.options.heads=4",
    "model.options.grid=5",
    "model.options.feedforward=32",
    "model.options.layers=1",
    "training.batch_size=16",
    "training.device=cpu",
    "training.compile=false",
]


def found(trainer: Trainer) -> list[Finding]:
    return list(right_derivative(PreflightContext(trainer)))


def hybrid(change: Callable[[Tensor], Tensor] | None = None) -> Trainer:
    """`change`: of the factor that the network returns."""
    trainer = Trainer(TWINS["hybrid"]())
    if change:
        on_answer(trainer, change)
    return trainer


def jagged(trainer: Trainer, size: float = 1e-2) -> Trainer:
    """With a loss that jumps wherever a range passes a tenth of a millimetre."""

    def forward(right: Any) -> Any:
        def loss(guess: Any, scenes: Any) -> Any:
            total, terms = right(guess, scenes)
            return total + size * torch.floor(1e4 * guess.range_m).sum(), terms

        return loss

    wrap(trainer.loss, "forward", forward)
    return trainer


@pytest.mark.parametrize(
    "seed, why",
    [(79, "sources are assigned anew within a step"), (99, "the count reads the factor and sends no gradient")],
)
def test_right_derivative_passes_our_own_network(seed: int, why: str) -> None:
    assert found(Trainer(load_config(preset="original", overrides=[*SMALL, f"training.seed={seed}"]))) == [], why


def test_right_derivative_passes_a_loss_that_jumps() -> None:
    assert found(jagged(hybrid())) == []


SABOTAGED = {"conjugated": conj, "half": lambda grad: 0.5 * grad, "shifted": lambda grad: grad.roll(1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, jumps", [("conjugated", False), ("conjugated", True), ("half", True), ("shifted", True)]
)
def test_right_derivative_is_certain_of_a_wrong_backward(rule: str, jumps: bool) -> None:
    trainer = hybrid(lambda factor: Backward.apply(factor, SABOTAGED[rule]))
    (finding,) = found(jagged(trainer) if jumps else trainer)
    assert finding.cause == "wrong_backward" and finding.certain


def test_right_derivative_is_certain_of_a_wrong_loss_backward() -> None:
    trainer = hybrid()
    wrap(
        trainer.loss,
        "forward",
        lambda forward: (
            lambda guess, scenes: forward(guess._replace(factor=Backward.apply(guess.factor, conj)), scenes)
        ),
    )
    (finding,) = found(trainer)
    assert finding.cause == "wrong_backward" and "factor" in finding.evidence and finding.certain


def test_right_derivative_names_a_loss_wrong_in_float32_alone() -> None:
    def narrow(factor: Tensor) -> Tensor:
        return factor if factor.dtype == torch.float64 else Backward.apply(factor, lambda grad: grad.roll(1, 1))

    trainer = hybrid()
    wrap(
        trainer.loss,
        "forward",
        lambda forward: lambda guess, scenes: forward(guess._replace(factor=narrow(guess.factor)), scenes),
    )
    (finding,) = found(trainer)
    assert finding.cause == "wrong_backward" and "factor" in finding.evidence


@pytest.mark.parametrize("kept, said", [(0.98, []), (0.3, [("detached_backbone", False)])])
def test_right_derivative_names_a_detached_backbone(kept: float, said: list) -> None:
    trainer = hybrid(lambda factor: kept * factor + (1 - kept) * factor.detach())
    assert [(finding.cause, finding.certain) for finding in found(trainer)] == said


@pytest.mark.slow
def test_stopped_gradient_excuses_no_wrong_backward() -> None:
    trainer = hybrid(lambda factor: Backward.apply(0.5 * factor, conj) + 0.5 * factor.detach())
    (finding,) = found(trainer)
    assert finding.cause == "wrong_backward" and finding.certain


@pytest.mark.slow
def test_stopped_values_make_a_network_follow_its_gradient() -> None:
    trainer = hybrid(lambda factor: 0.3 * factor + 0.7 * factor.detach())
    context = PreflightContext(trainer)
    free, held = parts(context), parts(context, StoppedValues())
    error = {name: gap / size for name, (gap, size) in free.items() if size}
    assert max(error.values()) > 0.5 and max(gap / size for gap, size in held.values() if size) < 0.05
    assert max(loss_inputs(context).values()) < 0.05


def angles_from_zero() -> Trainer:
    """Angle heads start at zero, as heads often do: every slot of every scene is in one place, within rounding."""
    trainer = Trainer(TWINS["hybrid"]())
    with torch.no_grad():
        for head in (trainer.model.angle_grid.logits, trainer.model.angle_offset):
            head.weight.zero_()
            head.bias.zero_()
    return trainer


def test_right_derivative_passes_angles_that_start_at_zero() -> None:
    context = PreflightContext(angles_from_zero())
    assert context.guess.azimuth.abs().max() < 1e-6
    assert list(right_derivative(context)) == [] and max(term_errors(context).values()) < 1e-6


def test_dead_terms_passes_angles_that_start_at_zero() -> None:
    """Also where no factor tells what the truth is, so that only predictions near the network's are compared."""
    context = PreflightContext(angles_from_zero())
    covariance = matmul(context.scenes.factor, conj(context.scenes.factor).transpose(1, 2))
    context.scenes = replace(context.scenes, factor=None, covariance=covariance)
    context.loss = CovarianceLoss(Loss(angle=0.05, chamfer=0.05), context.config.task)
    assert list(dead_terms(context)) == []
