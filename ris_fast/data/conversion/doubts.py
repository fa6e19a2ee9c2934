"""Values whose unit cannot be the one that a mapping says, and the unit that fits instead.

Legend: B rows of a chunk, K sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ris_fast.config.schema import Task
from ris_fast.data.conversion.mapping import FileMapping
from ris_fast.data.conversion.quantities import METRES
from ris_fast.data.errors import DataError

MOST_DB = 60.0  # no measurement is this good on the whole
MOSTLY = 0.95  # share of values within limits that settles their unit
FILLED = 0.1  # of a sector, that angles reach which are in the unit that is asked about
FEWEST = 8  # scenes from which a unit is doubted


def check_units(path: Path, mapping: FileMapping, found: Mapping[str, np.ndarray], start: int, task: Task) -> None:
    """Doubts about the units of a chunk that starts at row `start`. Args: found: values in our units.
    Raises: DataError."""
    if "azimuth" in found:
        _check_angles(path, mapping, found, task)
        _check_range(path, mapping, found["range"], task)
    _check_snr(path, mapping, found["snr"])
    if "power" in found:
        _check_power(path, mapping, found["power"])
    if "count" in found and not np.array_equal(found["count"], np.rint(found["count"])):
        raise _wrong(path, mapping, "count", f"{np.asarray(found['count']).flat[0]:g}", "whole numbers", "Map another.")


def _check_angles(path: Path, mapping: FileMapping, found: Mapping[str, np.ndarray], task: Task) -> None:
    for name in ("azimuth", "elevation"):
        unit = mapping.entries[name].unit
        most = float(np.nanmax(np.abs(found[name]), initial=0.0))
        if most > math.pi / 2:
            seen, most_there = (most, "pi/2") if unit == "rad" else (math.degrees(most), "90")
            todo = _todo_beyond(name, unit, found, getattr(task, f"{name}_deg"))
            raise _wrong(path, mapping, name, f"{seen:.4g} {unit}", f"at most {most_there} {unit}", todo)
    if len(found["azimuth"]) < FEWEST or min(task.azimuth_deg, task.elevation_deg) < 5.0:
        return
    both = [np.nanmax(np.abs(np.degrees(found[name])), initial=0.0) for name in ("azimuth", "elevation")]
    if {mapping.entries[name].unit for name in ("azimuth", "elevation")} == {"deg"} and max(both) < math.pi / 2:
        raise _wrong(
            path,
            mapping,
            "azimuth",
            f"at most {max(both):.3g} deg in both angles",
            f"angles of a sector of {task.azimuth_deg:g} deg",
            "unit = 'rad' in [azimuth] and [elevation] fits.",
        )


def _todo_beyond(name: str, unit: str, found: Mapping[str, np.ndarray], limit_deg: float) -> str:
    """What makes angles of more than a right angle fit a sector. Args: found: values in our units."""
    there = np.isfinite(found["range"]) & (found["range"] != 0) & np.isfinite(found[name])
    values, limit = found[name][there], 1.1 * math.radians(limit_deg)
    right_angle = "pi/2" if unit == "rad" else "90"
    if values.size and bool((np.abs(math.pi / 2 - values) <= limit).all()):
        return (
            f"Write {right_angle} minus these: they are angles from the "
            f"{'vertical' if name == 'elevation' else 'surface'}, and {name} is counted from the surface's normal."
        )
    as_degrees = float(np.radians(np.abs(values)).max(initial=0.0))
    if unit == "rad" and FILLED * limit < as_degrees <= limit:
        return f"unit = 'deg' in [{name}] fits."
    return f"Map another array, or write angles from the surface's normal, between -{right_angle} and {right_angle}."


def _check_range(path: Path, mapping: FileMapping, range_m: np.ndarray, task: Task) -> None:
    """Ranges that leave the task's limits, where another unit would put all of them inside."""
    there = range_m[np.isfinite(range_m) & (range_m != 0)]
    low, high = 0.9 * task.range_min_m, 1.1 * task.range_max_m
    if there.size < FEWEST or ((there >= low) & (there <= high)).mean() > MOSTLY:
        return
    raw = there / METRES[mapping.entries["range"].unit]
    for unit, metres in METRES.items():
        if bool(((raw * metres >= low) & (raw * metres <= high)).all()):
            raise _wrong(
                path,
                mapping,
                "range",
                f"{there.min():.4g} to {there.max():.4g} m",
                f"{task.range_min_m:g} to {task.range_max_m:g} m",
                f"unit = '{unit}' in [range] fits.",
            )


def _check_snr(path: Path, mapping: FileMapping, snr: np.ndarray) -> None:
    if not np.isfinite(snr).all():
        if mapping.entries["snr"].unit == "linear":
            raise _wrong(path, mapping, "snr", "values that are not above 0", "linear ratios", "unit = 'dB' fits.")
        raise _wrong(path, mapping, "snr", "NaN or infinite values", "finite numbers", "Leave these scenes out.")
    if mapping.entries["snr"].unit == "dB" and snr.size >= FEWEST and float(np.max(snr)) > MOST_DB and np.min(snr) > 0:
        low, high = 10 * math.log10(float(np.min(snr))), 10 * math.log10(float(np.max(snr)))
        raise _wrong(
            path,
            mapping,
            "snr",
            f"{np.min(snr):.4g} to {np.max(snr):.4g} dB",
            f"at most {MOST_DB:g} dB",
            f"unit = 'linear' in [snr] fits: {low:.3g} to {high:.3g} dB.",
        )


def _check_power(path: Path, mapping: FileMapping, power: np.ndarray) -> None:
    if mapping.entries["power"].unit == "linear" and bool((power < 0).any()):
        low = float(np.nanmin(power))
        raise _wrong(
            path, mapping, "power", f"{low:.4g}", "powers that are not negative", "unit = 'dB' in [power] fits."
        )


def _wrong(path: Path, mapping: FileMapping, name: str, found: str, expected: str, todo: str) -> DataError:
    entry = mapping.entries[name]
    return DataError(path, f"{entry.key or entry.real or name}, as [{name}]".replace("'", ""), found, expected, todo)
