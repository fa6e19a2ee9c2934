"""Figures of positions: RMSE beside the Cramer-Rao bound, distribution of errors, confusion of the number of sources.

Each shows one or several estimators, or several runs, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ris_fast.localize.groups import of_axis
from ris_fast.localize.matching import WIDE
from ris_fast.localize.metrics import Scores, chance_within, confusion
from ris_fast.report.baselines import label as label_of
from ris_fast.report.drawing import new_figure
from ris_fast.report.evaluation_plots import snr_label
from ris_fast.report.style import GRID, INK, MMSE_BOUND, drawable, legend_below, limits, log_axes, look, ticks, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"azimuth_deg": "azimuth in degrees", "elevation_deg": "elevation in degrees", "range_m": "range in metres"}
FINEST, POINTS = 1e-3, 200  # of the tolerance, where a curve of errors begins, and the points of one
CELL, SIDE_BY_SIDE = 0.55, 3  # inches of a cell of a confusion matrix, and matrices in a row


def rmse_figure(estimators: Mapping[str, Mapping[str, Any]]) -> Figure:
    """RMSE by SNR, beside the Cramer-Rao bound, both of matched resolvable sources; the first one's with its interval.

    The bound is that of the first one's matched sources. Where it is not known, all matched sources count.
    """
    first = next(iter(estimators.values()))
    known = math.isfinite(of_axis(first["groups"])[0]["metrics"]["resolvable_recall"])
    prefix, which = ("resolvable_", "resolvable") if known else ("", "matched")
    by_snr = {who: of_axis(each["groups"], "snr_db") for who, each in estimators.items()}
    bins = list(dict.fromkeys(snr_label(group) for groups in by_snr.values() for group in groups))
    first_groups = next(iter(by_snr.values()))
    figure = new_figure(9.6, 4.2)
    panels = figure.subplots(1, 3)
    for axes, (name, label) in zip(panels, PANELS.items()):
        for index, (who, groups) in enumerate(by_snr.items()):
            _line(axes, bins, groups, f"{prefix}rmse_{name}", **look(index).drawn, label=label_of(who))
            if not index:
                _interval(axes, bins, groups, f"{prefix}rmse_{name}", look(index).color)
        if known:
            style = {"color": MMSE_BOUND, "lw": 1.5, "ls": ":", "label": "Cramer-Rao bound"}
            _line(axes, bins, first_groups, f"{prefix}crb_{name}", **style)
        log_axes(axes, "")
        edges = [end for group in first_groups for end in group["intervals"][f"{prefix}rmse_{name}"]]
        axes.set_ylim(*limits([*edges, *(float(value) for line in axes.get_lines() for value in line.get_ydata())]))
        ticks(axes)
        axes.set_title(label, fontsize=10, color=INK)
        axes.set_xlabel("SNR in dB", color=INK)
        axes.set_xticks(range(len(bins)), bins, fontsize=8)
    panels[0].set_ylabel(f"RMSE of {which} sources", color=INK)
    legend_below(figure, panels[0])
    return figure


def _interval(axes: Axes, bins: Sequence[str], groups: Sequence[Mapping[str, Any]], metric: str, color: str) -> None:
    known = [(bins.index(snr_label(group)), *group["intervals"][metric]) for group in groups]
    axes.fill_between(*zip(*known), color=color, alpha=0.15, lw=0.0)


def _line(axes: Axes, bins: Sequence[str], groups: Sequence[Mapping[str, Any]], metric: str, **style: Any) -> None:
    values = [group["metrics"][metric] for group in groups]
    at = [bins.index(snr_label(group)) for group in groups]
    axes.plot(at, [value if drawable(value) else math.nan for value in values], **style)


def error_figure(scores: Mapping[str, Scores]) -> Figure:
    """Share of all true sources that are found with an error below x; it ends at the recall within the wide tolerance.

    Dotted: the same of an efficient unbiased estimator, whose errors are as wide as the Cramer-Rao bound.
    """
    figure = new_figure(9.6, 4.2)
    panels = figure.subplots(1, 3, sharey=True)
    for column, (axes, (_, label), widest) in enumerate(zip(panels, PANELS.items(), WIDE)):
        at = np.geomspace(FINEST * widest, widest, POINTS)
        for index, (who, each) in enumerate(scores.items()):
            style = look(index).drawn | {"marker": look(index).marker, "markevery": (8 * index, 50)}
            axes.plot(at, shares_below(each.error[..., column][each.true].abs(), at), **style, label=label_of(who))
        first = next(iter(scores.values()))
        bound = first.bound[first.true]
        if bound.isfinite().any():
            axes.plot(
                at,
                bound_shares(bound[bound.isfinite().all(-1)], column, at),
                color=MMSE_BOUND,
                lw=1.5,
                ls=":",
                label="errors at the Cramer-Rao bound",
            )
        axes.set_xscale("log")
        axes.set_ylim(0.0, 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(True, which="major", color=GRID, lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(label, fontsize=10, color=INK)
        axes.set_xlabel("|error| below", color=INK)
    panels[0].set_ylabel("share of the true sources", color=INK)
    legend_below(figure, panels[0])
    return figure


def shares_below(errors: Tensor, at: np.ndarray) -> np.ndarray:
    """Share of the errors at or below each of `at`; NaN errors are above all of them."""
    values = np.sort(errors.nan_to_num(math.inf).numpy())
    return np.searchsorted(values, at, side="right") / max(1, len(values))


def bound_shares(bound: Tensor, column: int, at: np.ndarray) -> np.ndarray:
    """Expected share of sources with deviations `bound` (S, C) that are within WIDE and, in one coordinate, within each
    of `at`."""
    limits = [[value if column == each else widest for each, widest in enumerate(WIDE)] for value in at]
    return np.array([chance_within(bound, limit).mean().item() for limit in limits])


def count_figure(scores: Mapping[str, Scores]) -> Figure:
    """Share of the scenes with each true number of sources (rows) that are given each number (columns)."""
    tables = {who: confusion(each) for who, each in scores.items()}
    columns, (high, wide) = min(len(tables), SIDE_BY_SIDE), next(iter(tables.values())).shape
    rows = math.ceil(len(tables) / columns)
    figure = new_figure((CELL * wide + 0.8) * columns + 0.3, (CELL * high + 0.9) * rows + 0.4)
    figure.get_layout_engine().set(h_pad=0.09)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (who, table) in zip(panels, tables.items()):
        _confusion(axes, table, who)
    for axes in panels[len(tables) :]:
        axes.remove()
    for axes in panels[: len(tables) : columns]:
        axes.set_ylabel("true number of sources", color=INK)
    title(figure, "share of scenes in %")  # a single matrix has no room for more
    return figure


def _confusion(axes: Axes, table: Tensor, who: str) -> None:
    share = (table / table.sum(1, keepdim=True).clamp_min(1)).numpy()
    axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal")
    for row, column in np.ndindex(share.shape):
        if table[row, column]:
            color = "white" if share[row, column] > 0.55 else INK
            axes.text(column, row, percent(share[row, column]), ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(share.shape[1]))
    axes.set_yticks(range(share.shape[0]), [str(each + 1) for each in range(share.shape[0])])
    axes.set_xlabel("estimated", color=INK)
    right = table.diagonal(1).sum() / table.sum().clamp_min(1)
    axes.set_title(f"{label_of(who)}: {percent(right.item())} % right", fontsize=9, color=INK)


def percent(share: float) -> str:
    """One decimal; 0 for none and 100 for all, but neither for nearly so: <0.1, 99.9."""
    return (
        f"{share:.0%}".rstrip("%") if share in (0, 1) else "<0.1" if share < 0.0005 else f"{min(100 * share, 99.9):.1f}"
    )
