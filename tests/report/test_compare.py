"""Several runs side by side: seeds are one group with mean and spread, and what cannot be compared is said."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from matplotlib.image import imread

from ris_fast.commands.cli import main
from ris_fast.commands.compare import compare
from ris_fast.config.load import load_config, render_toml
from ris_fast.report.compare_plot import band, comparison_figure
from ris_fast.report.eventlog import JsonlReport

BASELINES = {"zero": 1.0, "mean": 0.9, "pursuit": 0.02}


def made(folder: Path, scores: list[float], *overrides: str, test: float | None = None, scenes: int = 500) -> Path:
    """A run folder with these validation NMSEs, one an epoch of a thousand scenes."""
    folder.mkdir()
    (folder / "config.toml").write_text(render_toml(load_config(preset="laptop", overrides=overrides)))
    log = JsonlReport(folder)
    log.on_train_start({"parameters": 7, "baselines": BASELINES, "mmse_bound": 0.01})
    for epoch, score in enumerate(scores, start=1):
        row = {"epoch": epoch, "step": 4 * epoch, "scenes_seen": 1000 * epoch, "seconds": 2.0 * epoch}
        log.on_epoch_end({**row, "val_nmse_raw": score, "val_nmse_ema": score * 1.1})
    if not math.isnan(scores[-1]):
        figures = {"verdict": "learned", "seconds": 2.0 * len(scores), "scenes_seen": 1000 * len(scores)}
        log.on_train_end({**figures, "parameters": 7})
    if test is not None:
        (folder / "evaluation.json").write_text(json.dumps({"nmse": {"mean": test}, "scenes": scenes, "source": "s"}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    wide = "model.options.width=512"
    return [
        made(tmp_path / "small-s0", [0.5, 0.30, 0.28], "training.seed=0", test=0.31),
        made(tmp_path / "small-s1", [0.4, 0.20, 0.25], "training.seed=1", test=0.22),
        made(tmp_path / "small-s2", [0.6, 0.24, 0.1], "training.seed=2", "data.seed=5"),
        made(tmp_path / "wide", [0.3, 0.08], wide, "report.plots=false", test=0.1, scenes=200),
    ]


def test_compare_groups_seeds_with_mean_and_spread(runs: list[Path]) -> None:
    result = compare(runs)
    assert {name: group["runs"] for name, group in result["groups"].items()} == {
        "small": ["small-s0", "small-s1", "small-s2"],
        "wide": ["wide"],
    }
    small = result["groups"]["small"]["val_nmse"]
    assert small == {
        "n": 3,
        "mean": pytest.approx((0.28 + 0.2 + 0.1) / 3),
        "sd": pytest.approx(stdev([0.28, 0.2, 0.1])),
        "min": 0.1,
        "max": 0.28,
    }
    assert result["groups"]["wide"]["val_nmse"]["sd"] is None
    assert [run["best_epoch"] for run in result["runs"].values()] == [3, 2, 3, 2]
    assert result["differ"] == {"model.options.width": {"small": None, "wide": 512}}


def test_compare_counts_the_scenes_to_reach_a_figure(runs: list[Path]) -> None:
    found = {name: run["reach"] for name, run in compare(runs, [0.3, 0.15])["runs"].items()}
    assert found["small-s0"] == {"0.3": 2000, "0.15": None} and found["wide"] == {"0.3": 1000, "0.15": 2000}
    assert list(compare(runs)["runs"]["wide"]["reach"]) == ["0.5", "0.2", "0.1"]


def test_compare_says_what_cannot_be_compared(runs: list[Path], tmp_path: Path) -> None:
    others = [
        made(tmp_path / "other", [0.5], "task.snapshots=8"),
        made(tmp_path / "few", [0.5], "data.val_limit=100"),
        made(tmp_path / "broken", [math.nan], "model.options.width=8"),
    ]
    notes = "\n".join(compare([*runs, *others])["notes"])
    assert "other has another task than small-s0 (task.snapshots = 8, not 16)" in notes
    assert "few was validated on other scenes than small-s0 (data.val_limit = 100, not 2000)" in notes
    assert "different test scenes (small-s0 500, small-s1 500, wide 200)" in notes
    assert "small: its runs drew other scenes too (data.seed)" in notes and "small-s2" not in notes
    assert "broken has not come to its end" in notes and "broken has no validation yet" in notes
    title = comparison_figure(compare([*runs, *others])).get_suptitle()
    assert title == "best validation NMSE: wide 0.08"


def test_compare_command_writes_table_figure_and_rows(runs: list[Path], tmp_path: Path, capsys) -> None:
    table, out, names = tmp_path / "runs.csv", tmp_path / "out", list(map(str, runs))
    assert main(["compare", *names, "--csv", str(table), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Over seeds" in text and "note: " in text and "model.options.width  default  512" in text
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["group"] for row in rows] == ["small"] * 3 + ["wide"]
    assert [float(row["val_nmse"]) for row in rows] == [0.28, 0.2, 0.1, 0.08] and rows[1]["training.seed"] == "1"
    assert main(["compare", *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "comparison.json").read_text())
    assert imread(out / "comparison.png").shape[1] == 1260


def test_comparison_figure_draws_a_mean_a_band_and_the_baselines(runs: list[Path]) -> None:
    axes = comparison_figure(compare(runs)).axes[0]
    drawn: dict[str, Any] = {line.get_label(): line for line in axes.get_lines()}
    mean = drawn["small (3 runs)"]
    assert list(mean.get_xdata()) == [1000, 2000, 3000]
    assert list(mean.get_ydata()) == pytest.approx([0.5, 0.74 / 3, 0.63 / 3])
    assert len(axes.collections) == 1 and "MMSE bound 0.0100" in drawn
    assert any(str(label).startswith("baseline") and "pursuit" in str(label) for label in drawn)


def test_band_is_drawn_where_all_curves_are() -> None:
    scenes, low, mean, high = band([[(0.0, 4.0), (10.0, 2.0)], [(5.0, 1.0), (20.0, 0.0)]])
    assert scenes == [5.0, 10.0]
    assert low == pytest.approx([1.0, 2 / 3]) and high == [3.0, 2.0] and mean == pytest.approx([2.0, 4 / 3])
