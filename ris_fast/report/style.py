"""What the figures of a run share: colours, log axes that always have numbers, baselines that look like one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#222222", "#dddddd"
TRAIN, RAW, EMA, GRADIENT, MMSE_BOUND = "#9aa7b8", "#d9822b", "#1f5fa8", "#5a7d4f", "#444444"
FLOOR_SHADES = ("#b04a5a", "#8a5fa0", "#4f8a8b", "#a08a4f", "#707070", "#4a6fb0", "#a05f2f", "#3f3f3f")
ONE_LINE = 0.02  # of the axis: what is closer together looks like one line, and is drawn as one band


def drawable(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0.0


def log_axes(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK)
    axes.grid(True, which="major", color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")


def ticks(axes: Axes) -> None:
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


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a log axis that shows all of these, with room above and below."""
    shown = [value for value in values if drawable(value)] or [1.0]
    return min(shown) / 1.3, max(shown) * 1.3


def alike(baselines: Mapping[str, float | Sequence[float]], span: tuple[float, float]) -> list[list[str]]:
    """Names in groups that look like one line on a log axis from span[0] to span[1]; in the order given.

    A baseline that cannot be drawn is in no group.
    """
    apart = ONE_LINE * math.log(span[1] / span[0])
    groups: list[list[str]] = []
    for name, value in baselines.items():
        if not all(map(drawable, _values(value))):
            continue
        near = next((group for group in groups if _distance(baselines[group[0]], value) < apart), None)
        groups.append([name]) if near is None else near.append(name)
    return groups


def _values(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _distance(one: float | Sequence[float], other: float | Sequence[float]) -> float:
    return max(abs(math.log(a / b)) for a, b in zip(_values(one), _values(other)))


@dataclass(frozen=True)
class Look:
    """How one of several series is drawn: told apart by its line and marker where colours are printed in grey."""

    color: str
    marker: str
    line: Any

    @property
    def drawn(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker, "ls": self.line, "ms": 4.5, "lw": 1.5}


LOOKS = (
    Look(EMA, "o", "-"),
    Look(RAW, "s", "--"),
    Look("#2f7d5b", "^", "-."),
    Look("#a03a6a", "D", (0, (5, 1, 1, 1, 1, 1))),
    Look("#6a5acd", "v", (0, (1, 1))),
    Look("#7a6a3a", "P", (0, (6, 2))),
)


def look(index: int) -> Look:
    """The look of series `index`; more of them than there are looks begin anew."""
    return LOOKS[index % len(LOOKS)]


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend under all axes of a figure, with the series of these axes."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, color=INK)


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as its name says, .png or .pdf. Raises StorageError."""
    save_figure(path, figure, 150)
