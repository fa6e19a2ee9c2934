"""Draws docs/scene.png: one simulated scene from above, with the parts of y_l = H diag(c_l) x + n in colour.

    python docs/scene.py [FILE]

Element positions, code, sources and covariance are those of ris_fast. Only the base station is moved: it is 100 m away.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.patches import Arc, FancyArrowPatch, Rectangle

from ris_fast import RISArray, SceneGenerator, Scenes, simulate
from ris_fast.config.schema import Task

SCENE, SNAPSHOT = 642_453, 5  # three sources close to the plane of the picture, none in the way of another
FIELD, CODE, CHANNEL, NOISE, INK = "#1f6fb4", "#8e44ad", "#1e8449", "#c0392b", "#222222"
STATION = (-4.2, 2.1)  # where the base station is drawn, metres
Point = tuple[float, float]


def draw(file: str | Path) -> None:
    task = Task()
    scene = simulate(task, torch.tensor([SCENE]), SceneGenerator(seed=0, split="train"))
    figure = Figure(figsize=(10.6, 5.7), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-5.3, 5.3), ylim=(-1.55, 4.15), aspect="equal")
    axes.axis("off")
    for place, range_m in seen_from_above(scene):
        draw_source(axes, place, range_m, RISArray.of(task))
    draw_surface(axes, RISArray.of(task), scene)
    draw_station(axes, task)
    draw_labels(axes, task)
    draw_covariance(figure, scene)
    figure.savefig(file, dpi=150)


def seen_from_above(scene: Scenes) -> list[tuple[Point, float]]:
    """Where each source is, (metres beside, metres in front of the surface), and its range."""
    azimuth, elevation, range_m = (getattr(scene, name)[0] for name in ("azimuth", "elevation", "range_m"))
    beside, ahead = range_m * azimuth.sin() * elevation.cos(), range_m * azimuth.cos() * elevation.cos()
    rows = zip(beside.tolist(), ahead.tolist(), range_m.tolist(), strict=True)
    return [((x, y), r) for x, y, r in rows if r > 0]


def draw_source(axes: Axes, place: Point, range_m: float, array: RISArray) -> None:
    """A source and its wavefronts on their way to the surface, one a wavelength."""
    edge = array.spacing_m * array.horizontal / 2
    left, right = (np.degrees(np.arctan2(-place[1], x - place[0])) for x in (-edge, edge))
    above_surface = Rectangle((-6, 0.1), 12, 6, transform=axes.transData)
    for radius in np.arange(array.wavelength_m, range_m + edge, array.wavelength_m):
        front = Arc(place, 2 * radius, 2 * radius, theta1=left, theta2=right, color=FIELD, lw=1.2, alpha=0.6)
        axes.add_patch(front)
        front.set_clip_path(above_surface)
    arrow(axes, place, (0.0, 0.08), FIELD, 1.6)
    axes.plot(*place, "o", color=FIELD, ms=11)
    style = {"textcoords": "offset points", "ha": "center", "color": FIELD, "fontsize": 11.5}
    axes.annotate(f"{range_m:.1f} m", place, (0, 12), **style)


def draw_surface(axes: Axes, array: RISArray, scene: Scenes) -> None:
    """The elements of one row, each in the colour of its phase in one snapshot."""
    phase = torch.atan2(scene.codes[..., 1], scene.codes[..., 0])[SNAPSHOT, : array.horizontal]
    cell = 0.86 * array.spacing_m
    for x, angle in zip(array.positions()[0][: array.horizontal].tolist(), phase.tolist(), strict=True):
        shade = 0.25 + 0.6 * ((angle / (2 * np.pi)) % 1.0)
        axes.add_patch(Rectangle((x - cell / 2, -0.16), cell, 0.2, facecolor=CODE, alpha=shade, edgecolor=INK, lw=0.8))


def draw_station(axes: Axes, task: Task) -> None:
    """Antennas, the channel that leads to them, and the noise."""
    x, y = STATION
    heights = np.linspace(-0.6, 0.6, task.bs_antennas)
    axes.plot([x, x], [y - 1.15, y + 0.65], color=INK, lw=2.5, solid_capstyle="round")
    axes.hlines(y + heights, x, x + 0.13, color=INK, lw=1.5)
    arrow(axes, (-0.95, 0.12), (x + 0.25, y - 0.05), CHANNEL, 3.0)
    arrow(axes, (x + 0.95, y + 0.95), (x + 0.22, y + 0.4), NOISE, 2.2)


def arrow(axes: Axes, start: Point, end: Point, color: str, width: float) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=20, color=color, lw=width))


def draw_labels(axes: Axes, task: Task) -> None:
    x, y = STATION
    write(axes, (x + 1.05, y + 0.98), "$n$  noise", NOISE, ha="left")
    station = f"base station, 100 m away:\n$M = {task.bs_antennas}$ antennas receive $y_l$"
    write(axes, (x - 0.9, y - 1.3), station, INK, va="top", ha="left")
    write(axes, (-2.3, 1.25), "$H$  channel, known", CHANNEL, ha="left")
    write(axes, (0.0, -0.28), "$c_l$  code: a phase for each element,", CODE, va="top")
    write(axes, (0.0, -0.57), f"changed in each of $L = {task.snapshots}$ snapshots", CODE, va="top")
    surface = f"RIS of {task.ris_horizontal} x {task.ris_vertical} elements, half a\nwavelength apart, seen from above"
    write(axes, (0.0, -0.98), surface, INK, va="top")
    write(axes, (1.0, 3.5), "$x$  field of near-field sources at the\nelements: wavefronts arrive curved", FIELD)
    draw_equation(axes)


def write(axes: Axes, place: Point, text: str, color: str, **options: str) -> None:
    axes.text(*place, text, **{"color": color, "fontsize": 12.5, "ha": "center", "va": "center"} | options)


def draw_equation(axes: Axes) -> None:
    parts = (
        ("$y_l\\;=$", INK),
        ("$H$", CHANNEL),
        ("$\\mathrm{diag}(c_l)$", CODE),
        ("$x$", FIELD),
        ("$+$", INK),
        ("$n$", NOISE),
    )
    boxes = [TextArea(text, textprops={"color": color, "fontsize": 22}) for text, color in parts]
    packed = HPacker(children=boxes, pad=0, sep=7, align="baseline")
    box = AnchoredOffsetbox(
        "upper left", child=packed, frameon=False, bbox_to_anchor=(0.02, 0.985), bbox_transform=axes.transAxes
    )
    axes.add_artist(box)


def draw_covariance(figure: Figure, scene: Scenes) -> None:
    """What is wanted: the covariance of the field; here of one row of elements, real part."""
    row = Task().ris_horizontal
    factor = torch.view_as_complex(scene.factor[0, :row].contiguous())
    covariance = (factor @ factor.mH).real.numpy()
    limit = np.abs(covariance).max()
    inset = figure.add_axes((0.80, 0.085, 0.165, 0.165 * 10.6 / 5.7))
    inset.imshow(covariance, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    inset.set(xticks=[], yticks=[])
    inset.set_title(r"wanted: $R = \Sigma_k\; p_k\, a_k a_k^H$", fontsize=12.5, color=INK, pad=8)
    inset.set_xlabel(f"{row} of its {scene.factor.shape[1]} rows, real part", fontsize=10.5, color=INK)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
