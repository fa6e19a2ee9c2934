"""Positions for a person: tables of recall, precision, errors and distance from the Cramer-Rao bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ris_fast.localize.groups import of_axis
from ris_fast.localize.matching import NARROW, WIDE
from ris_fast.localize.metrics import MEDIAN_OF_NORMAL, RESOLVABLE
from ris_fast.report.baselines import label as estimator_label
from ris_fast.report.tables import text_table

Groups = Sequence[Mapping[str, Any]]
MARGINS = (("snr_db",), ("sources",), ("range_m",), ())
SHORT = {"azimuth_deg": "az deg", "elevation_deg": "el deg", "range_m": "range m", "position_m": "position m"}
ANGLES_AND_RANGE = {"azimuth": "az", "elevation": "el", "range": "range"}
Columns = Sequence[tuple[str, str]]  # header and metric


def _headed(head: str, metric: str, names: Mapping[str, str]) -> Columns:
    """Columns `metric_NAME`; the first header says what all of them are."""
    return [
        (f"{head} {label}" if not index else label, f"{metric}_{name}")
        for index, (name, label) in enumerate(names.items())
    ]


DETECTION: Columns = (
    (f"recall {WIDE.short}", "recall_wide"),
    ("at the CRB", "bound_recall_wide"),
    ("precision", "precision_wide"),
    (f"recall {NARROW.short}", "recall_narrow"),
    ("at the CRB", "bound_recall_narrow"),
    ("precision", "precision_narrow"),
    ("number right", "count_right"),
)
RMSE, MEDIAN = _headed("RMSE", "rmse", SHORT), _headed("median", "median", SHORT)
RATIO = _headed("RMSE/CRB", "resolvable_rmse_over_crb", ANGLES_AND_RANGE)
BOUND: Columns = (
    ("resolvable", "share_resolvable"),
    ("recall", "resolvable_recall"),
    *RATIO,
    *_headed("all matched: RMSE/CRB", "rmse_over_crb", ANGLES_AND_RANGE),
    *_headed("median/CRB", "median_over_crb", ANGLES_AND_RANGE),
)
BESIDE: Columns = (
    *((header, key) for header, key in DETECTION if "precision_narrow" != key and "bound" not in key),
    *RMSE[:3],
    ("resolvable: recall", "resolvable_recall"),
    *RATIO,
)
SIDE_BY_SIDE = {
    f"recall within {WIDE}": "recall_wide",
    "RMSE of azimuth in degrees": "rmse_azimuth_deg",
    "RMSE of elevation in degrees": "rmse_elevation_deg",
    "RMSE of range in metres": "rmse_range_m",
    "recall of resolvable sources": "resolvable_recall",
    "RMSE of azimuth / CRB, resolvable sources": "resolvable_rmse_over_crb_azimuth",
    "RMSE of range / CRB, resolvable sources": "resolvable_rmse_over_crb_range",
    "share of scenes with the right number of sources": "count_right",
}


def positions_text(positions: Mapping[str, Any]) -> str:
    """The positions of one run: the network's tables, then the other estimators beside it."""
    estimators = positions["estimators"]
    network = next(iter(estimators.values()))
    parts = [
        f"Positions: {positions['method']}.\n" + matching_note(),
        _interval_line(of_axis(network["groups"])[0]),
        _table(network["groups"], DETECTION),
        "Errors of matched sources\n" + _table(network["groups"], (*RMSE, *MEDIAN)),
        f"Errors beside the Cramer-Rao bound. Resolvable: {RESOLVABLE:g} of its standard deviations are within {WIDE};"
        " of the others matching keeps\nlucky estimates only. RMSE/CRB: by the root mean square of the deviations;"
        f" median/CRB: of |error| / ({MEDIAN_OF_NORMAL} sd)\n" + _table(network["groups"], BOUND),
        "Scenes by true (rows) and estimated (columns) number of sources\n" + confusion_table(network["confusion"]),
    ]
    if len(estimators) > 1:
        parts.append("Other estimators on the same scenes\n" + beside(estimators))
    return "\n\n".join(parts)


def beside(estimators: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each estimator (or run): the metrics of all scenes."""
    rows = [
        (
            estimator_label(name),
            *(of_axis(each["groups"])[0]["metrics"][key] for _, key in BESIDE),
            each["milliseconds"],
        )
        for name, each in estimators.items()
    ]
    return text_table(("", *(header for header, _ in BESIDE), "ms a scene"), rows)


def side_by_side(estimators: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each important metric, with a column for each run: by SNR, number of sources and range."""
    return "\n\n".join(f"{label}\n{_columns(estimators, key)}" for label, key in SIDE_BY_SIDE.items())


def _columns(estimators: Mapping[str, Mapping[str, Any]], key: str) -> str:
    rows: dict[str, dict[str, float]] = {}
    for name, each in estimators.items():
        for group in margins(each["groups"]):
            if key in group["metrics"]:
                rows.setdefault(group_label(group), {})[name] = group["metrics"][key]
    return text_table(("", *estimators), [(label, *map(row.get, estimators)) for label, row in rows.items()])


def confusion_table(table: Sequence[Sequence[int]]) -> str:
    return text_table(
        ("", *map(str, range(len(table[0])))), [(str(row + 1), *cells) for row, cells in enumerate(table)]
    )


def margins(groups: Groups) -> list[Mapping[str, Any]]:
    """The groups split by nothing or by one axis, all of them last."""
    return [group for axes in MARGINS for group in of_axis(groups, *axes)]


def group_label(group: Mapping[str, Any]) -> str:
    """`all`, or such as `-5..0 dB, 3 sources, 2..5 m`."""
    parts = []
    if "snr_db" in group:
        parts.append("{:g}..{:g} dB".format(*group["snr_db"]))
    if "sources" in group:
        parts.append(f"{group['sources']} source{'s' * (group['sources'] != 1)}")
    if "range_m" in group:
        parts.append("{:g}..{:g} m".format(*group["range_m"]))
    return ", ".join(parts) or "all"


def matching_note() -> str:
    """Which sources count, and as what."""
    return (
        f"An estimate is matched to at most one source, within {WIDE} of it (columns {WIDE.short}) or {NARROW}; as many"
        " pairs as can be, then the\nnearest. Errors are those of sources matched within the wide tolerance: one that"
        " was missed has none, and counts in recall alone.\nAt the CRB: the recall of"
        " an efficient unbiased estimator, whose errors have the deviations of the deterministic bound."
    )


def _interval_line(whole: Mapping[str, Any]) -> str:
    wanted = {
        "recall": "recall_wide",
        "azimuth RMSE deg": "rmse_azimuth_deg",
        "elevation RMSE deg": "rmse_elevation_deg",
    }
    wanted |= {"range RMSE m": "rmse_range_m", "number right": "count_right"}
    parts = (
        f"{label} {whole['metrics'][key]:.3g} ({low:.3g} .. {high:.3g})"
        for label, key in wanted.items()
        for low, high in [whole["intervals"][key]]
    )
    return "all, with 95 % bootstrap intervals: " + ", ".join(parts)


def _table(groups: Groups, columns: Columns) -> str:
    rows = [
        (group_label(group), group["true_sources"], *(group["metrics"].get(key) for _, key in columns))
        for group in margins(groups)
    ]
    return text_table(("", "sources", *(header for header, _ in columns)), rows)
