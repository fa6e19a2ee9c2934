"""Tables of positions show the figures they are made of, a row for each group and a column for each run."""

from __future__ import annotations

import csv

import pytest

from ris_fast.commands.position_figures import Found, position_figures
from ris_fast.localize.sources import Sources
from ris_fast.report.evaluation_csv import COLUMNS, write_csv
from ris_fast.report.positions import beside, group_label, margins, positions_text, side_by_side
from tests.localize.made_up import around, some_bound, some_scenes


@pytest.fixture(scope="module")
def positions():
    scenes = some_scenes(200)
    truth = Sources.of_scenes(scenes)
    bound = some_bound(truth)
    estimates = {"network": around(truth, bound), "other": truth}
    return position_figures(
        Found(truth, bound, scenes.snr_db, estimates, {}, {"network": 0.25, "other": 7.5}), "some words"
    )[0]


def cells(table: str, first: str) -> list[str]:
    """Of the row that begins so, what is behind it."""
    (row,) = [line for line in table.splitlines() if line.startswith(first)]
    return row.removeprefix(first).split()


def test_positions_text_says_how_and_which_sources_count(positions) -> None:
    text = positions_text(positions)
    assert text.startswith(
        "Positions: some words.\nAn estimate is matched to at most one source, within 5 deg, 5 deg, 1 m"
    )
    assert "1 deg, 1 deg, 0.3 m" in text and "95 % bootstrap intervals: recall 1 (1 .. 1)" in text
    assert all(
        text.count(f"\n{group_label(group)} ") >= 3 for group in margins(positions["estimators"]["network"]["groups"])
    )


def test_beside_has_a_row_for_each_estimator(positions) -> None:
    table = beside(positions["estimators"])
    assert cells(table, "other")[:3] == ["1", "1", "1"] and cells(table, "other")[-1] == "7.5"
    assert cells(table, "network")[-1] == "0.25"


def test_side_by_side_has_a_column_for_each_run(positions) -> None:
    text = side_by_side(positions["estimators"])
    part = next(each for each in text.split("\n\n") if each.startswith("RMSE of azimuth in degrees"))
    network = positions["estimators"]["network"]["groups"][0]["metrics"]["rmse_azimuth_deg"]
    assert cells(part, "all") == [f"{network:.4g}", "0"]


def test_csv_holds_every_figure_once(positions, tmp_path) -> None:
    nmse = {
        "scenes": 200,
        "nmse": {"mean": 0.3, "median": 0.2},
        "nmse_interval": (0.25, 0.35),
        "baselines": {"zero": 1.0},
        "mmse_bound": None,
    }
    result = {
        **nmse,
        "by_snr": [nmse | {"snr_db": (0.0, 5.0)}],
        "by_count": [nmse | {"sources": 2}],
        "by_snr_and_count": [nmse | {"snr_db": (0.0, 5.0), "sources": 2}],
        "positions": positions,
    }
    write_csv(tmp_path / "table.csv", {"one": result, "two": result | {"positions": None}})
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    keys = [tuple(row[name] for name in COLUMNS if name not in ("value", "low", "high")) for row in rows]
    assert len(set(keys)) == len(keys)
    groups = [group for each in positions["estimators"].values() for group in each["groups"]]
    assert len(rows) == 2 * 4 * 3 + sum(len(group["metrics"]) for group in groups)
    whole = [row for row in rows if row["run"] == "two" and not (row["snr_from_db"] or row["sources"])]
    assert [(row["metric"], row["value"], row["low"]) for row in whole] == [
        ("nmse_mean", "0.3", "0.25"),
        ("nmse_median", "0.2", ""),
        ("nmse_mean", "1.0", ""),
    ]
    cell = next(row for row in rows if row["metric"] == "rmse_range_m" and row["range_from_m"] == "2.0")
    group = next(group for group in groups if "range_m" in group)
    assert (
        any(float(cell["value"]) == each["metrics"]["rmse_range_m"] for each in groups if each.get("range_m")) and group
    )
