"""Arrays of HDF5 and MATLAB files by rows: each with the axes that its owner sees.

A .mat of version 7.3 is HDF5 with its axes reversed; before that, it is a format of MATLAB's own, read by scipy whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ris_fast.config.schema import ConfigError
from ris_fast.data.arrays import damage, refuse_other_than_file
from ris_fast.data.errors import DataError

MAGIC = b"\x89HDF\r\n\x1a\n"
CACHE = 2**28  # bytes of one array's compressed blocks that are kept decoded, at most
SLOTS = 10_007


def h5py_module() -> Any:
    """h5py, which is an extra. Raises: ConfigError where it is missing."""
    try:
        import h5py
    except ImportError:
        raise ConfigError(
            "convert: h5py is not installed, which reads HDF5 and .mat of version 7.3. Install it: pip install"
            " 'ris-fast[hdf5]', or pip install h5py."
        ) from None
    return h5py


def is_hdf5(path: Path) -> bool:
    """Whether the file is HDF5; MATLAB puts 512 bytes of its own before that."""
    refuse_other_than_file(path)
    with open(path, "rb") as file:
        start = file.read(512 + len(MAGIC))
    return MAGIC in (start[: len(MAGIC)], start[512:])


@contextmanager
def arrays_of(path: Path, matlab: bool | None, scene_axes: Mapping[str, int] | None = None) -> Iterator[dict[str, Any]]:
    """The arrays of a file by key, each a `FileArray`, within the block. Raises: DataError.

    Args: matlab: whether axes are those that MATLAB shows; None: in a .mat. scene_axes: along which axis each array
        will be read, so that what is compressed is decoded once.
    """
    reverse = path.suffix.lower() == ".mat" if matlab is None else matlab
    hdf5 = is_hdf5(path)
    if not hdf5 and path.suffix.lower() != ".mat":
        raise DataError(path, "", "a file that is no HDF5", "one that is, or a .mat", "Give the right --data.")
    found = f"{path.stat().st_size} bytes that are no readable {'HDF5' if hdf5 else 'MATLAB file'}"
    if not hdf5:
        with damage(path, "", found, "a whole file"):
            from scipy.io import loadmat

            held = {k: v for k, v in loadmat(path).items() if isinstance(v, np.ndarray) and v.dtype.kind in "fiuc"}
        yield {key: FileArray(value, value.dtype, value.shape, False) for key, value in held.items()}
        return
    h5py = h5py_module()
    with damage(path, "", found, "a whole file"):
        file = h5py.File(path, "r")
    with file:
        arrays: dict[str, Any] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.shape is not None and not name.startswith("#refs#"):
                if scene_axes is not None and name in scene_axes and item.chunks:
                    axis = scene_axes[name]
                    item = _cached(h5py, file, name, item, len(item.shape) - 1 - axis if reverse else axis)
                arrays[name] = FileArray(item, item.dtype, item.shape[::-1] if reverse else item.shape, reverse)

        with damage(path, "", found, "a whole file"):
            file.visititems(visit)
        yield arrays


def _cached(h5py: Any, file: Any, name: str, stored: Any, axis: int) -> Any:
    """The same array, with a cache that holds the compressed blocks that neighbouring scenes share."""
    rest = [length for number, length in enumerate(stored.shape) if number != axis]
    slab = stored.dtype.itemsize * stored.chunks[axis] * int(np.prod(rest, dtype=np.int64))
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(SLOTS, min(max(2 * slab, 2**20), CACHE), 1.0)
    return h5py.Dataset(h5py.h5d.open(file.id, name.encode(), access))


class FileArray:
    """An array as its owner sees it; complex numbers as such, also where the file has pairs of named fields."""

    def __init__(self, stored: Any, dtype: np.dtype, shape: tuple[int, ...], reverse: bool) -> None:
        self._stored, self._reverse, self.shape = stored, reverse, tuple(shape)
        self.fields = dtype.names
        self.kind = "c" if self.fields is not None and len(self.fields) == 2 else dtype.kind
        self.type = f"complex ({', '.join(self.fields)})" if self.fields and self.kind == "c" else str(dtype)

    def rows(self, axis: int | None, start: int, end: int) -> np.ndarray:
        """The array at start, ..., end - 1 of one axis; whole where that is None."""
        where = [slice(None)] * len(self.shape)
        if axis is not None:
            where[axis] = slice(start, end)
        raw = np.asarray(self._stored[tuple(where[::-1] if self._reverse else where)])
        raw = raw.T if self._reverse else raw
        if self.fields is not None and self.kind == "c":
            return raw[self.fields[0]] + 1j * raw[self.fields[1]]
        return raw
