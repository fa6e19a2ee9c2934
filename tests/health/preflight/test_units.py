"""Units and loudness of what the network sees: no healthy configuration is accused, and an input in its own unit is
named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bench.faults.healthy_twins import changed
from ris_fast.config.schema import Task
from ris_fast.health.preflight import input_scale, modes
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.run import run_checks
from ris_fast.models.hybrid import HybridFeatures
from ris_fast.models.prediction import Prediction
from ris_fast.models.starting_point import BeamNet
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small
from tests.health.preflight.test_scene_evidence import said


def at(snr_db: float) -> dict[str, float]:
    """Every scene at this SNR; the two limits in the order in which neither passes the other."""
    limits = {"task.snr_min_db": snr_db, "task.snr_max_db": snr_db}
    return dict(sorted(limits.items(), reverse=snr_db < 0))


STANDARD = {
    "task.ris_horizontal": 12,
    "task.ris_vertical": 12,
    "task.bs_antennas": 16,
    "task.snapshots": 16,
    "task.max_sources": 5,
    "task.power": "path_loss",
}  # sizes at which rounding alone changes a pursuit of loud scenes
KINDS = {
    "backprojection": small("backprojection", **STANDARD),
    "hybrid": small("hybrid", **STANDARD),
    "effective_channel": small("hybrid", **STANDARD, **{"model.options.inputs": "effective_channel"}),
}


def test_scale_check_allows_inputs_small_by_snr() -> None:
    assert list(input_scale.scale(PreflightContext(Trainer(changed(KINDS["hybrid"], at(-60.0)))))) == []


@pytest.mark.slow
@pytest.mark.parametrize("snr_db", [-40.0, 15.0, 70.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_check_passes_every_unit_at_any_snr(kind: str, snr_db: float) -> None:
    config = changed(KINDS[kind], at(snr_db))
    context = PreflightContext(Trainer(config))
    assert list(input_scale.scale(context)) == []
    before, after = (
        context.answer(replace(context.scenes, snapshots=unit * context.scenes.snapshots))
        for unit in (1.0, input_scale.UNITS[0])
    )
    assert torch.equal(before, after)  # not a bit changes, so that nothing in the comparison comes of rounding


@pytest.mark.slow
def test_run_checks_find_nothing_at_high_snr() -> None:
    trainer = Trainer(changed(KINDS["backprojection"], at(70.0)))
    assert [finding.cause for result in run_checks(trainer) for finding in result.findings] == []


@pytest.mark.parametrize("what", ["snapshots", "channel"])
@pytest.mark.parametrize("rms, expected", [(1.0, []), (20.0, [("input_scale", False)])])
def test_scale_check_names_an_input_in_its_own_unit_that_is_far_from_one(
    what: str, rms: float, expected: list[tuple[str, bool]]
) -> None:
    """What is divided by a constant of the data follows its unit as well, and is no mistake."""
    trainer = Trainer(small("hybrid"))
    forward, position = trainer.model.features, ("snapshots", "channel").index(what)
    context = PreflightContext(trainer)
    usual = getattr(context.scenes, what).square().mean().sqrt()

    def features(*inputs: torch.Tensor) -> HybridFeatures:
        size = inputs[position].square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)
        shown = forward(*inputs)
        return shown._replace(re=rms / usual * size * shown.re)

    trainer.model.features = features
    trainer.network.features = features
    findings = list(input_scale.scale(context))
    assert [(finding.cause, finding.certain) for finding in findings] == expected
    assert all(what in finding.evidence for finding in findings)


class Beside(nn.Module):
    """A branch that sees what `prepare`, a function or a layer, makes of snapshots (B, 2 L M) of rms 0.002."""

    def __init__(self, task: Task, prepare: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.beams, self.prepare = BeamNet(task, 16, 1), prepare
        self.layer = nn.Linear(2 * task.snapshots * task.bs_antennas, 1)

    def forward(self, *inputs: torch.Tensor) -> Prediction:
        gain = self.layer(self.prepare(0.01 * inputs[0].flatten(1))).tanh()[:, :, None, None]
        factor = self.beams(*inputs).factor
        return Prediction(torch.cat((factor[:, :, :1] * (1 + 9 * gain), factor[:, :, 1:]), 2))


class Loud(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.norm(1e7 * y)


SIZE = 2 * 8 * 4  # of the snapshots


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda: lambda y: 30 * y, []),
        (lambda: lambda y: torch.asinh(100 * y), []),
        (lambda: lambda y: (100 * y).clamp(-3, 3), []),
        (lambda: nn.BatchNorm1d(SIZE), []),
        (lambda: Loud(nn.LayerNorm(SIZE)), []),
        (lambda: lambda y: y / (y.square().mean(1, keepdim=True).sqrt() + 0.1), [("epsilon_swallows_signal", True)]),
        (lambda: lambda y: 1e6 * y, [("input_scale", True)]),
        (lambda: lambda y: y, [("input_scale", False)]),
    ],
    ids=["constant", "asinh", "clamp", "batch norm", "layer norm", "epsilon", "loud", "raw"],
)
def test_scale_check_looks_at_what_layers_are_given(prepare: Any, expected: list[tuple[str, bool]]) -> None:
    config = small("backprojection", **{"task.snapshots": 8, "task.bs_antennas": 4})
    trainer = Trainer(config, model=Beside(config.task, prepare()))
    assert said(input_scale.scale, trainer) == expected
    assert said(modes.randomness, trainer) == []
