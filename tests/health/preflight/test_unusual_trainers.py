"""Trainers that are unusual and learn are left in peace, and mistakes get the one name that is true of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from bench.faults.patches import before_step, wrap
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.health.preflight import derivative as check_derivative
from ris_fast.health.preflight import finite_difference, projected
from ris_fast.health.preflight import scenes as check_scenes
from ris_fast.health.preflight import schedule as check_schedule
from ris_fast.health.preflight.order import order
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import preflight_of, small


@pytest.mark.slow
@pytest.mark.parametrize(
    "twin, settings",
    [("hybrid", {"training.batch_size": 1}), ("backprojection", {"training.batch_size": 1, "training.accumulate": 32})],
)
def test_preflight_allows_one_scene_a_batch(twin: str, settings: dict[str, Any]) -> None:
    assert preflight_of(Trainer(small(twin, **settings))) == []


@pytest.mark.slow
@pytest.mark.parametrize("biases", [False, True])
def test_preflight_allows_residual_branches_of_zero(biases: bool) -> None:
    trainer = Trainer(small("backprojection", **{"model.options.depth": 2}))
    for block in trainer.model.blocks:
        torch.nn.init.zeros_(block.outer.weight)
        if biases:
            torch.nn.init.zeros_(block.outer.bias)
    assert preflight_of(trainer) == []


@pytest.mark.slow
def test_preflight_is_not_certain_of_tiny_first_weights() -> None:
    trainer = Trainer(small("hybrid"))
    for parameter in trainer.model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(1e-4)
    assert not [finding for finding in Watchdog(trainer).preflight() if finding.certain]


@pytest.mark.parametrize(
    "check, settings, said",
    [
        (check_schedule.first_gradient, {"optimizer.max_grad_norm": 1e-4}, []),
        (check_schedule.first_gradient, {"loss.cov": 1e3}, []),
        (check_schedule.first_gradient, {"optimizer.max_grad_norm": 1e-6}, [("clip_too_small", False)]),
        (check_schedule.first_gradient, {"optimizer.max_grad_norm": 1e-12}, [("clip_too_small", True)]),
        (check_schedule.first_gradient, {"optimizer.eps": 1.0}, [("epsilon_swallows_signal", True)]),
        (
            check_schedule.rates,
            {"optimizer.head_lr": 1e-2, "optimizer.backbone_lr": 1e-7},
            [("learning_rate_too_small", False)],
        ),
        (
            check_schedule.rates,
            {"optimizer.head_lr": 1e-8, "optimizer.backbone_lr": 1e-8},
            [("learning_rate_too_small", True)],
        ),
        (
            check_schedule.rates,
            {"optimizer.head_lr": 1.0, "optimizer.backbone_lr": 1.0},
            [("learning_rate_too_large", False)],
        ),
        (
            check_schedule.rates,
            {"optimizer.head_lr": 5.0, "optimizer.backbone_lr": 5.0},
            [("learning_rate_too_large", True)],
        ),
        (check_schedule.rates, {"optimizer.weight_decay": 100.0}, [("weight_decay_too_large", False)]),
        (check_schedule.rates, {"optimizer.weight_decay": 1000.0}, [("weight_decay_too_large", True)]),
        (check_schedule.rates, {"optimizer.warmup": 0.8}, [("warmup_too_long", False)]),
    ],
)
def test_schedule_checks_are_certain_of_fatal_settings_only(check: Any, settings: dict[str, Any], said: list) -> None:
    found = {
        finding.cause: finding.certain for finding in check(PreflightContext(Trainer(small("hybrid", **settings))))
    }
    assert list(found.items()) == said


# ---- names that can be true
# ----------------------------------------------------------------------------------------------


def first_of(trainer: Trainer) -> tuple[str, list[str]]:
    said = preflight_of(trainer)
    return said[0], said[1:]


def test_preflight_names_scenes_altered_by_the_network() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(
        trainer.network,
        "features",
        lambda features: lambda y, *rest: features(y.mul_(0.5).add_(0.05 * y.abs().mean()), *rest),
    )
    first, others = first_of(trainer)
    assert first == "scenes_altered" and not {"ranks_diverged", "stale_compiled_graph"} & set(others)


def test_preflight_names_scenes_mixed_before_the_network() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(
        trainer.network, "features", lambda features: lambda y, *rest: features(y[:1].expand_as(y).contiguous(), *rest)
    )
    assert first_of(trainer)[0] == "scenes_mixed"


@pytest.mark.slow
def test_preflight_names_gradients_cleared_before_step() -> None:
    trainer = Trainer(small("hybrid"))
    before_step(trainer, lambda: trainer.optimizer.zero_grad(set_to_none=True))
    assert preflight_of(trainer) == ["gradients_cleared_before_step"]


@pytest.mark.slow
def test_preflight_names_losses_differ_before_derivatives() -> None:
    trainer = Trainer(small("hybrid"))
    wrap(
        trainer.loss,
        "forward",
        lambda forward: (
            lambda guess, scenes: forward(
                guess, replace(scenes, factor=guess.factor.detach()[:, :, :2]) if torch.is_grad_enabled() else scenes
            )
        ),
    )
    assert first_of(trainer)[0] == "losses_differ"


def test_preflight_blames_fp16_overflow_only_in_fp16() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(trainer.network, "features", lambda features: lambda y, *rest: features(0.0 * y, *rest))
    assert "fp16_overflow" not in preflight_of(trainer)


@pytest.mark.slow
def test_preflight_allows_an_ema_of_weights_at_rest() -> None:
    assert "ema_equals_raw" not in preflight_of(
        Trainer(small("hybrid", **{"optimizer.backbone_lr": 1e-9, "optimizer.head_lr": 1e-9}))
    )


def test_line_gap_takes_a_second_side_only_if_needed() -> None:
    """|w| at w = 0 has two slopes, and either is a derivative; a slope of neither side is wrong at every step."""

    def error(slope: float, loss: Any) -> tuple[float, int]:
        line = cache(loss)
        apart, size = finite_difference.line_gap((slope, line, 2e-6), projected.STEPS)
        return apart / size, line.cache_info().currsize

    wrong, steps = check_derivative.DISAGREES, len(projected.STEPS)
    assert error(2.0, lambda w: 1.0 + 2.0 * w) == (0.0, 2) and error(-1.0, lambda w: 1.0 + abs(w)) == (0.0, 3)
    assert error(0.5, lambda w: 1.0 + 2.0 * w)[0] > wrong and error(0.5, lambda w: 1.0 + 2.0 * w)[1] == 1 + 2 * steps


def test_derivative_checks_allow_ties_in_sixteen_bits() -> None:
    """The assignment of sources has its kinks where two answers are equal; this drawn run has such a scene."""
    from bench.faults.healthy import healthy_config
    from ris_fast.health.preflight.gradient import right_derivative
    from ris_fast.health.preflight.terms import each_term

    assert list(each_term(PreflightContext(Trainer(healthy_config(86))))) == []
    assert list(right_derivative(PreflightContext(Trainer(healthy_config(150))))) == []


# ---- copies in the data
# ----------------------------------------------------------------------------------------------------


def with_copies(trainer: Trainer, every: int) -> Trainer:
    """One training scene in so many is a copy of the one before it, under a number of its own."""

    def copied(batch: Any) -> Any:
        def served(split: str, index: torch.Tensor) -> Any:
            scenes = batch(
                split, torch.where(index % every == every - 1, index - 1, index) if split == "train" else index
            )
            return replace(scenes, index=index)

        return served

    wrap(trainer.source, "batch", copied)
    return trainer


@pytest.mark.parametrize(
    "every, shown", [(49, "5 of the first 256"), (240, "1 of the first 256"), (5, "51 of the first 256")]
)
def test_distinct_check_only_notes_copies_in_the_data(every: int, shown: str) -> None:
    context = PreflightContext(with_copies(Trainer(small("backprojection", **{"data.fixed": True})), every))
    assert (
        list(check_scenes.distinct(context)) == []
        and shown in context.note
        and "copies of others in the data" in context.note
    )


@pytest.mark.parametrize("every, found", [(20, False), (1, True)])
def test_distinct_check_names_a_repeated_batch(every: int, found: bool) -> None:
    trainer = Trainer(small("backprojection"))
    part = lambda index: torch.where(index % 20 == 19, index - 1, index) if every > 1 else index % 32  # noqa: E731
    wrap(trainer.source, "batch", lambda batch: lambda split, index: batch(split, part(index)))
    context = PreflightContext(trainer)
    seen = [*check_scenes.distinct(context), *order(context)]
    assert [each.cause for each in seen] == ["repeated_batch"] * found


@pytest.mark.parametrize("batch", [2, 16])
def test_repeated_batch_allows_copies_in_the_data(batch: int) -> None:
    from ris_fast.health.monitor.attach import attach_health

    config = small(
        "backprojection",
        **{
            "data.fixed": True,
            "data.train_scenes": 64,
            "training.batch_size": batch,
            "training.epochs": 2,
            "report.every_steps": 1,
            "task.max_sources": 1,
        },
    )
    trainer = attach_health(with_copies(Trainer(config), 8), preflight=False)
    trainer.fit()
    assert "repeated_batch" not in [finding.cause for finding in trainer.callbacks[-1].findings]
    assert any(row["health"]["repeated"] for row in trainer.callbacks[-1].run.steps)
