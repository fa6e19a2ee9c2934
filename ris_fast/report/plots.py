"""Figures of a run: loss against scenes beside the floors, and the evaluation by SNR and number of sources.

Drawn with matplotlib's object interface: no window, no global figure, no state left behind.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ris_fast.files import save_figure
from ris_fast.report.eventlog import METRICS, current_rows, read_events

LOSS_PLOT = "loss.png"
INK, GRID = "#222222", "#dddddd"
TRAIN, RAW, EMA, GRADIENT, BAYES = "#9aa7b8", "#d9822b", "#1f5fa8", "#5a7d4f", "#444444"
FLOOR_SHADES = ("#b04a5a", "#8a5fa0", "#4f8a8b", "#a08a4f", "#707070")
MARKED = 40                       # points are marked up to this many
SECONDS_BETWEEN_DRAWINGS = 20.0


class PlotReport:
    """Observer that keeps `plots/loss.png` of a run folder current, at epochs and at the end.

    Drawing takes a good part of a second, so short epochs share a drawing. A resumed run starts from the rows that
    are already in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "plots" / LOSS_PLOT
        self.rows = read_events(folder, skip_broken=True) if (Path(folder) / METRICS).is_file() else []
        self.floors: Mapping[str, float] = {}
        self.drawn = -math.inf

    def start(self, info: Mapping[str, Any]) -> None:
        self.floors = info.get("floors", {})

    def step(self, row: Mapping[str, Any]) -> None:
        self.rows.append({"event": "step", **row})

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append({"event": "epoch", **row})
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._draw()

    def _draw(self) -> None:
        save(loss_figure(current_rows(self.rows), self.floors), self.path)
        self.drawn = time.monotonic()


def save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    save_figure(path, figure, 150)


def loss_figure(rows: Sequence[Mapping[str, Any]], floors: Mapping[str, float]) -> Figure:
    """Training loss, validation NMSE of raw and averaged weights and the floors; below, the gradient norm."""
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1.0))
    steps = [row for row in rows if row.get("event") == "step"]
    epochs = [row for row in rows if row.get("event") == "epoch"]
    dot, marker = ("o" if len(each) <= MARKED else "" for each in (steps or epochs, epochs))
    top.plot(*_series(steps or epochs, "train_loss"), color=TRAIN, lw=1.2, marker=dot, ms=3, label="training loss")
    top.plot(*_series(epochs, "val_nmse_raw"), color=RAW, lw=1.4, marker=marker, ms=3, label="validation, raw weights")
    top.plot(*_series(epochs, "val_nmse_ema"), color=EMA, lw=2.0, marker=marker, ms=3,
             label="validation, averaged weights")
    _axes(top, "NMSE", log=True)
    _floors(top, floors)
    top.set_ylim(bottom=min(top.get_ylim()[0], 0.4))
    top.legend(loc="center right", frameon=False, fontsize=9)
    top.set_title(_headline(epochs), loc="left", fontsize=11, color=INK)
    bottom.plot(*_series(steps or epochs, "grad_norm"), color=GRADIENT, lw=1.0, marker=dot, ms=3)
    _axes(bottom, "gradient\nnorm", log=True)
    bottom.set_xlim(left=0.0)
    bottom.set_xlabel("training scenes seen", color=INK)
    bottom.xaxis.set_major_formatter(FuncFormatter(_thousands))
    return figure


def evaluation_figure(result: Mapping[str, Any]) -> Figure:
    """NMSE by SNR and by number of sources, mean and median, beside the floors and the Bayes line."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _groups(left, result["by_snr"], [f"{low:g}..{high:g}" for low, high in (g["snr_db"] for g in result["by_snr"])],
            "SNR in dB")
    _groups(right, result["by_count"], [str(g["sources"]) for g in result["by_count"]], "sources in the scene")
    _axes(left, "NMSE on the test scenes", log=True)
    _axes(right, "", log=True)
    left.legend(loc="best", frameon=False, fontsize=8)
    figure.suptitle(f"{result['model']}: mean NMSE {result['nmse']['mean']:.3f}, median {result['nmse']['median']:.3f} "
                    f"on {result['scenes']:,} test scenes", x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _groups(axes: Axes, groups: Sequence[Mapping[str, Any]], names: Sequence[str], label: str) -> None:
    at = range(len(groups))
    for (floor, shade) in zip(groups[0]["floors"] if groups else (), FLOOR_SHADES):
        axes.plot(at, [group["floors"][floor] for group in groups], color=shade, lw=1.0, ls="--", label=floor)
    axes.plot(at, [group["nmse"]["mean"] for group in groups], color=EMA, lw=2.0, marker="o", ms=4, label="network, mean")
    axes.plot(at, [group["nmse"]["median"] for group in groups], color=RAW, lw=1.4, marker="s", ms=3.5, label="network, median")
    if all(group.get("bayes") is not None for group in groups):
        axes.plot(at, [group["bayes"] for group in groups], color=BAYES, lw=1.4, ls=":", label="Bayes, estimated")
    axes.set_xticks(list(at), names)
    axes.set_xlabel(label, color=INK)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["scenes_seen"], row[key]) for row in rows if _drawable(row.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def _drawable(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0.0


def _axes(axes: Axes, label: str, *, log: bool) -> None:
    axes.set_ylabel(label, color=INK)
    axes.grid(True, which="major", color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _floors(axes: Axes, floors: Mapping[str, float]) -> None:
    """Floors lie within a few percent of each other, so each line carries its figure in the legend."""
    for (name, value), shade in zip(floors.items(), FLOOR_SHADES):
        if _drawable(value):
            axes.axhline(value, color=shade, lw=1.0, ls="--", label=f"floor {name}, {value:.3f}", zorder=1)


def _headline(epochs: Sequence[Mapping[str, Any]]) -> str:
    scores = [row[key] for row in epochs for key in ("val_nmse_raw", "val_nmse_ema") if _drawable(row.get(key))]
    return f"best validation NMSE {min(scores):.3f}" if scores else "no validation yet"


def _thousands(value: float, _: int) -> str:
    return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k" if abs(value) >= 1e3 else f"{value:g}"
