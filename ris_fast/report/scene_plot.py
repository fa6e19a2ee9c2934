"""One scene: the spectrum of the network's covariance with its true and found sources."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ris_fast.localize.angle_map import AngleMap
from ris_fast.localize.sources import Sources
from ris_fast.report.drawing import new_figure
from ris_fast.report.style import GRID, INK, legend_below, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEEPEST_DB = -30.0
DEGREES = 180.0 / math.pi
TICKS_M = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
TRUE = {"ls": "", "marker": "o", "ms": 12, "mfc": "none", "mec": "white", "mew": 1.8, "label": "true source"}
FOUND = {"ls": "", "marker": "x", "ms": 7, "mec": "#ff7f0e", "mew": 2.0, "label": "found source"}


class Example(NamedTuple):
    """One scene to look at; sources are of a batch of one, everything on the CPU."""

    index: int  # of its split
    snr_db: float
    spectrum: AngleMap
    truth: Sources
    found: Sources


def scene_figure(example: Example) -> Figure:
    """The spectrum over azimuth and elevation, the highest over range, and the sources over azimuth and range."""
    from matplotlib.patheffects import withStroke

    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1.0))
    azimuth, elevation, level, _ = example.spectrum
    decibel = 10.0 * (level / level.max()).log10()
    shown = left.pcolormesh(
        azimuth.rad2deg().numpy(),
        elevation.rad2deg().numpy(),
        decibel.numpy(),
        vmin=max(DEEPEST_DB, decibel.min().item()),
        vmax=0.0,
        cmap="viridis",
        shading="nearest",
        rasterized=True,
    )
    outline = [withStroke(linewidth=4.0, foreground=INK)]  # white on the map, seen on paper too
    for sources, style in ((example.truth, TRUE | {"path_effects": outline}), (example.found, FOUND)):
        count = int(sources.count[0])
        across, up, away = (each[0, :count].numpy() for each in (sources.azimuth, sources.elevation, sources.range_m))
        left.plot(across * DEGREES, up * DEGREES, **style)
        right.plot(across * DEGREES, away, **style)
    figure.colorbar(shown, ax=left, pad=0.01).set_label("MUSIC spectrum in dB", color=INK)
    left.set_ylabel("elevation in degrees", color=INK)
    right.set_ylabel("range in metres", color=INK)
    right.set_xlim(left.get_xlim())
    right.set_yscale("log")
    low, high = right.get_ylim()
    right.set_ylim(low / 1.3, high * 1.3)
    right.set_yticks([each for each in TICKS_M if low / 1.3 <= each <= high * 1.3])
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.yaxis.set_minor_formatter(lambda value, _: "")
    right.grid(True, color=GRID, lw=0.7)
    right.set_axisbelow(True)
    for axes in (left, right):
        axes.set_xlabel("azimuth in degrees", color=INK)
    legend_below(figure, left)
    count = int(example.truth.count[0])
    title(figure, f"test scene {example.index}: {count} source{'s' * (count != 1)} at {example.snr_db:.1f} dB")
    return figure
