"""Checks of preflight one by one: silent about healthy trainers of every kind, and each names the mistake it is for."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.faults.healthy import with_shards
from bench.faults.healthy_twins import TWINS, changed
from bench.faults.patches import Backward, before_step, on_batches, put, wrap
from ris_fast.config.schema import Config, Loss
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.health.preflight import derivative as check_derivative
from ris_fast.health.preflight import finite_difference, scene_parts
from ris_fast.health.preflight import gradient as check_gradient
from ris_fast.health.preflight import information as check_information
from ris_fast.health.preflight import kernels as check_kernels
from ris_fast.health.preflight import loss as check_loss
from ris_fast.health.preflight import scenes as check_scenes
from ris_fast.health.preflight import schedule as check_schedule
from ris_fast.health.preflight import terms as check_terms
from ris_fast.health.preflight import validation as check_validation
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.training import loss
from ris_fast.training import loss_terms as terms
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.trainer import Trainer


def causes(check: Any, trainer: Trainer) -> list[str]:
    return [finding.cause for finding in check(PreflightContext(trainer))]


def preflight_of(trainer: Trainer) -> list[str]:
    return [finding.cause for finding in Watchdog(trainer).preflight()]


def small(twin: str, **settings: Any) -> Config:
    return changed(TWINS[twin](), settings)


def at(snr_db: float) -> dict[str, float]:
    """Every scene at this SNR; the two limits in the order in which neither passes the other."""
    limits = {"task.snr_min_db": snr_db, "task.snr_max_db": snr_db}
    return dict(sorted(limits.items(), reverse=snr_db < 0))


# ---- what a classical estimator makes of the inputs
# --------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS)
def test_the_estimator_on_the_networks_inputs_is_better_than_the_constant(twin: str) -> None:
    context = PreflightContext(Trainer(TWINS[twin]()))
    assert list(check_information.input_information(context)) == []
    shown, constant = (float(word.rstrip(",")) for word in context.note.split() if word[0].isdigit())
    assert shown < 0.95 * constant


def test_inputs_without_the_channel_are_named_by_the_estimator() -> None:
    (finding,) = check_information.input_information(
        PreflightContext(Trainer(small("few_codes", **{"model.options.inputs": "effective_channel"})))
    )
    assert finding.cause == "inputs_withhold_answer" and not finding.certain


@pytest.mark.parametrize("inputs", ["full", "effective_channel"])
def test_scenes_that_are_all_noise_are_named_and_not_the_inputs(inputs: str) -> None:
    settings = {"model.options.inputs": "effective_channel"} if inputs == "effective_channel" else {}
    (finding,) = check_information.input_information(
        PreflightContext(Trainer(small("hybrid", **settings, **at(-60.0))))
    )
    assert finding.cause == "inputs_withhold_answer" and not finding.certain and "scenes themselves" in finding.evidence


@pytest.mark.parametrize("snr_db", [-20.0, -10.0, -1.0])
@pytest.mark.parametrize("twin", ["hybrid", "backprojection"])
def test_scenes_of_low_snr_are_not_accused(twin: str, snr_db: float) -> None:
    assert causes(check_information.input_information, Trainer(small(twin, **at(snr_db)))) == []


# ---- kernels
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", check_kernels.CHECKS.values())
@pytest.mark.parametrize(
    "config",
    [
        small("backprojection"),
        small("hybrid", **{"loss.beta": 0.3, "loss.loading": 0.1, "loss.shrink": 1e-3}),
        small("hybrid", **{"training.precision": "bf16", "training.backend": "reference", "optimizer.ema_decay": 0.0}),
        small("backprojection", **at(100.0)),
        small("backprojection", **at(120.0)),
        small("hybrid", **{"optimizer.max_grad_norm": 1e-12, "optimizer.backbone_lr": 1e-9}),
    ],
    ids=["plain", "blend", "bf16", "loud", "loudest", "hardly a step"],
)
def test_kernels_are_their_definition(config: Config, check: Any) -> None:
    assert causes(check, Trainer(config)) == []


def test_a_loss_kernel_with_a_wrong_value_or_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.cov_nmse
    for wrong in (
        lambda factor, **more: 1.01 * right(factor, **more),
        lambda factor, **more: right(Backward.apply(factor, lambda grad: grad.roll(1, 1)), **more),
    ):
        monkeypatch.setattr(loss, "cov_nmse", wrong)
        assert causes(check_kernels.loss_kernel, Trainer(small("backprojection"))) == ["kernel_differs"]


def test_a_feature_kernel_with_wrong_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_kernels.pursuit_features
    monkeypatch.setattr(check_kernels, "pursuit_features", lambda *given: tuple(1.1 * each for each in right(*given)))
    assert causes(check_kernels.feature_kernel, Trainer(small("backprojection"))) == ["kernel_differs"]


def test_an_optimizer_kernel_with_wrong_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hasty(check_kernels.FusedAdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.wanted_backend != "reference":
                self._params[0].data.mul_(1.01)

    monkeypatch.setattr(check_kernels, "FusedAdamW", Hasty)
    assert causes(check_kernels.step_kernel, Trainer(small("hybrid"))) == ["kernel_differs"]


# ---- terms, the two losses, the manifest
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", ["hybrid", "backprojection"])
def test_every_term_has_its_derivative(twin: str) -> None:
    config = small(twin, **{"loss.contrast": 0.02, "loss.beta": 0.2, "loss.shrink": 1e-3})
    errors = check_terms.term_errors(PreflightContext(Trainer(config)))
    assert set(errors) == set(Trainer(config).loss.weights) and max(errors.values()) < 1e-4


def test_a_term_with_half_of_its_gradient_is_named_however_small_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    right = terms.orthogonality
    monkeypatch.setattr(terms, "orthogonality", lambda factor: 0.5 * right(factor) + 0.5 * right(factor.detach()))
    (finding,) = check_terms.each_term(PreflightContext(Trainer(small("hybrid", **{"loss.orthogonality": 1e-5}))))
    assert finding.cause == "wrong_backward" and "orthogonality" in finding.evidence


@pytest.mark.parametrize("settings", [{}, {"training.precision": "bf16"}, {"model.options.dropout": 0.3}])
def test_training_and_validation_agree_on_a_batch(settings: dict[str, Any]) -> None:
    assert causes(check_validation.same_loss, Trainer(small("hybrid", **settings))) == []


def test_a_loss_of_its_own_for_validation_is_named() -> None:
    trainer = Trainer(small("hybrid"))
    put(trainer, "loss", CovarianceLoss(Loss(cov=0.9), trainer.config.task))
    assert causes(check_validation.same_loss, trainer) == ["losses_differ"]


def test_scenes_that_are_not_those_of_their_manifest_are_named(tmp_path: Path) -> None:
    config = with_shards(small("hybrid"), tmp_path)
    assert causes(check_scenes.manifest, Trainer(config)) == []
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"]["shards"][0]["statistics"]["channel_rms"] *= 2
    file.write_text(json.dumps(manifest))
    assert causes(check_scenes.manifest, Trainer(config)) == ["manifest_differs"]


# ---- the scenes that are validated
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cause, wrong",
    [
        ("mismatched_channel", lambda scenes: {"channel": scenes.channel.roll(1, 0)}),
        ("shuffled_labels", lambda scenes: {"factor": scenes.factor.roll(1, 0)}),
        ("conjugation_error", lambda scenes: {"factor": scenes.factor * torch.tensor((1.0, -1.0))}),
        ("parts_unrelated", lambda scenes: {"snapshots": torch.randn_like(scenes.snapshots)}),
    ],
)
def test_validation_scenes_that_are_wrong_alone_are_named(cause: str, wrong: Any) -> None:
    trainer = Trainer(small("backprojection"))
    on_batches(trainer, lambda scenes: replace(scenes, **wrong(scenes)), "val")
    (finding,) = scene_parts.physics(PreflightContext(trainer))
    assert finding.cause == cause and finding.certain and "validation scenes" in finding.evidence


# ---- the total
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", ["hybrid", "backprojection"])
@pytest.mark.parametrize(
    "cause, change",
    [
        ("loss_sign", lambda total: -total),
        ("loss_sign", lambda total: 1 - total),
        ("zero_loss_weight", lambda total: 0 * total),
        ("clamped_loss", lambda total: total.clamp(max=0.3)),
        (None, torch.sqrt),
        (None, lambda total: 1e3 * total + 5),
        (None, torch.log),
    ],
)
def test_a_total_that_is_not_made_of_its_terms_is_named(cause: str | None, change: Any, twin: str) -> None:
    trainer = Trainer(small(twin))
    wrap(
        trainer.loss,
        "forward",
        lambda forward: lambda *given: (lambda made, terms: (change(made), terms))(*forward(*given)),
    )
    found = list(check_loss.total(PreflightContext(trainer)))
    assert [(finding.cause, finding.certain) for finding in found] == ([(cause, True)] if cause else [])
    said = [finding.cause for finding in check_gradient.every_tensor(PreflightContext(trainer))]
    assert said == (["clamped_loss"] if cause in ("clamped_loss", "zero_loss_weight") else [])


# ---- what is unusual and learns
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin, settings",
    [("hybrid", {"training.batch_size": 1}), ("backprojection", {"training.batch_size": 1, "training.accumulate": 32})],
)
def test_one_scene_a_batch_is_no_constant_input(twin: str, settings: dict[str, Any]) -> None:
    assert preflight_of(Trainer(small(twin, **settings))) == []


@pytest.mark.parametrize("biases", [False, True])
def test_residual_branches_that_start_at_zero_are_no_mistake(biases: bool) -> None:
    trainer = Trainer(small("backprojection", **{"model.options.depth": 2}))
    for block in trainer.model.blocks:
        torch.nn.init.zeros_(block.outer.weight)
        if biases:
            torch.nn.init.zeros_(block.outer.bias)
    assert preflight_of(trainer) == []


def test_first_weights_of_a_ten_thousandth_are_no_certain_mistake() -> None:
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
def test_settings_that_a_run_survives_are_not_certain_to_stop_it(
    check: Any, settings: dict[str, Any], said: list
) -> None:
    found = {
        finding.cause: finding.certain for finding in check(PreflightContext(Trainer(small("hybrid", **settings))))
    }
    assert list(found.items()) == said


# ---- names that can be true
# ----------------------------------------------------------------------------------------------


def first_of(trainer: Trainer) -> tuple[str, list[str]]:
    said = preflight_of(trainer)
    return said[0], said[1:]


def test_scenes_that_the_network_overwrites_are_named_and_no_ranks() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(
        trainer.network,
        "features",
        lambda features: lambda y, *rest: features(y.mul_(0.5).add_(0.05 * y.abs().mean()), *rest),
    )
    first, others = first_of(trainer)
    assert first == "scenes_altered" and not {"ranks_diverged", "stale_compiled_graph"} & set(others)


def test_scenes_mixed_between_step_and_network_are_mixed_and_not_compiled() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(
        trainer.network, "features", lambda features: lambda y, *rest: features(y[:1].expand_as(y).contiguous(), *rest)
    )
    assert first_of(trainer)[0] == "scenes_mixed"


def test_gradients_cleared_before_the_step_are_no_step_that_is_never_called() -> None:
    trainer = Trainer(small("hybrid"))
    before_step(trainer, lambda: trainer.optimizer.zero_grad(set_to_none=True))
    assert preflight_of(trainer) == ["gradients_cleared_before_step"]


def test_a_loss_that_differs_in_training_is_said_before_its_derivative() -> None:
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


def test_numbers_that_are_not_finite_in_32_bits_are_no_overflow_of_16() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(trainer.network, "features", lambda features: lambda y, *rest: features(0.0 * y, *rest))
    assert "fp16_overflow" not in preflight_of(trainer)


def test_an_average_of_weights_that_do_not_move_is_not_accused() -> None:
    assert "ema_equals_raw" not in preflight_of(
        Trainer(small("hybrid", **{"optimizer.backbone_lr": 1e-9, "optimizer.head_lr": 1e-9}))
    )


def test_differences_are_taken_on_a_second_side_only_where_the_first_disagrees() -> None:
    """|w| at w = 0 has two slopes, and either is a derivative; a slope of neither side is wrong at every step."""

    def error(slope: float, loss: Any) -> tuple[float, int]:
        line = cache(loss)
        apart, size = finite_difference.line_gap((slope, line, 2e-6), check_derivative.STEPS)
        return apart / size, line.cache_info().currsize

    wrong, steps = check_derivative.DISAGREES, len(check_derivative.STEPS)
    assert error(2.0, lambda w: 1.0 + 2.0 * w) == (0.0, 2) and error(-1.0, lambda w: 1.0 + abs(w)) == (0.0, 3)
    assert error(0.5, lambda w: 1.0 + 2.0 * w)[0] > wrong and error(0.5, lambda w: 1.0 + 2.0 * w)[1] == 1 + 2 * steps


def test_outputs_that_are_equal_in_sixteen_bits_are_no_wrong_derivative() -> None:
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
def test_copies_in_the_data_are_a_note(every: int, shown: str) -> None:
    context = PreflightContext(with_copies(Trainer(small("backprojection", **{"data.fixed": True})), every))
    assert (
        list(check_scenes.distinct(context)) == []
        and shown in context.note
        and "copies of others in the data" in context.note
    )


def test_a_number_that_is_served_again_is_no_copy() -> None:
    trainer = Trainer(small("backprojection"))
    wrap(
        trainer.source,
        "batch",
        lambda batch: lambda split, index: batch(split, torch.where(index % 20 == 19, index - 1, index)),
    )
    (finding,) = check_scenes.distinct(PreflightContext(trainer))
    assert finding.cause == "repeated_batch" and finding.certain


@pytest.mark.parametrize("batch", [2, 16])
def test_a_run_on_data_with_copies_is_left_in_peace(batch: int) -> None:
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
    assert "repeated_batch" not in [finding.cause for finding in trainer.observer.watchdog.findings]
    assert any(row["health"]["repeated"] for row in trainer.observer.watchdog.run.steps)
