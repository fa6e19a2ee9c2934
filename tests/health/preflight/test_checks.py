"""Checks of preflight one by one: silent about healthy trainers of every kind, and each names the mistake it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.faults.healthy import with_shards
from bench.faults.healthy_twins import TWINS
from bench.faults.patches import Backward, on_batches, put, wrap
from ris_fast.config.schema import Config, Loss
from ris_fast.data.manifest import sealed
from ris_fast.health.preflight import gradient as check_gradient
from ris_fast.health.preflight import information as check_information
from ris_fast.health.preflight import kernels as check_kernels
from ris_fast.health.preflight import loss as check_loss
from ris_fast.health.preflight import scene_parts
from ris_fast.health.preflight import scenes as check_scenes
from ris_fast.health.preflight import terms as check_terms
from ris_fast.health.preflight import validation as check_validation
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training import loss
from ris_fast.training import loss_terms as terms
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import at, causes, small

# ---- what a classical estimator makes of the inputs
# --------------------------------------------------------------------


@pytest.mark.parametrize("twin", TWINS)
def test_input_information_beats_the_constant_answer(twin: str) -> None:
    context = PreflightContext(Trainer(TWINS[twin]()))
    assert list(check_information.input_information(context)) == []
    shown, constant = (float(word.rstrip(",")) for word in context.note.split() if word[0].isdigit())
    assert shown < 0.95 * constant


def test_input_information_names_inputs_without_the_channel() -> None:
    (finding,) = check_information.input_information(
        PreflightContext(Trainer(small("few_codes", **{"model.options.inputs": "effective_channel"})))
    )
    assert finding.cause == "inputs_withhold_answer" and not finding.certain


@pytest.mark.parametrize("inputs", ["full", "effective_channel"])
def test_input_information_blames_scenes_that_are_all_noise(inputs: str) -> None:
    settings = {"model.options.inputs": "effective_channel"} if inputs == "effective_channel" else {}
    (finding,) = check_information.input_information(
        PreflightContext(Trainer(small("hybrid", **settings, **at(-60.0))))
    )
    assert finding.cause == "inputs_withhold_answer" and not finding.certain and "scenes themselves" in finding.evidence


@pytest.mark.parametrize("snr_db", [-20.0, -10.0, -1.0])
@pytest.mark.parametrize("twin", ["hybrid", "backprojection"])
def test_input_information_allows_low_snr(twin: str, snr_db: float) -> None:
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
        small("hybrid", **at(120.0)),
        small("hybrid", **{"optimizer.max_grad_norm": 1e-12, "optimizer.backbone_lr": 1e-9}),
    ],
    ids=["plain", "blend", "bf16", "loud", "loudest", "loudest field", "hardly a step"],
)
def test_kernel_checks_pass_every_configuration(config: Config, check: Any) -> None:
    assert causes(check, Trainer(config)) == []


def test_loss_kernel_check_names_a_wrong_value_or_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.cov_nmse
    for wrong in (
        lambda factor, **more: 1.01 * right(factor, **more),
        lambda factor, **more: right(Backward.apply(factor, lambda grad: grad.roll(1, 1)), **more),
    ):
        monkeypatch.setattr(loss, "cov_nmse", wrong)
        assert causes(check_kernels.loss_kernel, Trainer(small("backprojection"))) == ["kernel_differs"]


def test_feature_kernel_check_names_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_kernels.pursuit_features
    monkeypatch.setattr(check_kernels, "pursuit_features", lambda *given: tuple(1.1 * each for each in right(*given)))
    assert causes(check_kernels.feature_kernel, Trainer(small("backprojection"))) == ["kernel_differs"]


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_field_kernel_check_names_wrong_numbers(symbols: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(small("hybrid", **{"task.symbols": symbols}))
    assert causes(check_kernels.field_kernel, trainer) == []
    right = check_kernels.aperture_field
    monkeypatch.setattr(check_kernels, "aperture_field", lambda *given, **more: 1.01 * right(*given, **more))
    assert causes(check_kernels.field_kernel, trainer) == ["kernel_differs"]


def test_step_kernel_check_names_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hasty(check_kernels.FusedAdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.wanted_backend != "reference":
                self.param_groups[0]["params"][0].data.mul_(1.01)

    monkeypatch.setattr(check_kernels, "FusedAdamW", Hasty)
    assert causes(check_kernels.step_kernel, Trainer(small("hybrid"))) == ["kernel_differs"]


# ---- terms, the two losses, the manifest
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", ["hybrid", "backprojection"])
def test_term_errors_are_small_for_every_term(twin: str) -> None:
    config = small(twin, **{"loss.contrast": 0.02, "loss.beta": 0.2, "loss.shrink": 1e-3})
    errors = check_terms.term_errors(PreflightContext(Trainer(config)))
    assert set(errors) == set(Trainer(config).loss.weights) and max(errors.values()) < 1e-4


def test_each_term_names_half_a_gradient_at_any_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    right = terms.orthogonality
    monkeypatch.setattr(terms, "orthogonality", lambda factor: 0.5 * right(factor) + 0.5 * right(factor.detach()))
    (finding,) = check_terms.each_term(PreflightContext(Trainer(small("hybrid", **{"loss.orthogonality": 1e-5}))))
    assert finding.cause == "wrong_backward" and "orthogonality" in finding.evidence


@pytest.mark.parametrize("settings", [{}, {"training.precision": "bf16"}, {"model.options.dropout": 0.3}])
def test_same_loss_passes_a_healthy_trainer(settings: dict[str, Any]) -> None:
    assert causes(check_validation.same_loss, Trainer(small("hybrid", **settings))) == []


def test_same_loss_names_another_loss_in_validation() -> None:
    trainer = Trainer(small("hybrid"))
    put(trainer, "loss", CovarianceLoss(Loss(cov=0.9), trainer.config.task))
    assert causes(check_validation.same_loss, trainer) == ["losses_differ"]


def test_manifest_check_names_scenes_that_differ(tmp_path: Path) -> None:
    config = with_shards(small("hybrid"), tmp_path)
    assert causes(check_scenes.manifest, Trainer(config)) == []
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"]["shards"][0]["statistics"]["channel_rms"] *= 2
    file.write_text(json.dumps(sealed(manifest)))
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
def test_physics_check_names_wrong_validation_scenes(cause: str, wrong: Any) -> None:
    trainer = Trainer(small("backprojection"))
    on_batches(trainer, lambda scenes: replace(scenes, **wrong(scenes)), "val")
    (finding,) = scene_parts.physics(PreflightContext(trainer))
    assert finding.cause == cause and finding.certain and "validation scenes" in finding.evidence


# ---- the total
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", ["hybrid", "backprojection"])
@pytest.mark.parametrize("what", ["as it is", "detached factor", "terms as numbers", "detached, terms as numbers"])
def test_gradient_check_looks_at_the_covariance_terms(twin: str, what: str) -> None:
    """Heads of the hybrid read its factor, so that other terms depend on it where the covariance's do not."""
    trainer = Trainer(small(twin))

    def changed(forward: Callable) -> Callable:
        def run(prediction: Prediction, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
            if "detached" in what:
                prediction = prediction._replace(factor=prediction.factor.detach())
            total, named = forward(prediction, scenes)
            return total, {name: each.detach() for name, each in named.items()} if "numbers" in what else named

        return run

    wrap(trainer.loss, "forward", changed)
    found = causes(check_gradient.connected, trainer)
    assert found == (["detached_loss"] if "detached" in what else [])


@pytest.mark.slow
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
def test_total_check_names_a_total_not_made_of_its_terms(cause: str | None, change: Any, twin: str) -> None:
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
