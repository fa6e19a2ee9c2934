"""Measurements in files, without their answers: snapshots, channel, codes and perhaps the SNR, a few scenes at a time.

One file or a folder, under our own names or those of the original pipeline. Nothing is kept: memory does not grow with
the number of scenes.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.load import MANIFEST
from ris_fast.config.schema import Task
from ris_fast.data.arrays import COPY_AGAIN, StoredArray, npz_arrays, npz_keys, safetensors_arrays, safetensors_keys
from ris_fast.data.column import Column, without_ones
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import file_hash, read_manifest
from ris_fast.physics.random import SPLITS

NAMES = {  # of an array, in files of ours and in the original pipeline's
    "snapshots": ("snapshots", "y"),
    "channel": ("channel", "H_full"),
    "effective_channel": ("effective_channel", "H"),
    "codes": ("codes",),
    "snr_db": ("snr_db", "snr"),
}
ENDINGS = (".npz", ".safetensors")
SAME_ARRAY = (  # settings of a task without which measurements of it mean something else
    "bs_antennas",
    "ris_horizontal",
    "ris_vertical",
    "elements_hash",
    "snapshots",
    "wavelength_m",
    "spacing_wavelengths",
    "wavefront",
    "symbols",
)
KINDS = "fiuc"  # what numpy calls the types of numbers
EXPECTED = "a folder of data, or one .npz or .safetensors file with snapshots, channel and codes"
OTHER_TASK = "Give scenes of this task, or the run of theirs."
CLEAN = "Leave these scenes out, measure them again, or give them in other units."
NEEDS_SNR = "dB: without the channel the SNR cannot be estimated"


class Measured(NamedTuple):
    """What was measured of some scenes: real pairs, float32."""

    snapshots: Tensor  # (B, L, M, 2)
    channel: Tensor | None  # (B, M, N, 2); None where only H c_l is known
    effective_channel: Tensor | None  # (B, L, M, 2), H c_l; read where there is no channel
    codes: Tensor  # (L, N, 2) or (B, L, N, 2)
    snr_db: Tensor  # (B,); NaN where it is not known

    def to(self, device: torch.device) -> Measured:
        return Measured(*(None if each is None else each.to(device) for each in self))

    def take(self, rows: slice) -> Measured:
        """The same of some scenes."""
        codes = self.codes[rows] if self.codes.dim() == 4 else self.codes
        some = (None if each is None else each[rows] for each in self[:3])
        return Measured(*some, codes, self.snr_db[rows])

    def with_unit_codes(self) -> Measured:
        """The same measurement with codes of rms 1: their scale goes into the channel, and H diag(c_l) stays."""
        scale = (2 * self.codes.double().square().mean((-3, -2, -1))).sqrt().float()[..., None, None, None]
        channel = None if self.channel is None else self.channel * scale
        return self._replace(channel=channel, codes=self.codes / scale)


@dataclass(frozen=True)
class MeasurementFile:
    """A file whose headers are in order. `columns` by the names of `Measured`, without codes that all scenes share."""

    path: Path
    columns: dict[str, Column]
    shared_codes: Column | None
    sha256: str | None = None  # of every byte, where a manifest says it

    @property
    def scenes(self) -> int:
        return self.columns["snapshots"].rows

    def chunks(self, rows: int, limit: int) -> Iterator[Measured]:
        """The first `limit` scenes in order, `rows` at a time, codes of rms 1. Raises: DataError for damaged bytes,
        NaN, infinity, scenes of zeros, and an unknown SNR where there is no channel to estimate it with."""
        if self.sha256 is not None and file_hash(self.path) != self.sha256:
            raise DataError(self.path, "", "other bytes than were written", "the manifest's SHA-256", COPY_AGAIN)
        shared = None if self.shared_codes is None else self._codes(self.shared_codes)
        streams = {name: column.chunks(rows, limit) for name, column in self.columns.items()}
        for start in range(0, limit, rows):
            taken = {name: torch.from_numpy(next(stream)) for name, stream in streams.items()}
            for name, values in taken.items():
                self._check(name, values, start)
            size = len(taken["snapshots"])
            yield Measured(
                taken["snapshots"],
                taken.get("channel"),
                taken.get("effective_channel"),
                taken["codes"] if shared is None else shared,
                taken.get("snr_db", torch.full((size,), torch.nan)),
            ).with_unit_codes()
        for stream in streams.values():
            next(stream, None)  # a zip's checksum is compared at the end of its array

    def _codes(self, column: Column) -> Tensor:
        codes = torch.from_numpy(next(column.chunks(column.rows, column.rows)))
        if not bool(codes.isfinite().all()):
            raise DataError(self.path, "codes", "NaN or infinite values", "finite numbers", "Give the codes in use.")
        if not bool(codes.any()):
            raise DataError(self.path, "codes", "nothing but zeros", "codes", "Give the codes in use.")
        return codes

    def _check(self, name: str, values: Tensor, start: int) -> None:
        if (found := unusable(name, values, start)) is not None:
            raise DataError(self.path, self.columns[name].stored.key, *found, CLEAN)
        if name == "snr_db" and "channel" not in self.columns and bool((unknown := values.isnan()).any()):
            found = f"NaN, the first in scene {start + int(unknown.nonzero()[0])}", NEEDS_SNR
            raise DataError(self.path, self.columns[name].stored.key, *found, "Give the SNR of each scene.")


def unusable(name: str, values: Tensor, start: int) -> tuple[str, str] | None:
    """What rows (B, ...) of an array have that no estimate can be made of, with the first scene that has it, and what
    is expected; None where all is well. Rows are numbered from `start`."""
    flat = values.flatten(1) if values.dim() > 1 else values[:, None]
    wrong = flat.isinf() if name == "snr_db" else ~flat.isfinite()  # an SNR of NaN is one that is not known
    if bool(wrong.any()):
        what = "NaN or infinite values" if bool(flat.isnan().any()) else "infinite values or numbers beyond 3.4e38"
        return f"{what}, the first in scene {start + _first(wrong)}", "finite numbers in float32"
    silent = (flat == 0).all(1)[:, None]
    if name != "snr_db" and bool(silent.any()):
        return f"nothing but zeros in scene {start + _first(silent)}, in float32", "numbers above 1e-45"
    return None


def _first(wrong: Tensor) -> int:
    return int(wrong.any(1).nonzero()[0])


def open_measurements(path: Path, task: Task, *, split: str | None = None) -> list[MeasurementFile]:
    """The files at `path`, their headers checked against the task; reads no array.

    Args: path: one file; a folder that `ris-fast simulate` wrote; a folder with train/, val/ and test/; or a folder of
        files. split: which scenes, where there are splits; the test scenes by default.
    Raises: DataError that names the file and the array, what was found and what was expected.
    """
    if not path.exists():
        raise DataError(path, "", "no such file or folder", EXPECTED, "Give the right --data.")
    if path.is_dir() and (path / MANIFEST).is_file():
        manifest = read_manifest(path, task, SAME_ARRAY, OTHER_TASK)
        entries = manifest["splits"][split or "test"]["shards"]
        return [open_file(path / entry["file"], task, entry["sha256"]) for entry in entries]
    if path.is_dir() and any((path / name).is_dir() for name in SPLITS):
        files = _files(path / (split or "test"))
    elif split is not None:
        raise DataError(path, "", "no splits", "train/, val/ and test/", "Leave --split out: all scenes are meant.")
    else:
        files = _files(path) if path.is_dir() else [path]
    opened = [open_file(file, task) for file in files]
    for one in opened:
        if ("channel" in one.columns) != ("channel" in opened[0].columns):
            lacking = one if "channel" in opened[0].columns else opened[0]
            raise DataError(
                lacking.path,
                "channel",
                "no such array",
                "it, as other files have it",
                "Keep them in different folders.",
            )
    return opened


def _files(folder: Path) -> list[Path]:
    """The .npz or .safetensors files of a folder, sorted. Hidden ones are other systems' notes."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in there if path.suffix.lower() in ENDINGS and not path.name.startswith(".")]
    if not files:
        found = "no .npz or .safetensors file" if folder.is_dir() else "no such folder"
        raise DataError(folder, "", found, "scenes", "Give the right --data, or another --split.")
    return files


def open_file(path: Path, task: Task, sha256: str | None = None) -> MeasurementFile:
    """One file, the shapes and types of its arrays checked against the task. Raises: DataError."""
    arrays = _arrays(path)
    length, antennas, elements = task.snapshots, task.bs_antennas, task.elements
    rows = {
        "snapshots": (length, antennas, 2),
        "channel": (antennas, elements, 2),
        "effective_channel": (length, antennas, 2),
        "codes": (length, elements, 2),
        "snr_db": (),
    }
    if "channel" in arrays:
        arrays.pop("effective_channel", None)
    scenes = arrays["snapshots"].shape[0] if arrays["snapshots"].shape else 0
    columns, shared = {}, None
    for name, stored in arrays.items():
        if name == "codes" and _axes(stored) == rows["codes"]:
            shared = Column(stored, rows["codes"][1:])
            continue
        column = Column(stored, rows[name])
        _check_column(name, column, scenes)
        columns[name] = column
    if scenes == 0:
        raise DataError(
            path, columns["snapshots"].stored.key, "no scene (0 rows)", "at least one", "Give another file."
        )
    return MeasurementFile(path, columns, shared, sha256)


def _arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file by the names of `Measured`. Raises: DataError where one is missing or not of numbers."""
    wanted = {key for keys in NAMES.values() for key in keys}
    if path.suffix.lower() not in ENDINGS:
        raise DataError(path, "", "a file of another kind", EXPECTED, "Give a file whose name ends in one of these.")
    read, keys = (npz_arrays, npz_keys) if path.suffix.lower() == ".npz" else (safetensors_arrays, safetensors_keys)
    found = read(path, wanted)
    arrays = {name: found[key] for name, names in NAMES.items() for key in names[::-1] if key in found}
    missing = [name for name in ("snapshots", "codes") if name not in arrays]
    if "channel" not in arrays and "effective_channel" not in arrays:
        missing.append("channel")
    if missing:
        there = ", ".join(keys(path)) or "nothing"
        names = " and ".join(" or ".join(NAMES[name]) for name in missing)
        raise DataError(path, ", ".join(missing), f"no such array, but {there}", names, "Write it into the file.")
    for name, stored in arrays.items():
        if stored.dtype.kind not in KINDS or (name == "snr_db" and stored.dtype.kind == "c"):
            wanted_type = "numbers of dB" if name == "snr_db" else "numbers, complex or as pairs (re, im)"
            raise DataError(path, stored.key, f"type {stored.dtype}", wanted_type, "Convert it, and write it again.")
    return arrays


def _axes(stored: StoredArray) -> tuple[int, ...]:
    """The shape in a file, complex numbers as pairs."""
    return stored.shape + ((2,) if stored.dtype.kind == "c" else ())


def _check_column(name: str, column: Column, scenes: int) -> None:
    """Rows of the task's shape, as many as there are snapshots. Raises: DataError."""
    stored = column.stored
    if not column.fits and stored.dtype.kind != "c" and _lacks_pairs(stored.shape, column.row):
        todo = "Write real and imaginary parts."
        raise DataError(
            stored.file, stored.key, f"real numbers, {stored.shape}", expected_shape(name, column.row), todo
        )
    if not column.fits:
        raise DataError(stored.file, stored.key, f"shape {stored.shape}", expected_shape(name, column.row), OTHER_TASK)
    if column.rows != scenes:
        what = f"{scenes}, as there are snapshots"
        raise DataError(stored.file, stored.key, f"{column.rows} scenes", what, "Write all arrays of the same scenes.")


def _lacks_pairs(shape: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Whether real numbers have the shape of complex ones, for some scenes or, as of codes, for all."""
    return bool(row) and without_ones(row[:-1]) in (without_ones(shape), without_ones(shape[1:]))


def expected_shape(name: str, row: Sequence[int]) -> str:
    """The shape of an array in words, for an error."""
    if not row:
        return "(scenes,)"
    sizes = ", ".join(map(str, row[:-1]))
    shared = f"({sizes}) or " if name == "codes" else ""
    return f"{shared}(scenes, {sizes}) complex, or real pairs with a last axis of 2"


def check_values(files: Sequence[MeasurementFile], rows: int, limit: int, progress: Callable[[int, int], None]) -> None:
    """Reads the first `limit` scenes once, so that hours of work on them do not end at a NaN. Raises: DataError."""
    done = 0
    for measured in read_chunks(files, rows, limit):
        done += len(measured.snapshots)
        progress(done, limit)


def read_chunks(files: Sequence[MeasurementFile], rows: int, limit: int) -> Iterator[Measured]:
    """The first `limit` scenes of all files in order, at most `rows` at a time. Raises: DataError."""
    left = limit
    for file in files:
        take = min(left, file.scenes)
        if take:
            yield from file.chunks(rows, take)
        left -= take
