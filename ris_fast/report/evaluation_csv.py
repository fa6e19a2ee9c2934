"""An evaluation as a tidy table: one row for each run, estimator, group of scenes or sources, and metric."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ris_fast.files import write_text

COLUMNS = (
    "run",
    "estimator",
    "snr_from_db",
    "snr_to_db",
    "sources",
    "range_from_m",
    "range_to_m",
    "scenes",
    "true_sources",
    "matched",
    "metric",
    "value",
    "low",
    "high",
)
Row = dict[str, Any]


def write_csv(path: str | Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the results of `evaluate`, by the name of each run. What is not known is an empty cell; `low` and `high`
    are the ends of a 95 % bootstrap interval. Raises StorageError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for name, result in results.items():
        writer.writerows({"run": name, **row} for row in (*_nmse_rows(result), *_position_rows(result)))
    write_text(path, text.getvalue())


def _nmse_rows(result: Mapping[str, Any]) -> Iterator[Row]:
    for group in (result, *result["by_snr"], *result["by_count"], *result["by_snr_and_count"]):
        label = _label(group if group is not result else {}) | {"scenes": group["scenes"]}
        low, high = group["nmse_interval"]
        yield label | _cells("network", "nmse_mean", group["nmse"]["mean"]) | {"low": low, "high": high}
        yield label | _cells("network", "nmse_median", group["nmse"]["median"])
        if group["mmse_bound"] is not None:
            yield label | _cells("MMSE bound", "nmse_mean", group["mmse_bound"])
        for baseline, value in group["baselines"].items():
            yield label | _cells(baseline, "nmse_mean", value)


def _position_rows(result: Mapping[str, Any]) -> Iterator[Row]:
    estimators = (result["positions"] or {}).get("estimators", {})
    for name, each in estimators.items():
        for group in each["groups"]:
            label = _label(group) | {key: group[key] for key in ("scenes", "true_sources", "matched")}
            for metric, value in group["metrics"].items():
                low, high = group["intervals"].get(metric, (math.nan, math.nan))
                yield label | _cells(name, metric, value) | _known({"low": low, "high": high})


def _label(group: Mapping[str, Any]) -> Row:
    ends = {"snr_db": ("snr_from_db", "snr_to_db"), "range_m": ("range_from_m", "range_to_m")}
    label = {column: value for key, pair in ends.items() if key in group for column, value in zip(pair, group[key])}
    return label | ({"sources": group["sources"]} if "sources" in group else {})


def _cells(estimator: str, metric: str, value: float) -> Row:
    return {"estimator": estimator, "metric": metric, **_known({"value": value})}


def _known(cells: Row) -> Row:
    return {name: value for name, value in cells.items() if math.isfinite(value)}
