"""What a shard of the original pipeline must look like: keys, shapes, types and values, each refused by name.

Legend: B rows of a chunk, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.arrays import npz_arrays, npz_keys
from ris_fast.data.column import Column, without_ones
from ris_fast.data.errors import DataError

REQUIRED = ("y", "codes", "ptr", "K", "snr", "R")
KINDS = {"K": "iu", "snr": "fiu", "ptr": "f"}  # what numpy calls their types; every other key: "fc"
OTHER_AXES = "Write every key with the axes of this format, scenes first, or point data.path elsewhere."
CLEAN = "Find out how it got there and generate the shard again; training on it would spoil every weight."


def row_shapes(snapshots: int, antennas: int, elements: int, sources: int) -> dict[str, tuple[int, ...]]:
    """The shape of one scene under each key."""
    seen, operator = (snapshots, antennas, 2), (antennas, elements, 2)
    return {
        "y": seen,
        "H": seen,
        "H_full": operator,
        "codes": (snapshots, elements, 2),
        "ptr": (3 * sources,),
        "K": (),
        "snr": (),
        "R": (elements, elements, 2),
    }


@dataclass(frozen=True)
class NpzShard:
    """One file whose headers are in order. `channel`: it has H_full."""

    path: Path
    columns: dict[str, Column]

    @property
    def scenes(self) -> int:
        return self.columns["y"].rows

    @property
    def channel(self) -> bool:
        return "H_full" in self.columns

    @property
    def mappable(self) -> bool:
        return all(column.stored.offset is not None for column in self.columns.values())


def open_shard(path: Path, task: Task) -> NpzShard:
    """Check the headers against the task; reads no array. R_samp and keys of other tools are left alone.

    Raises: DataError that names the key, what was found and what was expected.
    """
    shapes = row_shapes(task.snapshots, task.bs_antennas, task.elements, task.max_sources)
    arrays = npz_arrays(path, shapes)
    missing = [key for key in REQUIRED if key not in arrays]
    if not ("H" in arrays or "H_full" in arrays):
        missing.append("H or H_full")
    if missing:
        raise DataError(
            path,
            ", ".join(missing),
            f"only the keys {', '.join(npz_keys(path)) or '(none)'}",
            f"{', '.join(REQUIRED)} and H or H_full",
            "Generate the shard with these keys.",
        )
    columns = {key: Column(array, shapes[key], whole=key == "K") for key, array in arrays.items()}
    for column in columns.values():
        _check_type(column)
    _check_shapes(columns, task)
    _check_rows(path, columns)
    return NpzShard(path, columns)


def _check_type(column: Column) -> None:
    stored, key = column.stored, column.stored.key
    if stored.dtype.kind not in KINDS.get(key, "fc"):
        number = "whole numbers" if key == "K" else "floats"
        todo = "Convert the array and write the shard again."
        expected = number if key in KINDS else f"{number}, complex numbers as such or as a last axis (re, im)"
        raise DataError(
            stored.file, key, f"type {stored.dtype}", expected, "Write it as int32." if key == "K" else todo
        )


def _check_shapes(columns: dict[str, Column], task: Task) -> None:
    """Every key has rows of the task's shape. Raises: DataError with the settings that would fit the files."""
    wrong = next((column for column in columns.values() if not column.fits), None)
    if wrong is not None:
        expected = f"(scenes, {', '.join(map(str, wrong.row))})" if wrong.row else "(scenes,)"
        settings = _settings(columns, task)
        todo = (
            f"Set the task to the data's sizes: {settings}; or point data.path elsewhere." if settings else OTHER_AXES
        )
        raise DataError(wrong.stored.file, wrong.stored.key, f"shape {wrong.stored.shape}", expected, todo)


def _settings(columns: dict[str, Column], task: Task) -> str:
    """The settings of `task` under which every key would have its shape; empty where none would."""
    y, codes, ptr = (columns[key].axes for key in ("y", "codes", "ptr"))
    if len(y) != 3 or len(codes) != 3 or len(without_ones(ptr)) != 1 or max(ptr) % 3:
        return ""
    elements, side = codes[1], math.isqrt(codes[1])
    found = {"snapshots": y[0], "bs_antennas": y[1], "max_sources": max(ptr) // 3}
    shapes = row_shapes(y[0], y[1], elements, max(ptr) // 3)
    if not all(replace(column, row=shapes[key]).fits for key, column in columns.items()):
        return ""
    square = side * side == elements
    found |= {"ris_horizontal": side, "ris_vertical": side} if square and elements != task.elements else {}
    flags = [f"--set task.{name}={value}" for name, value in found.items() if getattr(task, name) != value]
    named = [" ".join(flags)] if flags else []
    if elements != task.elements and not square:
        named.append(f"task.ris_horizontal and task.ris_vertical with the product {elements}")
    return ", and ".join(named)


def _check_rows(path: Path, columns: dict[str, Column]) -> None:
    rows = columns["y"].rows
    if rows == 0:
        raise DataError(path, "y", "no scene (0 rows)", "at least one", "Remove the file or generate it again.")
    for key, column in columns.items():
        if column.rows != rows:
            raise DataError(
                path,
                key,
                f"{column.rows} rows",
                f"{rows} rows, as y has",
                "Write all keys of a shard from the same scenes.",
            )


def check_finite(path: Path, key: str, values: Tensor, start: int) -> None:
    """Refuse NaN and infinity, with the number of the first scene that has one."""
    plain = values.numpy()  # numpy stays on the caller's thread, of which there may be several
    if math.isfinite(plain.min()) and math.isfinite(plain.max()):
        return
    bad = ~torch.isfinite(values).flatten(1) if values.ndim > 1 else ~torch.isfinite(values)[:, None]
    first = start + int(bad.any(1).nonzero()[0])
    raise DataError(
        path, key, f"{int(bad.sum())} NaN or infinite values, the first in scene {first}", "finite numbers", CLEAN
    )


def check_values(path: Path, chunk: dict[str, Tensor], start: int, task: Task) -> None:
    """Everything that can be said about a chunk of scenes that starts at row `start`. Raises: DataError."""
    for key, values in chunk.items():
        if key != "K":
            check_finite(path, key, values, start)
    _refuse(
        path,
        "K",
        (chunk["K"] < 1) | (chunk["K"] > task.max_sources),
        start,
        chunk["K"],
        f"1 to {task.max_sources} sources (task.max_sources)",
    )
    silent = chunk["y"].abs().flatten(1).amax(1)
    _refuse(path, "y", silent == 0, start, silent, "snapshots that are not all zero")
    if "ptr" in chunk:
        _check_positions(path, chunk, start)
    if "R" in chunk:
        check_target(path, chunk["R"], start)


def _check_positions(path: Path, chunk: dict[str, Tensor], start: int) -> None:
    azimuth, elevation, range_m, active = split_ptr(chunk["ptr"], chunk["K"])
    angle = torch.maximum(azimuth.abs(), elevation.abs()).amax(1)
    _refuse(path, "ptr", angle > math.pi / 2, start, angle, "angles within pi/2 (radians, not degrees)")
    nearest = torch.where(active, range_m, math.inf).amin(1)
    _refuse(
        path,
        "ptr",
        nearest <= 0,
        start,
        nearest,
        "a positive range for every source; ptr is [azimuths, elevations, ranges], zero padded",
    )


def check_target(path: Path, covariance: Tensor, start: int) -> None:
    """R must have a positive trace and be Hermitian (to 1e-3 of its norm, on a sample of the chunk)."""
    trace = covariance[..., 0].diagonal(dim1=1, dim2=2).sum(1)
    _refuse(path, "R", trace <= 0, start, trace, "a covariance with positive trace")
    sample = torch.view_as_complex(covariance[:4])
    skew = torch.linalg.matrix_norm(sample - sample.mH) / torch.linalg.matrix_norm(sample)
    _refuse(path, "R", skew > 1e-3, start, skew, "a Hermitian matrix, |R - R^H| below 0.001 |R|")


def _refuse(path: Path, key: str, bad: Tensor, start: int, values: Tensor, expected: str) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        found = f"{values[row].item():.4g} in scene {start + row} ({int(bad.sum())} such scenes here)"
        raise DataError(path, key, found, expected, CLEAN)


def split_ptr(ptr: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ptr (B, 3 K_max) -> azimuth, elevation rad, range m and which of them are sources, (B, K_max) each."""
    azimuth, elevation, range_m = ptr.unflatten(1, (3, -1)).unbind(1)
    active = torch.arange(azimuth.shape[1]) < count[:, None]
    return azimuth, elevation, range_m, active
