"""Units and loudness of what the network sees: no healthy configuration is accused, and an input in its own unit is
named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.faults.healthy_twins import changed
from ris_fast.health.preflight import inputs as check_inputs
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.run import run_checks
from ris_fast.models.hybrid import HybridFeatures
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small


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
    assert list(check_inputs.scale(PreflightContext(Trainer(changed(KINDS["hybrid"], at(-60.0)))))) == []


@pytest.mark.slow
@pytest.mark.parametrize("snr_db", [-40.0, 15.0, 70.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_check_passes_every_unit_at_any_snr(kind: str, snr_db: float) -> None:
    config = changed(KINDS[kind], at(snr_db))
    context = PreflightContext(Trainer(config))
    assert list(check_inputs.scale(context)) == []
    before, after = (
        context.answer(replace(context.scenes, snapshots=unit * context.scenes.snapshots))
        for unit in (1.0, check_inputs.UNITS[0])
    )
    assert torch.equal(before, after)  # not a bit changes, so that nothing in the comparison comes of rounding


@pytest.mark.slow
def test_run_checks_find_nothing_at_high_snr() -> None:
    trainer = Trainer(changed(KINDS["backprojection"], at(70.0)))
    assert [finding.cause for result in run_checks(trainer) for finding in result.findings] == []


@pytest.mark.parametrize("what", ["snapshots", "channel"])
def test_scale_check_names_an_input_in_its_own_unit(what: str) -> None:
    """The network's answer turns with the size of one input, as where nothing normalises it."""
    trainer = Trainer(small("hybrid"))
    forward, position = trainer.model.features, ("snapshots", "channel").index(what)

    def features(*inputs: torch.Tensor) -> HybridFeatures:
        size = inputs[position].square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)
        shown = forward(*inputs)
        return shown._replace(re=30.0 * size * shown.re)

    trainer.model.features = features
    trainer.network.features = features
    findings = list(check_inputs.scale(PreflightContext(trainer)))
    assert [finding.cause for finding in findings] == ["input_scale"] and what in findings[0].evidence
