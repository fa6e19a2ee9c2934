"""Rules are functions of rows: silent about a healthy run, and each says its own cause when its contract is broken."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch

from bench.faults.afterwards import through_json
from bench.faults.healthy_twins import TWINS, changed
from ris_fast.health.monitor.history import RunHistory
from ris_fast.health.monitor.rules import replay
from ris_fast.old_names import KEYS, OldNameWarning, current_names
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer


class Recorder(Callback):
    def __init__(self) -> None:
        self.run = RunHistory()

    def on_train_start(self, info: Any) -> None:
        self.run.info = dict(info)

    def on_log(self, row: Any) -> None:
        self.run.steps.append(deepcopy(dict(row)))

    def on_epoch_end(self, row: Any) -> None:
        self.run.epochs.append(deepcopy(dict(row)))

    def on_train_end(self, summary: Any) -> None:
        self.run.summary = dict(summary)


@pytest.fixture(scope="module")
def healthy() -> RunHistory:
    recorder = Recorder()
    Trainer(changed(TWINS["hybrid"](), {"training.epochs": 3}), callbacks=[recorder]).fit()
    return recorder.run


def test_rules_find_nothing_in_a_healthy_run(healthy: RunHistory) -> None:
    assert healthy.steps and len(healthy.epochs) == 3
    assert all(
        row["health"]["raw_norm"] > 0 and row["health"]["moved"] == row["health"]["tensors"]
        for row in healthy.steps[:8]
    )
    assert replay(healthy) == []


def test_current_names_reads_rows_of_earlier_versions(healthy: RunHistory) -> None:
    old = {new: name for name, new in KEYS.items()} | {"in_eval_mode": "asleep"}

    def renamed(row: Any) -> Any:
        return {old.get(key, key): renamed(value) for key, value in row.items()} if isinstance(row, dict) else row

    for row in (healthy.info, *healthy.steps, *healthy.epochs):
        written = json.dumps(renamed(dict(row)), default=lambda value: value.tolist())
        with pytest.warns(OldNameWarning):
            assert current_names(json.loads(written), written, "a run") == through_json(row)


def test_nonfinite_gradients_between_reports_name_the_step() -> None:
    trainer = Trainer(
        changed(TWINS["hybrid"](), {"training.epochs": 3, "report.every_steps": 20, "health.min_applied": 0.5}),
        callbacks=[recorder := Recorder()],
    )
    scale, calls = trainer.optimizer.scale, iter(range(1000))
    trainer.optimizer.scale = lambda loss: scale(loss) * (float("nan") if next(calls) == 12 else 1.0)
    trainer.fit()
    found = replay(recorder.run)
    assert [(finding.cause, finding.certain) for finding in found] == [("nonfinite_gradients", False)]
    assert "1 of the last" in found[0].evidence and "first step 13 in " in found[0].evidence


STEP_FAULTS = {
    "step_never_called": {"attempted": 0},
    "step_called_twice": {"attempted": 2, "steps": 1},
    "gradients_never_cleared": {"residual_grad_norm": 1.0},
    "nonfinite_data": {"nonfinite_scenes": 3},
    "empty_cache_slot": {"zero_scenes": 8},
    "repeated_batch": {"repeated": 32},
    "eval_mode_in_training": {"modules_in_eval_mode": 2},
    "weights_changed_outside": {"moved_before": 5},
    "weights_reset": {"moved_before": 5, "back_to_first": True},
    "sanitised_gradients": {"raw_nonfinite": 4, "raw_norm": float("nan")},
    "optimizer_state_lost": {"applied": 0},
    "learning_rate_too_large": {"update_ratio": 0.9},
}


@pytest.mark.parametrize("cause", STEP_FAULTS)
def test_step_rules_name_a_broken_contract(cause: str, healthy: RunHistory) -> None:
    run = deepcopy(healthy)
    run.steps[4]["health"] |= STEP_FAULTS[cause]
    assert [finding.cause for finding in replay(run)] == [cause]
    assert replay(run)[0].step == run.steps[4]["step"]


@pytest.mark.parametrize(
    "first, size, named", [(1e-6, 1e-3, []), (1e-6, 0.5, []), (0.5, 0.5, ["learning_rate_too_large"])]
)
def test_step_rules_let_weights_that_start_at_zero_move_by_all_of_themselves(
    first: float, size: float, named: list[str], healthy: RunHistory
) -> None:
    run = deepcopy(healthy)
    for row in run.steps:
        row["health"]["weight_norm"] = size * run.info["parameters"] ** 0.5
    run.steps[0]["health"] |= {"update_ratio": 1.0, "weight_norm": first * run.info["parameters"] ** 0.5}
    assert [finding.cause for finding in replay(run)] == named


@pytest.mark.parametrize("share, cause", [(0.0, "gradients_cleared_before_step"), (0.5, "zeroed_gradients")])
def test_step_rules_name_a_gradient_changed_on_its_way(share: float, cause: str, healthy: RunHistory) -> None:
    run = deepcopy(healthy)
    run.steps[3]["grad_norm"] *= share
    assert [finding.cause for finding in replay(run)] == [cause]


RATES = {
    "schedule_per_batch": lambda row, first: 2.0 * row["lr_planned"]["head"],
    "learning_rate_off_plan": lambda row, first: 0.6 * row["lr_planned"]["head"],
    "schedule_per_epoch": lambda row, first: first["lr_planned"]["head"],
    "zero_learning_rate": lambda row, first: 0.0,
}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("cause", RATES)
def test_step_rules_name_a_rate_off_the_plan(cause: str, steps: int, healthy: RunHistory) -> None:
    run = deepcopy(healthy)
    for number, row in enumerate(run.steps):  # a plan that still rises, so that it can be left in every direction
        row["lr_planned"] = row["lr"] = {"head": 1e-3 * (number + 1)}
    row = run.steps[3]
    row["lr"] = {"head": RATES[cause](row, run.steps[0])}
    row["health"] |= {"steps": steps, "attempted": steps}
    found = replay(run)
    assert [finding.cause for finding in found] == [cause] and found[0].step == row["step"]


@pytest.mark.parametrize("factor, expected", [(0.0, [("zero_learning_rate", 20)]), (0.5, [])])
def test_step_rules_name_a_rate_lost_late(factor: float, expected: list[tuple[str, int]]) -> None:
    """A schedule of one's own may halve the rate."""
    trainer = Trainer(
        changed(TWINS["backprojection"](), {"training.epochs": 5, "report.every_steps": 4}),
        callbacks=[recorder := Recorder()],
    )
    schedule = trainer.step.schedule

    def lost(planned: int) -> None:
        schedule(planned)
        for group in trainer.optimizer.param_groups:
            group["lr"] *= factor if trainer.state.step >= 17 else 1.0

    trainer.step.schedule = lost
    trainer.fit()
    assert [(finding.cause, finding.step) for finding in replay(recorder.run)][:1] == expected


def test_preflight_names_a_rate_off_the_plan() -> None:
    from ris_fast.health.preflight.run import run_checks

    trainer, calls = Trainer(TWINS["backprojection"]()), []

    def halved(planned: int) -> None:
        calls.append(planned)
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * 0.37 ** len(calls)

    trainer.step.schedule = halved
    assert [finding.cause for check in run_checks(trainer) for finding in check.findings] == ["learning_rate_off_plan"]


def test_step_rules_allow_replanned_and_resumed_schedules(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Re-planning changes the rate between two steps of one report; a resumed run counts on."""
    config = changed(
        TWINS["backprojection"](), {"training.epochs": 400, "training.max_seconds": 1.5, "report.every_steps": 7}
    )
    with monkeypatch.context() as patch:
        looks = iter(range(10**6))
        patch.setattr("time.monotonic", lambda: 0.005 * next(looks))  # a look at the clock takes five milliseconds
        Trainer(config, callbacks=[recorder := Recorder()]).fit()
    assert len({row["planned_steps"] for row in recorder.run.steps}) > 1 and replay(recorder.run) == []
    short = changed(TWINS["backprojection"](), {"training.epochs": 2, "report.every_steps": 3})
    Trainer(short, tmp_path).fit()
    Trainer(changed(short, {"training.epochs": 4}), tmp_path, [recorder := Recorder()], resume=True).fit()
    assert recorder.run.steps and replay(recorder.run) == []


def test_learning_rate_off_plan_allows_one_late_report(healthy: RunHistory) -> None:
    """As on a GPU: the report of the skip comes when the next step has its rate already; the one after that has the
    right rate."""
    run = deepcopy(healthy)
    run.steps[3]["health"] |= {"skipped": 1}
    for row in run.steps[4:6]:
        row["lr"] = {name: 1.1 * rate for name, rate in row["lr"].items()}
    found = replay(run)
    assert [finding.cause for finding in found] == ["learning_rate_off_plan"] and found[0].step == run.steps[5]["step"]


@pytest.mark.slow
def test_step_rules_ignore_steps_made_before_the_run() -> None:
    config = changed(TWINS["backprojection"](), {"training.epochs": 20})
    trainer = Trainer(config, callbacks=[recorder := Recorder()])
    for _ in range(20):
        trainer.step([trainer.source.batch("train", torch.arange(32))], 1000)
    trainer.fit()
    assert recorder.run.reading["attempted"] == recorder.run.reading["steps"] and replay(recorder.run) == []


CHANGES = {
    "step_once_per_epoch": lambda now, before: now.update(steps=1),
    "batches_skipped": lambda now, before: now.update(steps=4, optimizer_batches=4),
    "ema_saved_over_raw": lambda now, before: now["weight_drift_in_validation"].update(moved=3),
    "weights_changed_outside": lambda now, before: [  # once it may be a callback's, on purpose
        each["weight_drift_between_epochs"].update(moved=3) for each in (now, before)
    ],
    "weights_reset": lambda now, before: now["weight_drift_between_epochs"].update(moved=3, back_to_earlier=True),
    "train_mode_in_validation": lambda now, before: now["scores"]["raw"].update(in_eval_mode=False),
    "cached_validation": lambda now, before: now["scores"]["raw"].update(
        prediction_hash=before["scores"]["raw"]["prediction_hash"]
    ),
    "raw_not_validated": lambda now, before: now["scores"]["raw"].update(distance=now["scores"]["ema"]["distance"]),
    "ema_frozen": lambda now, before: now["scores"]["ema"].update(distance=0.0),
    "ema_cold": lambda now, before: [
        each["scores"]["ema"].update(distance=0.01 * each["distance"]) for each in (now, before)
    ],
}


@pytest.mark.parametrize(
    "modules, certain",
    [
        ({"names": ["drop"], "dropout": ["drop"], "statistics": []}, False),  # as for Monte Carlo dropout
        ({"names": ["drop", "norm"], "dropout": ["drop"], "statistics": ["norm"]}, True),
        ({"names": ["", "drop"], "dropout": ["drop"], "statistics": []}, True),
        ({"names": ["fuse"], "dropout": [], "statistics": []}, True),
    ],
    ids=["a dropout", "statistics too", "the whole network", "nothing that draws"],
)
def test_epoch_rules_doubt_dropouts_that_alone_stay_on(modules: dict, certain: bool, healthy: RunHistory) -> None:
    run = deepcopy(healthy)
    run.epochs[1]["health"]["scores"]["raw"].update(in_eval_mode=False, in_training_mode=modules | {"modules": 9})
    assert [(each.cause, each.certain) for each in replay(run)] == [("train_mode_in_validation", certain)]


@pytest.mark.parametrize("cause", CHANGES)
def test_epoch_rules_name_a_broken_contract(cause: str, healthy: RunHistory) -> None:
    run = deepcopy(healthy)
    CHANGES[cause](run.epochs[1]["health"], run.epochs[0]["health"])
    assert {finding.cause for finding in replay(run)} == {cause}


def test_averages_that_stay_in_part_or_go_back(healthy: RunHistory) -> None:
    """Some tensors of the average stay at the start; and an average that had gone further is not cold."""
    run = deepcopy(healthy)
    run.epochs[1]["health"]["scores"]["ema"]["held"] = 4
    assert replay(run) == []  # once it may be chance
    run.epochs[0]["health"]["scores"]["ema"]["held"] = 4
    (finding,) = replay(run)
    assert finding.cause == "ema_frozen" and "4 tensors" in finding.evidence
    run = deepcopy(healthy)
    now = run.epochs[1]["health"]
    now["scores"]["ema"]["distance"] = 0.01 * now["distance"]
    assert replay(run) == []


def test_cached_validation_allows_moves_that_rounding_hides(healthy: RunHistory) -> None:
    run = deepcopy(healthy)
    now, before = run.epochs[1]["health"], run.epochs[0]["health"]
    CHANGES["cached_validation"](now, before)
    now["scores"]["raw"]["distance"] = before["scores"]["raw"]["distance"] + 1e-7 * now["first_norm"]
    assert replay(run) == []
