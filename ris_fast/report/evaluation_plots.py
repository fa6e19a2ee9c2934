"""NMSE on the test scenes by SNR and number of sources, of one run or several, beside baselines and MMSE bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ris_fast.report.baselines import label as baseline_label
from ris_fast.report.drawing import new_figure
from ris_fast.report.style import (
    FLOOR_SHADES,
    INK,
    MMSE_BOUND,
    RAW,
    alike,
    legend_below,
    limits,
    log_axes,
    look,
    ticks,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = tuple(
    (0, each) for each in ((4, 2), (2, 1), (7, 2), (4, 1, 1, 1), (4, 1, 1, 1, 1, 1), (7, 1, 2, 1), (9, 4), (2, 4))
)
Results = Mapping[str, Mapping[str, Any]]  # by the name of each run


def evaluation_figure(results: Results) -> Figure:
    """The mean of each run, of a single one the median too; baselines and bound are those of the first."""
    figure = new_figure(9.0, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    first = next(iter(results.values()))
    _groups(left, {name: each["by_snr"] for name, each in results.items()}, snr_label)
    _groups(right, {name: each["by_count"] for name, each in results.items()}, lambda group: str(group["sources"]))
    left.set_xlabel("SNR in dB", color=INK)
    right.set_xlabel("sources in the scene", color=INK)
    for axes, label in ((left, "NMSE on the test scenes"), (right, "")):
        log_axes(axes, label)
        ticks(axes)
    legend_below(figure, left)
    means = ", ".join(f"{name} {each['nmse']['mean']:.3g}" for name, each in results.items())
    alone = f"{first['model']}: mean NMSE {first['nmse']['mean']:.3g}, median {first['nmse']['median']:.3g}"
    scenes = f"{first['scenes']:,} test scene{'s' * (first['scenes'] != 1)}"
    title(figure, f"{alone if len(results) == 1 else f'mean NMSE: {means}'} on {scenes}")
    return figure


def snr_label(group: Mapping[str, Any]) -> str:
    return "{:g}..{:g}".format(*group["snr_db"])


def _groups(axes: Axes, runs: Mapping[str, Sequence[Mapping[str, Any]]], name_of: Any) -> None:
    names = list(dict.fromkeys(name_of(group) for groups in runs.values() for group in groups))
    first = next(iter(runs.values()))
    at = [names.index(name_of(group)) for group in first]
    baselines = {
        name: [group["baselines"][name] for group in first] for name in (first[0]["baselines"] if first else ())
    }
    values = [value for groups in runs.values() for group in groups for value in group["nmse"].values()]
    span = limits([*values, *(value for each in baselines.values() for value in each)])
    for together, shade, dashes in zip(alike(baselines, span), FLOOR_SHADES, DASHES):
        low, high = ([edge(each) for each in zip(*(baselines[name] for name in together))] for edge in (min, max))
        axes.fill_between(at, low, high, color=shade, alpha=0.25, lw=0.0)
        names_shown = " / ".join(map(baseline_label, together))
        axes.plot(at, low, color=shade, lw=1.0, ls=dashes, label=names_shown)
    for index, (run, groups) in enumerate(runs.items()):
        here = [names.index(name_of(group)) for group in groups]
        means = [group["nmse"]["mean"] for group in groups]
        axes.plot(here, means, **look(index).drawn | {"lw": 2.0}, label=f"{run}, mean")
    if len(runs) == 1:
        medians = [group["nmse"]["median"] for group in first]
        axes.plot(at, medians, color=RAW, lw=1.4, ls=(0, (4, 1)), marker="s", ms=3.5, label=f"{run}, median")
    if first and all(group.get("mmse_bound") is not None for group in first):
        bound = [group["mmse_bound"] for group in first]
        axes.plot(at, bound, color=MMSE_BOUND, lw=1.4, ls=":", label="MMSE bound, estimated")
    axes.set_xticks(range(len(names)), names)
