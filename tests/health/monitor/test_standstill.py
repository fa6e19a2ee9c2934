"""A run that stands still above what its own inputs say is named from its rows; runs that move, or may yet, are not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ris_fast.commands.cli import main
from ris_fast.health.finding import ranked
from ris_fast.health.monitor.history import RunHistory
from ris_fast.health.monitor.rules import replay
from ris_fast.health.monitor.standstill import DEVIATIONS, fitted, stalled_above_inputs

PLANNED = 75_000
BASELINES = {"zero": 1.0, "identity": 0.989, "mean": 0.980, "matched_filter": 0.800}
# preset `original` as it stood: NMSE of each 50 steps of 64 scenes, and the median tensor's move in a step, in 1e-4
RECORDED = [
    float(each)
    for each in """
    1.0227 0.9050 0.8851 0.8773 0.8786 0.8739 0.8740 0.8686 0.8692 0.8726 0.8669 0.8647 0.8732 0.8683
    0.8704 0.8630 0.8671 0.8634 0.8629 0.8628 0.8655 0.8654 0.8694 0.8637 0.8652 0.8621 0.8632 0.8659
    0.8657 0.8637 0.8652 0.8659
    """.split()
]
MOVED = [
    float(each)
    for each in """
    1.1 1.1 1.4 1.8 1.8 2.7 2.7 2.5 2.6 3.9 4.4 4.9 5.4 4.4 4.0 7.3 5.0 13.3 5.9 6.0 5.6 12.3 8.1 9.6
    15.4 13.6 10.8 14.9 11.2 16.3 13.2 12.7
    """.split()
]


def rows_of(
    curve: Callable[[float], float],
    *,
    until: int = 1_600,
    every: int = 50,
    noise: float = 0.003,
    warmup: int = 100,
    ratio: float = 1e-3,
    planned: int = PLANNED,
    batch: int = 64,
    info: dict[str, Any] | None = None,
) -> RunHistory:
    """A run whose training NMSE follows `curve` of the step; `noise` is that of one row, `ratio` what the median tensor
    moves in a step."""
    draw, rows = random.Random(1), []
    for step in range(every, until + 1, every):
        value = curve(step - every / 2) + draw.gauss(0.0, noise)
        rate = 1e-3 * min(1.0, step / warmup)
        rows.append(
            {
                "event": "step",
                "epoch": 1,
                "step": step,
                "scenes_seen": batch * step,
                "planned_steps": planned,
                "lr": {"backbone": rate},
                "train_loss": value,
                "terms": {"cov": {"raw": value, "weighted": value}},
                "health": {"steps": every, "update_ratio": ratio},
            }
        )
    return RunHistory(info={"baselines": BASELINES} | (info or {}), steps=rows)


def recorded(planned: int = PLANNED, warmup: int = 1_500) -> RunHistory:
    """The recorded run, as a part of a run of `planned` steps."""
    run = rows_of(lambda step: RECORDED[int(step // 50)], noise=0.0, planned=planned, warmup=warmup)
    for row, moved in zip(run.steps, MOVED, strict=True):
        row["health"]["update_ratio"] = 1e-4 * moved
    return run


def found(run: RunHistory) -> list[str]:
    return [finding.cause for finding in replay(run) if finding.cause == "stalled_above_inputs"]


def flat(step: float) -> float:
    return 0.858 + 0.2 * math.exp(-step / 30)


# ---- runs that stand still
# -------------------------------------------------------------------------------------------


def test_stalled_above_inputs_names_the_recorded_run_within_100_000_scenes() -> None:
    (finding,) = ranked(replay(recorded()))
    assert (finding.cause, finding.step) == ("stalled_above_inputs", 1_550)
    assert "stands at 0.864" in finding.evidence and "99,200 scenes" in finding.evidence
    assert found(recorded(planned=1_600, warmup=32)) != []


def test_why_names_the_recorded_run_from_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded()
    rows = [{"event": "start", "baselines": BASELINES}, *run.steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["why", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "stalled_above_inputs (outcome, at step 1550, not certain)" in said and "learned" not in said


def test_stalled_above_inputs_names_a_plateau_with_its_figures() -> None:
    (finding,) = ranked(replay(rows_of(flat)))
    assert not finding.certain and finding.severity == "outcome" and finding.step <= 0.02 * PLANNED
    assert "Matched filter on the network's own inputs has 0.8 without" in finding.evidence
    assert "constant answer 0.98" in finding.evidence and f"step {finding.step:,}, " in finding.evidence


@pytest.mark.parametrize(
    "options",
    [{"noise": 0.006}, {"every": 10, "until": 800}, {"planned": 1_600}, {"warmup": 700}],
    ids=["noisy", "dense rows", "to its end", "after its warm-up"],
)
def test_stalled_above_inputs_names_every_plateau(options: dict[str, Any]) -> None:
    assert found(rows_of(flat, **options)) != []


def test_stalled_above_inputs_counts_validation_and_training_figures() -> None:
    """The estimator on the training scenes counts where these are harder."""
    harder = {"training_baselines": {"matched_filter": 0.87}}
    assert found(rows_of(flat)) != [] and found(rows_of(flat, info=harder)) == []
    seen = rows_of(flat)
    below = {"event": "epoch", "epoch": 1, "step": 200, "train_loss": 0.86, "val_nmse_raw": 0.79, "val_nmse_ema": None}
    assert found(replace(seen, epochs=[below])) == []


# ---- runs that do not
# ------------------------------------------------------------------------------------------------

HEALTHY: dict[str, RunHistory] = {
    "falls as a power of the steps": rows_of(lambda step: 1.3 * step**-0.06),
    "falls by the same in every doubling": rows_of(lambda step: 1.02 - 0.015 * math.log2(step)),
    "falls in a line, slowly": rows_of(lambda step: 0.9 - 4e-5 * step),
    "is below": rows_of(lambda step: 0.79),
    "has come near": rows_of(lambda step: 0.803),
    "is in its warm-up": rows_of(flat, warmup=5_000),
    "has hardly moved": rows_of(flat, ratio=1e-4),
    "falls under the noise of small batches": rows_of(lambda step: 1.02 - 0.015 * math.log2(step), noise=0.03),
    "is too noisy to say": rows_of(flat, noise=0.1),
    "has just begun": rows_of(flat, until=150, every=2),
    "has few reports": rows_of(flat, every=200),
    "stood and now falls": rows_of(lambda step: 0.858 - 3e-4 * max(0.0, step - 500), warmup=490),
    "starts from good weights": rows_of(lambda step: 0.07, info={"baselines": {"mean": 0.79, "pursuit": 0.085}}),
    "anneals below a pursuit": rows_of(lambda step: 0.045, info={"baselines": {"mean": 0.79, "pursuit": 0.0256}}),
    "no estimator": rows_of(flat, info={"baselines": {"mean": 0.98}}),
    "inputs that say nothing": rows_of(lambda step: 0.979, info={"baselines": {"mean": 0.98, "matched_filter": 0.97}}),
    "blended": rows_of(flat, info={"blend": 0.3}),
    "loaded": rows_of(flat, info={"loaded": True}),
}


@pytest.mark.parametrize("story", HEALTHY)
def test_stalled_above_inputs_allows_a_run_that(story: str) -> None:
    assert found(HEALTHY[story]) == []


@pytest.mark.parametrize("seed", range(4))
def test_fitted_line_has_the_error_it_says(seed: int) -> None:
    """Of 200 lines through noise about one in three is off by more than a standard deviation, hardly one by three."""
    draw, off = random.Random(seed), []
    weights = [1.0 + 3.0 * (i % 2) for i in range(20)]
    for _ in range(200):
        y = [2.0 - 0.1 * i + draw.gauss(0.0, 0.5 / math.sqrt(w)) for i, w in enumerate(weights)]
        value, error = fitted([float(i) for i in range(20)], y, weights).at(40.0)
        off.append(abs(value + 2.0) / error)
    assert 0.2 < sum(each > 1 for each in off) / 200 < 0.5 and sum(each > DEVIATIONS for each in off) <= 6


def test_with_dropout_only_validation_says_that_a_run_stands_still() -> None:
    """Dropout raises the NMSE of training, and only of training."""
    run = rows_of(flat, info={"dropout": True})
    epoch = {"epoch": 1, "step": 1_600, "train_loss": 0.87, "val_nmse_raw": 0.86, "val_nmse_ema": 0.86}
    assert found(run) == [] and found(rows_of(flat)) != []
    assert [each.cause for each in stalled_above_inputs(replace(run, epochs=[epoch]))] == ["stalled_above_inputs"]
