"""What a shard of the original pipeline must look like: keys, shapes, types and values, each refused by name.

Legend: B rows of a chunk, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ris_fast.config import Task
from ris_fast.data.arrays import StoredArray, npz_arrays
from ris_fast.data.errors import DataError

REQUIRED = ("y", "codes", "ptr", "K", "snr", "R")
FIT_TASK = ("Set the task to the data's sizes (task.snapshots, task.bs_antennas, task.ris_horizontal, "
            "task.ris_vertical, task.max_sources), or point data.path elsewhere.")
CLEAN = "Find out how it got there and generate the shard again; training on it would spoil every weight."


def row_shapes(task: Task) -> dict[str, tuple[int, ...]]:
    """The shape of one scene under each key."""
    l, m, n, k = task.snapshots, task.bs_antennas, task.elements, task.max_sources
    return {"y": (l, m, 2), "H": (l, m, 2), "H_full": (m, n, 2), "codes": (l, n, 2), "ptr": (3 * k,), "K": (),
            "snr": (), "R": (n, n, 2)}


@dataclass(frozen=True)
class NpzShard:
    """One file whose headers are in order. `channel`: it has H_full."""

    path: Path
    arrays: dict[str, StoredArray]

    @property
    def scenes(self) -> int:
        return self.arrays["y"].shape[0]

    @property
    def channel(self) -> bool:
        return "H_full" in self.arrays

    @property
    def mappable(self) -> bool:
        return all(a.offset is not None for a in self.arrays.values())


def open_shard(path: Path, task: Task) -> NpzShard:
    """Check the headers against the task; reads no array. R_samp and keys of other tools are left alone.

    Raises: DataError that names the key, what was found and what was expected.
    """
    arrays = npz_arrays(path)
    missing = [key for key in REQUIRED if key not in arrays]
    if not ("H" in arrays or "H_full" in arrays):
        missing.append("H or H_full")
    if missing:
        raise DataError(path, ", ".join(missing), f"only the keys {', '.join(sorted(arrays)) or '(none)'}",
                        f"{', '.join(REQUIRED)} and H or H_full", "Generate the shard with these keys.")
    shapes = row_shapes(task)
    wanted = {key: arrays[key] for key in shapes if key in arrays}
    for key, array in wanted.items():
        _check_header(array, shapes[key])
    _check_rows(path, wanted)
    return NpzShard(path, wanted)


def _check_header(array: StoredArray, row: tuple[int, ...]) -> None:
    if array.key == "K":
        if array.dtype.kind not in "iu":
            raise DataError(array.file, "K", f"type {array.dtype}", "an integer type", "Write it as int32.")
    elif array.dtype != np.float32:
        raise DataError(array.file, array.key, f"type {array.dtype}",
                        "float32, complex numbers as a last axis (re, im)",
                        "Convert the array and write the shard again.")
    if len(array.shape) != len(row) + 1 or array.shape[1:] != row:
        expected = "(scenes, " + ", ".join(map(str, row)) + ")" if row else "(scenes,)"
        raise DataError(array.file, array.key, f"shape {array.shape}", expected, FIT_TASK)


def _check_rows(path: Path, arrays: dict[str, StoredArray]) -> None:
    rows = arrays["y"].shape[0]
    if rows == 0:
        raise DataError(path, "y", "no scene (0 rows)", "at least one", "Remove the file or generate it again.")
    for key, array in arrays.items():
        if array.shape[0] != rows:
            raise DataError(path, key, f"{array.shape[0]} rows", f"{rows} rows, as y has",
                            "Write all keys of a shard from the same scenes.")


def check_finite(path: Path, key: str, values: Tensor, start: int) -> None:
    """Refuse NaN and infinity, with the number of the first scene that has one."""
    low, high = torch.aminmax(values)
    if math.isfinite(float(low)) and math.isfinite(float(high)):
        return
    bad = ~torch.isfinite(values).flatten(1) if values.ndim > 1 else ~torch.isfinite(values)[:, None]
    first = start + int(bad.any(1).nonzero()[0])
    raise DataError(path, key, f"{int(bad.sum())} NaN or infinite values, the first in scene {first}",
                    "finite numbers", CLEAN)


def check_values(path: Path, chunk: dict[str, Tensor], start: int, task: Task) -> None:
    """Everything that can be said about a chunk of scenes that starts at row `start`. Raises: DataError."""
    for key, values in chunk.items():
        if key != "K":
            check_finite(path, key, values, start)
    _refuse(path, "K", (chunk["K"] < 1) | (chunk["K"] > task.max_sources), start, chunk["K"],
            f"1 to {task.max_sources} sources (task.max_sources)")
    silent = chunk["y"].abs().flatten(1).amax(1)
    _refuse(path, "y", silent == 0, start, silent, "snapshots that are not all zero")
    azimuth, elevation, range_m, active = split_ptr(chunk["ptr"], chunk["K"])
    angle = torch.maximum(azimuth.abs(), elevation.abs()).amax(1)
    _refuse(path, "ptr", angle > math.pi / 2, start, angle, "angles within pi/2 (radians, not degrees)")
    nearest = torch.where(active, range_m, math.inf).amin(1)
    _refuse(path, "ptr", nearest <= 0, start, nearest,
            "a positive range for every source; ptr is [azimuths, elevations, ranges], zero padded")
    check_target(path, chunk["R"], start)


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
