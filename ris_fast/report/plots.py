"""Figures of a run: loss against scenes beside the baselines, and the evaluation by SNR and number of sources."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast.files import METRICS, save_figure
from ris_fast.report.drawing import new_figure
from ris_fast.report.eventlog import current_rows, read_events
from ris_fast.training.callback import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"
INK, GRID = "#222222", "#dddddd"
TRAIN, RAW, EMA, GRADIENT, MMSE_BOUND = "#9aa7b8", "#d9822b", "#1f5fa8", "#5a7d4f", "#444444"
FLOOR_SHADES = ("#b04a5a", "#8a5fa0", "#4f8a8b", "#a08a4f", "#707070")
MARKED = 40  # points are marked up to this many
SECONDS_BETWEEN_DRAWINGS = 20.0
ONE_LINE = 0.02  # of the axis: what is closer together looks like one line, and is drawn as one band


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


def save(figure: Figure, path: str | Path) -> None:
    save_figure(path, figure, 150)


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
    _axes(top, "NMSE")
    top.set_ylim(*_limits([0.4, *baselines.values(), *(y for line in top.get_lines() for y in line.get_ydata())]))
    _baselines(top, baselines)
    _ticks(top)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    top.set_title(_headline(epochs), loc="left", fontsize=11, color=INK)
    bottom.plot(*_series(steps or epochs, "grad_norm"), color=GRADIENT, lw=1.0, marker=dot, ms=3)
    _axes(bottom, "gradient\nnorm")
    _ticks(bottom)
    bottom.set_xlim(left=0.0)
    bottom.set_xlabel("training scenes seen", color=INK)
    bottom.xaxis.set_major_formatter(_thousands)
    return figure


def evaluation_figure(result: Mapping[str, Any]) -> Figure:
    """NMSE by SNR and by number of sources, mean and median, beside the baselines and the MMSE bound."""
    figure = new_figure(9.0, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _groups(
        left,
        result["by_snr"],
        [f"{low:g}..{high:g}" for low, high in (g["snr_db"] for g in result["by_snr"])],
        "SNR in dB",
    )
    _groups(right, result["by_count"], [str(g["sources"]) for g in result["by_count"]], "sources in the scene")
    for axes, label in ((left, "NMSE on the test scenes"), (right, "")):
        _axes(axes, label)
        _ticks(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(
        f"{result['model']}: mean NMSE {result['nmse']['mean']:.3g}, median {result['nmse']['median']:.3g} "
        f"on {result['scenes']:,} test scenes",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    return figure


def _groups(axes: Axes, groups: Sequence[Mapping[str, Any]], names: Sequence[str], label: str) -> None:
    at = range(len(groups))
    baselines = {
        name: [group["baselines"][name] for group in groups] for name in (groups[0]["baselines"] if groups else ())
    }
    span = _limits([value for group in groups for value in (*group["baselines"].values(), *group["nmse"].values())])
    for together, shade in zip(alike(baselines, span), FLOOR_SHADES):
        low, high = ([edge(values) for values in zip(*(baselines[name] for name in together))] for edge in (min, max))
        axes.fill_between(at, low, high, color=shade, alpha=0.25, lw=0.0)
        axes.plot(at, low, color=shade, lw=1.0, ls="--", marker="_", label=" / ".join(together))
    axes.plot(
        at, [group["nmse"]["mean"] for group in groups], color=EMA, lw=2.0, marker="o", ms=4, label="network, mean"
    )
    axes.plot(
        at,
        [group["nmse"]["median"] for group in groups],
        color=RAW,
        lw=1.4,
        marker="s",
        ms=3.5,
        label="network, median",
    )
    if all(group.get("mmse_bound") is not None for group in groups):
        axes.plot(
            at,
            [group["mmse_bound"] for group in groups],
            color=MMSE_BOUND,
            lw=1.4,
            ls=":",
            label="MMSE bound, estimated",
        )
    axes.set_xticks(list(at), names)
    axes.set_xlabel(label, color=INK)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["scenes_seen"], row[key]) for row in rows if _drawable(row.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def _drawable(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0.0


def _axes(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK)
    axes.grid(True, which="major", color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")


def _ticks(axes: Axes) -> None:
    """Numbers on a log axis whatever it spans: even steps within a decade, then 1, 2, 5, then powers of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    few, many = (
        MaxNLocator(4, min_n_ticks=2),
        LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,), numticks=12),
    )
    axes.yaxis.set_major_locator(few if high / low < 8.0 else many)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a log axis that shows all of these, with room above and below."""
    shown = [value for value in values if _drawable(value)] or [1.0]
    return min(shown) / 1.3, max(shown) * 1.3


def alike(baselines: Mapping[str, float | Sequence[float]], span: tuple[float, float]) -> list[list[str]]:
    """Names in groups that look like one line on a log axis from span[0] to span[1]; in the order given.

    A baseline that cannot be drawn is in no group.
    """
    apart = ONE_LINE * math.log(span[1] / span[0])
    groups: list[list[str]] = []
    for name, value in baselines.items():
        if not all(map(_drawable, _values(value))):
            continue
        near = next((group for group in groups if _distance(baselines[group[0]], value) < apart), None)
        groups.append([name]) if near is None else near.append(name)
    return groups


def _values(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _distance(one: float | Sequence[float], other: float | Sequence[float]) -> float:
    return max(abs(math.log(a / b)) for a, b in zip(_values(one), _values(other)))


def _baselines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """A band for baselines that lie within a few percent of each other, a line for the others; the legend has each
    figure."""
    for names, shade in zip(alike(baselines, axes.get_ylim()), FLOOR_SHADES):
        values = [baselines[name] for name in names]
        label = f"baseline{'s' * (len(names) > 1)} " + ", ".join(f"{name} {baselines[name]:#.3g}" for name in names)
        if len(names) > 1:
            axes.axhspan(min(values), max(values), color=shade, alpha=0.25, lw=0.0, zorder=1)
        axes.axhline(min(values), color=shade, lw=1.0, ls="--", label=label, zorder=1)


def _headline(epochs: Sequence[Mapping[str, Any]]) -> str:
    scores = [row[key] for row in epochs for key in ("val_nmse_raw", "val_nmse_ema") if _drawable(row.get(key))]
    return f"best validation NMSE {min(scores):.3g}" if scores else "no validation yet"


def _thousands(value: float, _: int) -> str:
    return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k" if abs(value) >= 1e3 else f"{value:g}"
