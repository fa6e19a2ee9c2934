"""What a mapping may say of each quantity of a scene: its axes, its units, and what those do to the numbers.

Legend: B rows of a chunk, K sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ris_fast.config.schema import Task

PAIR = "pair"  # an axis of length 2 (re, im)
SCENE = "scene"


@dataclass(frozen=True)
class Quantity:
    """`axes`: after the scene. `units`: accepted ones; the first is the default unless `must` asks for one."""

    axes: tuple[str, ...]
    help: str
    units: tuple[str, ...] = ()
    must: bool = False
    complex: bool = False
    key: str = ""  # its name in the .npz format


QUANTITIES = {
    "snapshots": Quantity(("snapshot", "antenna"), "y, what the antennas received", complex=True, key="y"),
    "channel": Quantity(("antenna", "element"), "H, from the elements to the antennas", complex=True, key="H_full"),
    "effective_channel": Quantity(("snapshot", "antenna"), "H c_l", complex=True, key="H"),
    "codes": Quantity(
        ("snapshot", "element"),
        "c_l, or its phases with unit rad or deg",
        ("complex", "rad", "deg"),
        complex=True,
        key="codes",
    ),
    "azimuth": Quantity(("source",), "of each source", ("rad", "deg"), must=True, key="ptr"),
    "elevation": Quantity(("source",), "of each source", ("rad", "deg"), must=True, key="ptr"),
    "range": Quantity(("source",), "distance of each source", ("m", "cm", "mm", "km"), key="ptr"),
    "power": Quantity(("source",), "of each source; only ratios count", ("linear", "dB", "amplitude"), key="power"),
    "covariance": Quantity(("row", "column"), "R = E x x^H over the elements; any scale", complex=True, key="R"),
    "count": Quantity((), "sources in the scene; without it those with a range", key="K"),
    "snr": Quantity((), "signal over noise, per antenna and snapshot", ("dB", "linear"), must=True, key="snr"),
}
METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "km": 1e3}


def lengths(task: Task) -> dict[str, int]:
    """The length of each axis in the task; of `source` the largest."""
    return {
        "snapshot": task.snapshots,
        "antenna": task.bs_antennas,
        "element": task.elements,
        "row": task.elements,
        "column": task.elements,
        "source": task.max_sources,
        "horizontal": task.ris_horizontal,
        "vertical": task.ris_vertical,
    }


@dataclass(frozen=True)
class Entry:
    """Where a file has one quantity. One of `key`, `real` with `imag`, or a `value` for all scenes.

    `axes`: of the array as its owner sees it: names, `pair`, or the number at which an axis is taken.
    """

    name: str
    axes: tuple[str, ...]
    unit: str = ""
    scale: float = 1.0
    key: str = ""
    real: str = ""
    imag: str = ""
    value: float | None = None
    conjugate: bool = False
    keys: tuple[str, ...] = field(default=(), compare=False)

    @property
    def quantity(self) -> Quantity:
        return QUANTITIES[self.name]

    @property
    def scene_axis(self) -> int | None:
        return self.axes.index(SCENE) if SCENE in self.axes else None

    def arranged(self, values: np.ndarray) -> np.ndarray:
        """An array with this entry's axes -> (B or 1, ...) in the order of the quantity's axes, complex where it is."""
        axes = list(self.axes)
        for number in [i for i, name in enumerate(axes) if name.isdigit()][::-1]:
            values = np.take(values, int(axes.pop(number)), axis=number)
        if PAIR in axes:
            parts = np.moveaxis(values, axes.index(PAIR), -1)
            axes.remove(PAIR)
            values = parts[..., 0] + 1j * parts[..., 1]
        wanted = [SCENE, *self._own_axes(axes)]
        for name in [name for name in wanted if name not in axes]:
            values, axes = values[..., None], [*axes, name]
        values = np.transpose(values, [axes.index(name) for name in wanted])
        if "vertical" in wanted:  # the horizontal index is the faster one
            at = wanted.index("vertical")
            values = values.reshape(*values.shape[:at], -1, *values.shape[at + 2 :])
        values = values * self.scale if self.scale != 1.0 else values
        values = values.conj() if self.conjugate else values
        return self._in_our_unit(values)

    def _own_axes(self, axes: list[str]) -> list[str]:
        own = list(self.quantity.axes)
        if "element" in own and {"vertical", "horizontal"} <= set(axes):
            own[own.index("element") : own.index("element") + 1] = ["vertical", "horizontal"]
        return own

    def _in_our_unit(self, values: np.ndarray) -> np.ndarray:
        if self.name == "codes" and self.unit in ("rad", "deg"):
            return np.exp(1j * (np.deg2rad(values) if self.unit == "deg" else values))
        if self.name in ("azimuth", "elevation"):
            return np.deg2rad(values) if self.unit == "deg" else values
        if self.name == "range":
            return values * METRES[self.unit]
        if self.name == "power":
            return {"dB": lambda p: 10 ** (p / 10), "amplitude": np.square, "linear": np.asarray}[self.unit](values)
        if self.name == "snr" and self.unit == "linear":
            with np.errstate(divide="ignore", invalid="ignore"):
                return 10 * np.log10(values)
        return values
