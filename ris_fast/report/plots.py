"""The figure of a training: loss against scenes beside the baselines, and the gradient norm."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast.files import METRICS
from ris_fast.report.drawing import new_figure
from ris_fast.report.eventlog import current_rows, read_events
from ris_fast.report.style import (
    EMA,
    FLOOR_SHADES,
    GRADIENT,
    INK,
    RAW,
    TRAIN,
    alike,
    drawable,
    limits,
    log_axes,
    save,
    ticks,
)
from ris_fast.training.callback import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"
MARKED = 40  # points are marked up to this many
SECONDS_BETWEEN_DRAWINGS = 20.0


class PlotReport(Callback):
    """Keeps `plots/loss.png` of a run folder current, at epochs and at the end.

    Drawing takes a good part of a second, so short epochs share a drawing. A resumed run starts from the rows that
    are already in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "plots" / LOSS_PLOT
        self.rows = read_events(folder, skip_broken=True) if (Path(folder) / METRICS).is_file() else []
        self.baselines: Mapping[str, float] = {}
        self.drawn = -math.inf

    def on_train_start(self, info: dict[str, Any]) -> None:
        self.baselines = info.get("baselines", {})
        new_figure(
            1.0, 1.0
        )  # imports matplotlib; an interrupt in the midst of that would spoil the drawing at the run's end

    def on_log(self, row: dict[str, Any]) -> None:
        self.rows.append({"event": "step", **row})

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.rows.append({"event": "epoch", **row})
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def on_train_end(self, summary: dict[str, Any]) -> None:
        self._draw()

    def _draw(self) -> None:
        save(loss_figure(current_rows(self.rows), self.baselines), self.path)
        self.drawn = time.monotonic()


def loss_figure(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> Figure:
    """Training loss, validation NMSE of raw and averaged weights and the baselines; below, the gradient norm."""
    figure = new_figure(8.0, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1.0))
    steps = [row for row in rows if row.get("event") == "step"]
    epochs = [row for row in rows if row.get("event") == "epoch"]
    dot, marker = ("o" if len(each) <= MARKED else "" for each in (steps or epochs, epochs))
    top.plot(*_series(steps or epochs, "train_loss"), color=TRAIN, lw=1.2, marker=dot, ms=3, label="training loss")
    top.plot(*_series(epochs, "val_nmse_raw"), color=RAW, lw=1.4, marker=marker, ms=3, label="validation, raw weights")
    top.plot(
        *_series(epochs, "val_nmse_ema"), color=EMA, lw=2.0, marker=marker, ms=3, label="validation, averaged weights"
    )
    log_axes(top, "NMSE")
    top.set_ylim(*limits([0.4, *baselines.values(), *(y for line in top.get_lines() for y in line.get_ydata())]))
    draw_baselines(top, baselines)
    ticks(top)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    top.set_title(_headline(epochs), loc="left", fontsize=11, color=INK)
    bottom.plot(*_series(steps or epochs, "grad_norm"), color=GRADIENT, lw=1.0, marker=dot, ms=3)
    log_axes(bottom, "gradient\nnorm")
    ticks(bottom)
    bottom.set_xlim(left=0.0)
    bottom.set_xlabel("training scenes seen", color=INK)
    bottom.xaxis.set_major_formatter(thousands)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["scenes_seen"], row[key]) for row in rows if drawable(row.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """A band for baselines that lie within a few percent of each other, a line for the others; the legend has each
    figure."""
    for names, shade in zip(alike(baselines, axes.get_ylim()), FLOOR_SHADES):
        values = [baselines[name] for name in names]
        label = f"baseline{'s' * (len(names) > 1)} " + ", ".join(f"{name} {baselines[name]:#.3g}" for name in names)
        if len(names) > 1:
            axes.axhspan(min(values), max(values), color=shade, alpha=0.25, lw=0.0, zorder=1)
        axes.axhline(min(values), color=shade, lw=1.0, ls="--", label=label, zorder=1)


def _headline(epochs: Sequence[Mapping[str, Any]]) -> str:
    scores = [row[key] for row in epochs for key in ("val_nmse_raw", "val_nmse_ema") if drawable(row.get(key))]
    return f"best validation NMSE {min(scores):.3g}" if scores else "no validation yet"


def thousands(value: float, _: int) -> str:
    return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k" if abs(value) >= 1e3 else f"{value:g}"
