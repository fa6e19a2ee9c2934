"""`ris-fast evaluate` with positions: what `predict` finds, scored; several runs side by side; scenes that lack
something."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.commands.evaluate import Search, evaluate
from ris_fast.commands.position_figures import missing_for_positions
from ris_fast.commands.run_folder import RunFolder
from ris_fast.config.load import load_config
from ris_fast.data.open_source import open_source
from ris_fast.inference.predictor import load
from ris_fast.localize.metrics import score
from ris_fast.localize.sources import Sources
from ris_fast.training.trainer import Trainer
from tests.data.make_npz import write_folders
from tests.training.test_trainer import small

FIGURES = ("", "_rmse", "_errors", "_count", "_scene")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = small("data.test_scenes=40")
    Trainer(config, folder, callbacks=[RunFolder(folder, config)]).fit()
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory) -> tuple[dict, list[dict], str]:
    """The record in the run folder, the rows of the CSV file, and the plots folder."""
    table = tmp_path_factory.mktemp("table") / "figures.csv"
    assert main(["evaluate", str(run), "--device", "cpu", "--csv", str(table), "--opponents"]) == 0
    with open(table) as file:
        return json.loads((run / "evaluation.json").read_text()), list(csv.DictReader(file)), str(run / "plots")


def test_positions_are_those_of_predict(run: Path, evaluated) -> None:
    predictor = load(run, device="cpu")
    scenes = open_source(small("data.test_scenes=40"), torch.device("cpu")).batch("test", torch.arange(40))
    found = predictor.predict(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)
    place = (found.azimuth_deg.deg2rad(), found.elevation_deg.deg2rad(), found.range_m, found.power)
    truth = Sources.of_scenes(scenes)
    scores = score(Sources(*(each.nan_to_num() for each in place), found.count), truth)
    whole = evaluated[0]["positions"]["estimators"]["network"]["groups"][0]
    assert whole["matched"] == int(scores.wide.sum()) and whole["true_sources"] == int(truth.count.sum())
    assert whole["metrics"]["precision_wide"] == pytest.approx(int(scores.wide.sum()) / int(found.count.sum()))


def test_opponents_are_scored_on_the_same_scenes_and_are_baselines(evaluated) -> None:
    result = evaluated[0]
    names = ["least_squares", "lmmse", "omp", "blind_likelihood"]
    assert list(result["positions"]["estimators"]) == ["network", *names]
    for each in result["positions"]["estimators"].values():
        assert each["groups"][0]["true_sources"] == sum(
            group["sources"] * group["scenes"] for group in result["by_count"]
        )
        assert sum(map(sum, each["confusion"])) == 40
    assert set(names) < set(result["baselines"]) and 0 < result["baselines"]["blind_likelihood"] < 1


def test_csv_holds_the_figures_of_the_record(evaluated) -> None:
    result, rows, _ = evaluated
    (cell,) = [
        row
        for row in rows
        if (row["estimator"], row["metric"]) == ("omp", "recall_wide")
        and not any(row[name] for name in ("snr_from_db", "sources", "range_from_m"))
    ]
    whole = result["positions"]["estimators"]["omp"]["groups"][0]
    assert float(cell["value"]) == whole["metrics"]["recall_wide"]
    assert [float(cell["low"]), float(cell["high"])] == whole["intervals"]["recall_wide"]
    assert {row["run"] for row in rows} == {"first"}


def test_evaluate_leaves_each_figure_as_png_and_pdf(evaluated) -> None:
    for name in FIGURES:
        for ending in ("png", "pdf"):
            assert (Path(evaluated[2]) / f"evaluate{name}.{ending}").stat().st_size > 1000


def test_no_positions_leaves_them_out(run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluation.json"))
    assert main(["evaluate", str(copy), "--device", "cpu", "--no-positions"]) == 0
    text = capsys.readouterr().out
    assert "Positions" not in text and "mean NMSE" in text
    assert json.loads((copy / "evaluation.json").read_text())["positions"] is None


@pytest.mark.parametrize(
    "old, flags, kept",
    [
        ({"scenes": 40, "positions": None}, ["--scenes", "9"], "more scenes (40, not 9)"),
        ({"scenes": 9, "positions": {"method": "m"}}, [], "positions"),
        ({"scenes": 40, "positions": {"method": "m"}}, ["--scenes", "9"], "positions and more scenes (40, not 9)"),
        ({"scenes": 40, "positions": None}, [], ""),
        ({"of": "another version"}, ["--scenes", "9"], ""),
    ],
)
def test_a_record_is_not_replaced_by_a_lesser_one(
    old: dict, flags: list[str], kept: str, run: Path, tmp_path: Path, capsys
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = copy / "evaluation.json"
    record.write_text(json.dumps(old))
    assert main(["evaluate", str(copy), "--device", "cpu", "--no-positions", *flags]) == 0
    assert (json.loads(record.read_text()) == old) == bool(kept)
    assert (f"note: {record} is left as it was: it has {kept}." in capsys.readouterr().err) == bool(kept)


def test_several_runs_with_plots_leave_their_folders_alone(run: Path, tmp_path: Path, capsys) -> None:
    """Another task of the same seed has the same numbers of sources and SNRs: the note comes from the settings."""
    first, second, plots = tmp_path / "one", tmp_path / "two", tmp_path / "plots"
    for copy in (first, second):
        shutil.copytree(run, copy)
        (copy / "evaluation.json").write_text("{}")
    text = (second / "config.toml").read_text()
    (second / "config.toml").write_text(text.replace("phase_error_deg = 0.0", "phase_error_deg = 20.0"))
    words = ["--device", "cpu", "--no-positions", "--plots", str(plots)]
    assert main(["evaluate", str(first), str(second), *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "two has another task than one (task.phase_error_deg = 20.0, not 0.0)" in said
    assert "Baselines and bounds shown are those of one" in said
    assert [(copy / "evaluation.json").read_text() for copy in (first, second)] == ["{}"] * 2
    record = json.loads((plots / "compare.json").read_text())
    assert [Path(each["run"]).name for each in record["runs"]] == ["one", "two"] and len(record["notes"]) == 1


def test_method_and_count_are_those_of_predict(run: Path) -> None:
    result = evaluate(run, device="cpu", search=Search("music", 1))
    assert "MUSIC" in result["positions"]["method"] and "1 in every scene" in result["positions"]["method"]
    table = result["positions"]["estimators"]["network"]["confusion"]
    assert all(count == 0 for row in table for column, count in enumerate(row) if column != 1)


def test_unknown_method_is_a_usage_error(run: Path, capsys) -> None:
    assert main(["evaluate", str(run), "--device", "cpu", "--method", "musik"]) == 2
    assert "'musik'" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_side_by_side_have_a_column_each(run: Path, tmp_path: Path, capsys) -> None:
    second = tmp_path / "second"
    shutil.copytree(run, second)
    text = (second / "config.toml").read_text()
    plots = tmp_path / "plots"
    assert main(["evaluate", str(run), str(second), "--device", "cpu", "--plots", str(plots)]) == 0
    same = capsys.readouterr().out
    assert "other test scenes" not in same
    rows = [line.split() for line in same.splitlines() if line.startswith("all  ")]
    assert len(rows) >= 5 and all(row[1] == row[2] for row in rows)  # the same run twice, under two names
    assert sorted(path.name for path in plots.glob("*.png")) == [
        f"compare{name}.png" for name in sorted(FIGURES) if name != "_scene"
    ]
    (second / "config.toml").write_text(text.replace("seed = 0", "seed = 7"))
    assert main(["evaluate", str(run), str(second), "--device", "cpu", "--json", "--plots", str(plots)]) == 0
    results = json.loads(capsys.readouterr().out)["runs"]
    assert [Path(each["run"]).name for each in results] == ["first", "second"]
    assert main(["evaluate", str(run), str(second), "--device", "cpu", "--plots", str(plots), "--no-positions"]) == 0
    assert "second has other test scenes than first" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_and_none_is_given_twice(run: Path, tmp_path: Path, capsys) -> None:
    twin = tmp_path / "first"
    shutil.copytree(run, twin)
    words = ["--device", "cpu", "--plots", str(tmp_path / "plots"), "--no-positions"]
    assert main(["evaluate", str(run), str(twin), *words]) == 0
    assert f"{run}: hybrid" in capsys.readouterr().out
    assert main(["evaluate", str(run), str(run), *words]) == 2
    assert "is given twice" in capsys.readouterr().err


def trained_on(data: Path, folder: Path, *more: str) -> Path:
    options = [
        "training.compile=false",
        "task.bs_antennas=4",
        "task.ris_horizontal=6",
        "task.ris_vertical=4",
        "task.snapshots=8",
        "task.max_sources=3",
        f"data.path={json.dumps(str(data))}",
        "training.epochs=1",
        *more,
    ]
    config = load_config(preset="laptop", overrides=options, flags={"training.device": "cpu"})
    Trainer(config, folder, callbacks=[RunFolder(folder, config)]).fit()
    return folder


@pytest.mark.slow
def test_scenes_without_powers_have_positions_but_no_bound(tmp_path: Path, capsys) -> None:
    """The original's element jitter: R is no sum of steering vectors then, and files hold no powers."""
    data = write_folders(tmp_path / "data", jitter=0.2)
    folder = trained_on(data, tmp_path / "run", "model.options.width=16")
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "positions are scored without the Cramer-Rao bound: the test scenes carry no powers of their sources" in text
    metrics = json.loads((folder / "evaluation.json").read_text())["positions"]["estimators"]["network"]["groups"][0][
        "metrics"
    ]
    assert metrics["bound_recall_wide"] is None and metrics["recall_wide"] > 0


def test_scenes_without_positions_are_named(run: Path) -> None:
    scene = open_source(small(), torch.device("cpu")).batch("test", torch.zeros(1, dtype=torch.int64))
    assert missing_for_positions(scene, True) == []
    bare = replace(scene, azimuth=None, elevation=None, range_m=None, power=None)
    assert "carry no positions" in missing_for_positions(bare, False)[0]


@pytest.mark.slow
def test_scenes_without_channel_have_positions_but_no_bound(tmp_path: Path, capsys) -> None:
    data = write_folders(tmp_path / "data", drop=("H_full",))
    options = ("model.name=hybrid", "model.options.inputs='effective_channel'", "model.options.layers=1")
    folder = trained_on(data, tmp_path / "run", *options)
    assert main(["evaluate", str(folder), "--device", "cpu", "--opponents"]) == 0
    assert (
        "without the Cramer-Rao bound and classical estimators: the test scenes carry no channel"
        in capsys.readouterr().out
    )
    positions = json.loads((folder / "evaluation.json").read_text())["positions"]
    assert list(positions["estimators"]) == ["network"] and "MUSIC" in positions["method"]
    metrics = positions["estimators"]["network"]["groups"][0]["metrics"]
    assert metrics["bound_recall_wide"] is None and metrics["recall_wide"] is not None
