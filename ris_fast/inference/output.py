"""Predictions written to a file as they are made: .npz, .safetensors or .csv by the name's ending, whole or not at all.

One row a scene in .npz and .safetensors, under the names of `Located`; one row a source in .csv, and a row with
`source` 0 for a scene in which none was found. Memory does not grow with the number of scenes.
"""

from __future__ import annotations

import csv
import json
import math
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, TextIO

import numpy as np

from ris_fast.config.schema import ConfigError
from ris_fast.files import check_writable, replacing
from ris_fast.inference.located import Located

DTYPES = {"float32": "F32", "int64": "I64"}  # as a .safetensors file calls them
PIECE = 2**22
VALUES = ("azimuth_deg", "elevation_deg", "range_m", "power")
SPREADS = ("azimuth_sd_deg", "elevation_sd_deg", "range_sd_m", "power_sd")
HEADER = ("scene", "source", "count", "count_probability", *VALUES, *SPREADS, "snr_db")


class Writer(Protocol):
    """Takes chunks of scenes in order."""

    def write(self, located: Located) -> None: ...


@contextmanager
def predictions_file(path: Path, scenes: int, metadata: Mapping[str, str], *, factor: bool = True) -> Iterator[Writer]:
    """A writer of `scenes` scenes; the file appears under its name when the block ends well.

    Args: metadata: texts that go into a .safetensors file; factor: whether factors are kept, which no .csv does.
    Raises: ConfigError for another ending, StorageError where the file system refuses.
    """
    check_ending(path)
    with replacing(path) as partial, WRITERS[path.suffix.lower()](partial, scenes, metadata, factor) as writer:
        yield writer


def check_ending(path: Path) -> None:
    """Raises: ConfigError."""
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {path}: the ending says what to write. Give a name in {', '.join(WRITERS)}.")


def check_output(path: Path) -> None:
    """Before anything is computed. Raises: ConfigError for another ending, StorageError where nothing can be
    written."""
    check_ending(path)
    check_writable(path)


class _Rows:
    """Arrays of a known number of rows in one file, laid out as .safetensors has them when the first rows come."""

    def __init__(self, file: IO[bytes], scenes: int, metadata: Mapping[str, str], factor: bool) -> None:
        self.file, self.scenes, self.metadata, self.factor = file, scenes, metadata, factor
        self.arrays: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}  # type, shape, offset
        self.done = 0

    def write(self, located: Located) -> None:
        values = located.numpy()
        if not self.factor:
            values.pop("factor")
        if not self.arrays:
            self._lay_out(values)
        for name, rows in values.items():
            dtype, shape, offset = self.arrays[name]
            self.file.seek(offset + self.done * _row_bytes(dtype, shape))
            self.file.write(np.ascontiguousarray(rows, dtype).data)
        self.done += len(values["count"])

    def copy(self, name: str, member: IO[bytes]) -> None:
        """One array as numpy's own file."""
        dtype, shape, offset = self.arrays[name]
        np.lib.format.write_array_header_1_0(member, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        self.file.seek(offset)
        left = self.scenes * _row_bytes(dtype, shape)
        while left:
            piece = self.file.read(min(PIECE, left))
            member.write(piece)
            left -= len(piece)

    def _lay_out(self, values: Mapping[str, np.ndarray]) -> None:
        header: dict[str, object] = {"__metadata__": dict(self.metadata)}
        start = 0
        for name, rows in values.items():
            dtype, shape = rows.dtype, (self.scenes, *rows.shape[1:])
            end = start + self.scenes * _row_bytes(dtype, shape)
            header[name] = {"dtype": DTYPES[dtype.name], "shape": shape, "data_offsets": [start, end]}
            self.arrays[name] = dtype, shape, start
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.arrays = {name: (*each[:2], each[2] + 8 + len(text)) for name, each in self.arrays.items()}


def _row_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape[1:])


@contextmanager
def _safetensors(path: Path, scenes: int, metadata: Mapping[str, str], factor: bool) -> Iterator[Writer]:
    with open(path, "wb") as file:
        yield _Rows(file, scenes, metadata, factor)


@contextmanager
def _npz(path: Path, scenes: int, metadata: Mapping[str, str], factor: bool) -> Iterator[Writer]:
    """An archive has one array after the other, so rows wait beside it in a file without a name."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        rows = _Rows(file, scenes, metadata, factor)
        yield rows
        with zipfile.ZipFile(path, "w") as archive:
            for name in rows.arrays:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    rows.copy(name, member)


@contextmanager
def _csv(path: Path, scenes: int, metadata: Mapping[str, str], factor: bool) -> Iterator[Writer]:
    with open(path, "w", encoding="utf-8", newline="") as file:
        yield _Table(file)


class _Table:
    """One row a source."""

    def __init__(self, file: TextIO) -> None:
        self.table = csv.writer(file, lineterminator="\n")
        self.table.writerow(HEADER)
        self.done = 0

    def write(self, located: Located) -> None:
        values = located._replace(factor=located.factor[:, :0]).numpy()
        count = values["count"]
        chance = values["count_probability"][np.arange(len(count)), count]
        table = np.stack([values[name] for name in (*VALUES, *SPREADS)], axis=-1)  # (B, K, 8)
        for scene, (sources, likely, snr, rows) in enumerate(zip(count, chance, values["snr_db"], table), self.done):
            about = (scene, 0, int(sources), _text(likely))
            if sources == 0:
                self.table.writerow((*about, *[""] * len(VALUES + SPREADS), _text(snr)))
            for source, row in enumerate(rows[:sources], 1):
                self.table.writerow((scene, source, *about[2:], *map(_text, row), _text(snr)))
        self.done += len(count)


def _text(value: float) -> str:
    """Seven digits, which float32 has; nothing for what is not known."""
    return "" if math.isnan(value) else f"{value:.7g}"


WRITERS = {".npz": _npz, ".safetensors": _safetensors, ".csv": _csv}
