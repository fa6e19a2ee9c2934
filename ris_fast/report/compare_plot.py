"""The figure of several runs: validation NMSE over scenes, seeds as a mean and a band, beside the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ris_fast.report.baselines import label
from ris_fast.report.drawing import new_figure
from ris_fast.report.plots import draw_baselines, thousands
from ris_fast.report.style import INK, MMSE_BOUND, drawable, limits, log_axes, look, ticks, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_figure(result: Mapping[str, Any]) -> Figure:
    """Validation NMSE over scenes seen: a line for each run; of a group its mean and a band from best to worst.
    Baselines are those of the first run."""
    figure = new_figure(8.4, 5.4)
    axes, runs = figure.subplots(), result["runs"]
    values: list[float] = []
    for index, (name, group) in enumerate(result["groups"].items()):
        curves = [curve for each in group["runs"] if (curve := _drawable(runs[each]["curve"]))]
        values += [y for curve in curves for _, y in curve]
        said = [f"{len(curves)} runs"] * (len(curves) > 1) + ["another task"] * (not _same_task(result, group))
        _draw(axes, curves, f"{name} ({', '.join(said)})" if said else name, index)
    base = next(iter(runs.values()))
    log_axes(axes, "validation NMSE")
    bound = base["mmse_bound"]
    axes.set_ylim(*limits([*values, *base["baselines"].values(), *[bound] * drawable(bound)]))
    draw_baselines(axes, {label(key): value for key, value in base["baselines"].items()})
    if drawable(bound):
        axes.axhline(bound, color=MMSE_BOUND, lw=1.0, ls=":", label=f"MMSE bound {bound:#.3g}", zorder=1)
    ticks(axes)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("training scenes seen", color=INK)
    axes.xaxis.set_major_formatter(thousands)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    best = [
        (group["val_nmse"]["mean"], name)
        for name, group in result["groups"].items()
        if group["val_nmse"]["n"] and _same_task(result, group)
    ]
    title(figure, "best validation NMSE: {1} {0:.3g}".format(*min(best)) if best else "no validation yet")
    return figure


def _same_task(result: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a group has the task of the first run."""
    return result["runs"][group["runs"][0]]["same_task"]


def _draw(axes: Any, curves: Sequence[Sequence[tuple[float, float]]], name: str, index: int) -> None:
    if not curves:
        return
    style = look(index)
    if len(curves) == 1:
        axes.plot(*zip(*curves[0]), color=style.color, ls=style.line, lw=1.7, label=name)
        return
    for curve in curves:
        axes.plot(*zip(*curve), color=style.color, lw=0.6, alpha=0.45)
    scenes, low, mean, high = band(curves)
    axes.fill_between(scenes, low, high, color=style.color, alpha=0.18, lw=0.0)
    axes.plot(scenes, mean, color=style.color, ls=style.line, lw=2.0, label=name)


def band(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Scenes, smallest, mean and largest of several curves where all of them are; between two points by a straight
    line."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    scenes = sorted({x for curve in curves for x, _ in curve if first <= x <= last})
    rows = [[_at(curve, x) for curve in curves] for x in scenes]
    return scenes, [min(row) for row in rows], [fmean(row) for row in rows], [max(row) for row in rows]


def _at(curve: Sequence[tuple[float, float]], x: float) -> float:
    right = next(index for index, point in enumerate(curve) if point[0] >= x)
    (x1, y1), (x0, y0) = curve[right], curve[max(0, right - 1)]
    return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _drawable(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve if drawable(y)]
