"""One scene: the spectrum of the network's covariance with its true and found sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ris_fast.localize.sources import Sources
from ris_fast.localize.spectrum_map import SpectrumMap
from ris_fast.report.drawing import new_figure
from ris_fast.report.style import INK, legend_below, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEEPEST_DB = -30.0
TRUE = {"ls": "", "marker": "o", "ms": 12, "mfc": "none", "mec": "white", "mew": 1.8, "label": "true source"}
FOUND = {"ls": "", "marker": "x", "ms": 7, "mec": "#ff7f0e", "mew": 2.0, "label": "found source"}
TICKS_M = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Example(NamedTuple):
    """One scene to look at; sources are of a batch of one."""

    index: int  # of its split
    snr_db: float
    spectrum: SpectrumMap
    truth: Sources
    found: Sources


def scene_figure(example: Example) -> Figure:
    """The spectrum over azimuth and elevation, and over azimuth and range, each the highest along the third axis."""
    spectrum = example.spectrum
    figure = new_figure(9.6, 4.4)
    from matplotlib.patheffects import withStroke

    left, right = figure.subplots(1, 2)
    deepest = max(DEEPEST_DB, float(spectrum.by_range.min()))
    shown = _mesh(left, spectrum.azimuth_deg, spectrum.elevation_deg, spectrum.by_angle, deepest)
    _mesh(right, spectrum.azimuth_deg, spectrum.range_m, spectrum.by_range, deepest)
    outline = [withStroke(linewidth=4.0, foreground=INK)]  # white on the map, seen in the legend too
    for sources, style in ((example.truth, TRUE | {"path_effects": outline}), (example.found, FOUND)):
        azimuth, elevation, range_m = (each[0, : int(sources.count[0])] for each in sources[:3])
        left.plot(azimuth.rad2deg(), elevation.rad2deg(), **style)
        right.plot(azimuth.rad2deg(), range_m, **style)
    left.set_ylabel("elevation in degrees", color=INK)
    right.set_ylabel("range in metres", color=INK)
    right.set_yscale("log")
    low, high = right.get_ylim()
    right.set_yticks([each for each in TICKS_M if low <= each <= high])
    right.yaxis.set_minor_formatter(lambda value, _: "")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.set_xlabel("azimuth in degrees", color=INK)
    bar = figure.colorbar(shown, ax=[left, right], pad=0.01)
    bar.set_label("MUSIC spectrum in dB", color=INK)
    legend_below(figure, left)
    count = int(example.truth.count[0])
    title(figure, f"test scene {example.index}: {count} source{'s' * (count != 1)} at {example.snr_db:.1f} dB")
    return figure


def _mesh(axes: Axes, x: Tensor, y: Tensor, values: Tensor, deepest: float) -> Any:
    return axes.pcolormesh(x, y, values, vmin=deepest, vmax=0.0, cmap="viridis", shading="nearest", rasterized=True)
