"""Rules are functions of rows: silent about a healthy run, and each says its own cause when its contract is broken."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from ris_fast.health.faults.twins import TWINS
from ris_fast.health.rules import Run, replay
from ris_fast.training.loop import Trainer


class Recorder:
    def __init__(self) -> None:
        self.run = Run()

    def start(self, info: Any) -> None:
        self.run.info = dict(info)

    def step(self, row: Any) -> None:
        self.run.steps.append(deepcopy(dict(row)))

    def epoch(self, row: Any) -> None:
        self.run.epochs.append(deepcopy(dict(row)))

    def finish(self, summary: Any) -> None:
        self.run.summary = dict(summary)


@pytest.fixture(scope="module")
def healthy() -> Run:
    from ris_fast.health.faults.twins import changed

    recorder = Recorder()
    Trainer(changed(TWINS["hybrid"](), {"training.epochs": 3}), observer=recorder).fit()
    return recorder.run


def test_a_healthy_run_is_left_in_peace(healthy: Run) -> None:
    assert healthy.steps and len(healthy.epochs) == 3
    assert all(row["health"]["raw_norm"] > 0 and row["health"]["moved"] == row["health"]["tensors"] for row in healthy.steps[:8])
    assert replay(healthy) == []


STEP_FAULTS = {
    "step_never_called": {"attempted": 0}, "step_called_twice": {"attempted": 2, "steps": 1},
    "gradients_never_cleared": {"left_over": 1.0}, "nonfinite_data": {"nonfinite_scenes": 3},
    "empty_cache_slot": {"zero_scenes": 8}, "repeated_batch": {"repeated": 32}, "eval_mode_in_training": {"asleep": 2},
    "weights_reset": {"moved_before": 5}, "sanitised_gradients": {"raw_nonfinite": 4, "raw_norm": float("nan")},
    "optimizer_state_lost": {"applied": 0}, "learning_rate_too_large": {"update_ratio": 0.9},
}


@pytest.mark.parametrize("cause", STEP_FAULTS)
def test_a_broken_contract_of_a_step_is_named(cause: str, healthy: Run) -> None:
    run = deepcopy(healthy)
    run.steps[4]["health"] |= STEP_FAULTS[cause]
    assert [finding.cause for finding in replay(run)] == [cause]
    assert replay(run)[0].step == run.steps[4]["step"]


@pytest.mark.parametrize("share, cause", [(0.0, "gradients_cleared_before_step"), (0.5, "zeroed_gradients")])
def test_a_gradient_that_changes_on_its_way_is_named(share: float, cause: str, healthy: Run) -> None:
    run = deepcopy(healthy)
    run.steps[3]["grad_norm"] *= share
    assert [finding.cause for finding in replay(run)] == [cause]


@pytest.mark.parametrize("factor, cause", [(2.0, "schedule_per_batch"), (0.5, "schedule_per_epoch")])
def test_a_rate_that_is_not_the_planned_one_is_named(factor: float, cause: str, healthy: Run) -> None:
    run = deepcopy(healthy)
    run.steps[3]["lr"] = {name: factor * rate for name, rate in run.steps[3]["lr"].items()}
    assert [finding.cause for finding in replay(run)] == [cause]


CHANGES = {
    "step_once_per_epoch": lambda now, before: now.update(steps=1),
    "batches_skipped": lambda now, before: now.update(steps=4, groups_read=4),
    "ema_saved_over_raw": lambda now, before: now["around_validation"].update(moved=3),
    "weights_reset": lambda now, before: now["between_epochs"].update(moved=3),
    "train_mode_in_validation": lambda now, before: now["scores"]["raw"].update(asleep=False),
    "cached_validation": lambda now, before: now["scores"]["raw"].update(answers=before["scores"]["raw"]["answers"]),
    "raw_not_validated": lambda now, before: now["scores"]["raw"].update(distance=now["scores"]["ema"]["distance"]),
    "ema_frozen": lambda now, before: now["scores"]["ema"].update(distance=0.0),
    "ema_cold": lambda now, before: now["scores"]["ema"].update(distance=0.01 * now["distance"]),
}


@pytest.mark.parametrize("cause", CHANGES)
def test_a_broken_contract_of_an_epoch_is_named(cause: str, healthy: Run) -> None:
    run = deepcopy(healthy)
    CHANGES[cause](run.epochs[1]["health"], run.epochs[0]["health"])
    assert [finding.cause for finding in replay(run)] == [cause]
