"""A file that a mapping explains, as scenes by the keys of the .npz format.

Legend: B rows of a chunk, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.config.spelling import did_you_mean
from ris_fast.data.arrays import damage
from ris_fast.data.conversion.array_file import FileArray, arrays_of
from ris_fast.data.conversion.doubts import check_units
from ris_fast.data.conversion.mapping import FileMapping
from ris_fast.data.conversion.quantities import PAIR, SCENE, Entry, lengths
from ris_fast.data.conversion.scene_file import Chunks, Files, SceneFile, Wanted, check_alike
from ris_fast.data.data_path import FOREIGN, ONE_POOL
from ris_fast.data.errors import DataError
from ris_fast.data.npz_load import CHUNK

OTHER = "Mend the mapping file, or set the task to the data's sizes with --set task.KEY=VALUE."


@dataclass(frozen=True)
class MappedFile:
    """One file whose arrays have the axes that the mapping says. Its bytes are right as they are read."""

    path: Path
    mapping: FileMapping
    task: Task
    scenes: int
    checked_at_end: bool = False

    @property
    def names(self) -> Mapping[str, str]:
        """The arrays of the file that each of our keys comes from; a value for all scenes by its section. Without
        [count] sources are counted by their ranges."""
        given: dict[str, dict[str, None]] = {}
        counted = "count" if "count" in self.mapping.entries else "range"
        for name, entry in self.mapping.entries.items():
            theirs = [key for key in (entry.key, entry.real, entry.imag) if key]
            for key in {entry.quantity.key, "K"} if name == counted else {entry.quantity.key}:
                given.setdefault(key, {}).update(dict.fromkeys(theirs or [f"[{name}]"]))
        return {key: ", ".join(theirs) for key, theirs in given.items()}

    @property
    def keys(self) -> frozenset[str]:
        given = {entry.quantity.key for entry in self.mapping.entries.values()}
        return frozenset(given | {"K"})

    def chunks(self, wanted: Wanted) -> Chunks:
        axes = {
            _plain(key): entry.scene_axis
            for entry in self.mapping.entries.values()
            for key in (entry.key, entry.real, entry.imag)
            if key and entry.scene_axis is not None
        }
        with arrays_of(self.path, self.mapping.matlab, axes) as arrays:
            for at in range(0, self.scenes, CHUNK):
                end = min(at + CHUNK, self.scenes)
                if wanted(at, end):
                    yield at, self._chunk(arrays, at, end)

    def _chunk(self, arrays: Mapping[str, FileArray], start: int, end: int) -> dict[str, Tensor]:
        found: dict[str, np.ndarray] = {}
        for name, entry in self.mapping.entries.items():
            with damage(self.path, entry.key or entry.real or name, "bytes that cannot be read", "an intact array"):
                raw = read_entry(arrays, entry, start, end)
            found[name] = raw if entry.scene_axis is not None else np.repeat(raw, end - start, axis=0)
        check_units(self.path, self.mapping, found, start, self.task)
        chunk = {
            self.mapping.entries[name].quantity.key: _pairs(found[name])
            for name in ("snapshots", "channel", "effective_channel", "codes", "covariance")
            if name in found
        }
        chunk["snr"] = torch.from_numpy(np.array(found["snr"], np.float32))
        return chunk | self._sources(found)

    def _sources(self, found: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """K, and ptr and power where they are there: sources that are there first, zeros after them."""
        if "azimuth" not in found:
            return {"K": torch.from_numpy(np.array(found["count"], np.int64))}
        places = [found[name] for name in ("azimuth", "elevation", "range")]
        if "count" in found:
            there = np.arange(places[2].shape[1]) < found["count"][:, None]
        else:
            there = np.isfinite(places[2]) & (places[2] != 0)
        order = np.argsort(~there, axis=1, kind="stable")
        columns = [
            self._padded(each, there, order) for each in (*places, *([found["power"]] if "power" in found else []))
        ]
        given = {"ptr": torch.cat(columns[:3], 1), "K": torch.from_numpy(there.sum(1).astype(np.int64))}
        return given | ({"power": columns[3]} if len(columns) > 3 else {})

    def _padded(self, values: np.ndarray, there: np.ndarray, order: np.ndarray) -> Tensor:
        """(B, K) -> (B, K_max) float32."""
        sorted_ = np.take_along_axis(np.where(there, values, 0.0), order, 1)[:, : self.task.max_sources]
        missing = self.task.max_sources - sorted_.shape[1]
        return torch.from_numpy(np.pad(sorted_, ((0, 0), (0, missing))).astype(np.float32))


def _pairs(values: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(values, np.complex64).view(np.float32).reshape(*values.shape, 2))


def read_entry(arrays: Mapping[str, FileArray], entry: Entry, start: int, end: int) -> np.ndarray:
    """Scenes start, ..., end - 1 of one quantity, in our unit and order of axes: (B or 1, ...)."""
    if entry.value is not None:
        return replace(entry, axes=()).arranged(np.asarray(float(entry.value)))
    if entry.key:
        return entry.arranged(arrays[_plain(entry.key)].rows(entry.scene_axis, start, end))
    real, imag = (arrays[_plain(key)].rows(entry.scene_axis, start, end) for key in (entry.real, entry.imag))
    return entry.arranged(real + 1j * imag)


def _plain(key: str) -> str:
    return key.strip("/")


def open_mapped(path: Path, mapping: FileMapping, task: Task) -> MappedFile:
    """One file, the shapes and types of its arrays checked against mapping and task. Raises: DataError."""
    with arrays_of(path, mapping.matlab) as arrays:
        scenes: dict[str, int] = {}
        for entry in mapping.entries.values():
            for key in filter(None, (entry.key, entry.real, entry.imag)):
                _check_array(path, entry, key, arrays, task)
                if entry.scene_axis is not None:
                    scenes[key] = arrays[_plain(key)].shape[entry.scene_axis]
    if len(set(scenes.values())) != 1 or 0 in scenes.values():
        said = ", ".join(f"{count} in '{key}'" for key, count in scenes.items()) or "no array with an axis 'scene'"
        raise DataError(path, "", f"scenes: {said}", "the same number in each, at least one", OTHER)
    return MappedFile(path, mapping, task, next(iter(scenes.values())))


def _check_array(path: Path, entry: Entry, key: str, arrays: Mapping[str, FileArray], task: Task) -> None:
    array = arrays.get(_plain(key))
    if array is None:
        there = ", ".join(f"{name} {each.shape}" for name, each in arrays.items()) or "no array"
        todo = f"Correct [{entry.name}] in the mapping file.{did_you_mean(_plain(key), arrays)}"
        raise DataError(path, key, f"no such array, only {there}", f"[{entry.name}]", todo)
    if array.kind not in ("fiuc" if entry.quantity.complex else "fiu"):
        what = "numbers, complex ones as such, as two fields or as an axis 'pair'" if entry.quantity.complex else "real"
        raise DataError(path, key, f"type {array.type}", what, "Convert the array, or map another one.")
    sizes = lengths(task)
    wanted = [sizes.get(axis, 2 if axis == PAIR else -1) for axis in entry.axes]
    fits = len(array.shape) == len(entry.axes) and all(
        axis == SCENE
        or (axis.isdigit() and int(axis) < length)
        or (axis == "source" and length <= size)
        or length == size
        for axis, length, size in zip(entry.axes, array.shape, wanted)
    )
    if not fits:
        expected = ", ".join(
            axis if axis == SCENE else f"{axis} {size}" if size > 0 else f"at {axis}"
            for axis, size in zip(entry.axes, wanted)
        )
        raise DataError(path, key, f"shape {array.shape}", f"[{entry.name}] ({expected})", _advice(entry, array, task))


def _advice(entry: Entry, array: FileArray, task: Task) -> str:
    """The settings of the task, or the order of the axes, that would fit."""
    if len(array.shape) != len(entry.axes):
        return f"Name all {len(array.shape)} axes of the array in [{entry.name}] axes. {OTHER}"
    flags = {"snapshot": "snapshots", "antenna": "bs_antennas", "source": "max_sources"}
    flags |= {"horizontal": "ris_horizontal", "vertical": "ris_vertical"}
    needed = [
        f"--set task.{flags[axis]}={length}"
        for axis, length in zip(entry.axes, array.shape)
        if axis in flags and length != lengths(task)[axis]
    ]
    return f"If the axes are named in their order, set {' '.join(needed)}; else mend them." if needed else OTHER


def mapped_files_of(root: Path, mapping: FileMapping, task: Task) -> Files:
    """The files at a path that a mapping explains, their headers checked. Raises: DataError."""
    listed = _listed(root, mapping)
    parts: dict[str, list[SceneFile]] = {
        part: [open_mapped(path, mapping, task) for path in paths] for part, paths in listed.items()
    }
    check_alike(parts)
    settings: dict[str, Any] = {"mapping": mapping.text}
    ranges = {split: torch.arange(*each) for split, each in mapping.ranges.items()}
    total = sum(file.scenes for file in parts.get(ONE_POOL, []))
    for split, (first, end) in mapping.ranges.items():
        if end > total:
            wanted = f"scenes {first} to {end - 1} for {split}, counted from 0"
            raise DataError(root, "", f"{total} scenes", wanted, f"Mend [split] {split} = [{first}, {end}].")
    return Files(root, parts, "files of a mapping", mapping.offset, settings, ranges)


def _listed(root: Path, mapping: FileMapping) -> dict[str, list[Path]]:
    """The files of each split, or all of them under one name. Raises: DataError."""
    if not root.exists():
        raise DataError(root, "", "no such file or folder", "files for the mapping", "Give the right --data.")
    if root.is_file():
        return {ONE_POOL: [root]}
    if mapping.patterns:
        found = {split: sorted(root.glob(pattern)) for split, pattern in mapping.patterns.items()}
    else:
        found = {ONE_POOL: sorted(path for path in root.iterdir() if path.suffix.lower() in FOREIGN)}
    for part, paths in found.items():
        if not paths:
            what = f"nothing that fits {mapping.patterns[part]}" if mapping.patterns else "no .h5, .hdf5 or .mat"
            raise DataError(root, "", what, "files", "Mend [files] in the mapping file, or give another --data.")
    return found


def first_file(data: Path) -> Path:
    """The file, or the first one of a folder that a mapping could explain. Raises: DataError."""
    if data.is_dir():
        found = sorted(path for path in data.rglob("*") if path.suffix.lower() in FOREIGN)
        if not found:
            raise DataError(data, "", "no .h5, .hdf5 or .mat", "one of them", "Give the right --data.")
        return found[0]
    if not data.exists():
        raise DataError(data, "", "no such file or folder", "a .h5, .hdf5 or .mat file", "Give the right --data.")
    return data
