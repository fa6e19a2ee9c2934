"""What is meant and looks like a mistake: checks are silent about it, and name the mistake beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.faults.patches import after_step, on_batches, on_output, wrap
from ris_fast.health.preflight.derivative import right_derivative
from ris_fast.health.preflight.distributions import distributions
from ris_fast.health.preflight.kernels import loss_kernel
from ris_fast.health.preflight.reach import output_reach
from ris_fast.health.preflight.rereads import scenes_again
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small


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
