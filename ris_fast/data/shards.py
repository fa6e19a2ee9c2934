"""Reader of our own data sets (see write.py and converted.py), and the check of a data set against its manifest.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import Config, Task
from ris_fast.data.arrays import COPY_AGAIN, StoredArray, safetensors_arrays
from ris_fast.data.errors import DataError
from ris_fast.data.file_rows import unreadable
from ris_fast.data.fingerprints import Overlap, find_overlap, scene_hashes
from ris_fast.data.geometry import Reach, target_factor
from ris_fast.data.manifest import WRITE_AGAIN, columns_of, file_hash, manifest_notes, read_manifest
from ris_fast.data.npz_format import check_finite
from ris_fast.data.packed_codes import PACKED, pack_codes, packed_bytes, unpack_codes
from ris_fast.data.prefetch import in_threads
from ris_fast.data.shard_columns import BIG, CODES, column_type, row_bytes, shard_shapes
from ris_fast.data.splits import size_notes
from ris_fast.data.statistics import differences, measure
from ris_fast.data.table import SHARE, Table, TableMemory, choose_memory
from ris_fast.data.verification import Verification, threads_to_open
from ris_fast.physics.array import RISArray, direction_cosines
from ris_fast.physics.random import SPLITS
from ris_fast.physics.scenes import Scenes

CHUNK = 512
GEOMETRY = ("azimuth", "elevation", "range_m")


@dataclass(frozen=True)
class OwnShard:
    """One file that has its size and header as the manifest and the task say."""

    path: Path
    sha256: str
    arrays: dict[str, StoredArray]

    @property
    def scenes(self) -> int:
        return self.arrays["snapshots"].shape[0]

    def check_contents(self) -> None:
        """Every byte is the one that was written; about a second for a gigabyte. Raises: DataError."""
        try:
            found = file_hash(self.path)
        except OSError as problem:
            raise unreadable(self.path, problem) from None
        if found != self.sha256:
            raise DataError(
                self.path,
                "",
                f"other bytes than were written (SHA-256 {found[:12]}...)",
                f"SHA-256 {self.sha256[:12]}..., as the manifest says",
                COPY_AGAIN,
            )


class ShardSource:
    """Scenes of a folder written by `ris-fast simulate` or `ris-fast convert`.

    On opening every file must be there in its full size. train and val are read then, test when first asked for; the
    contents of what is read must have the manifest's SHA-256. Raises: DataError on opening, or on first use of test.
    """

    name = "shards"
    endless = False

    def __init__(
        self, config: Config, device: torch.device | str, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.task, self.path, self.device = config.task, Path(config.data.path), torch.device(device)
        self.array, self._progress = RISArray.of(config.task), progress
        self.manifest = read_manifest(self.path, config.task)
        self.columns = columns_of(self.manifest)
        self._found = {split: self.manifest["splits"][split]["scenes"] for split in SPLITS}
        self._sizes = {
            split: min(found, getattr(config.data, f"{split}_scenes")) for split, found in self._found.items()
        }
        self._shards = {
            split: [open_own_shard(path, entry, self.task, self.columns) for path, entry in self.files(split)]
            for split in SPLITS
        }
        self._loaded: dict[str, tuple[Table, Tensor | None, TableMemory]] = {}
        self._memory, self._verification = config.data.memory, Verification.here(config.data.verify)
        self._hashes: dict[str, np.ndarray] = {}
        for split in SPLITS[:2]:
            self._load(split)
        self.overlaps = self._find_overlaps()
        self.notes = [*manifest_notes(self.manifest), *self._verification.notes, *map(str, self.overlaps)]
        self.notes += size_notes(config, self._found, self._sizes)

    @property
    def channel(self) -> bool:
        return "channel" in self.columns

    @property
    def lacks(self) -> tuple[str, ...]:
        """The fields of `Scenes` that the scenes do not have."""
        missing = [name for name in ("channel", *GEOMETRY) if name not in self.columns]
        return (*(() if "power" in self.columns else ("factor", "power")), *missing)

    @property
    def reach(self) -> tuple[Reach, Reach] | None:
        """How far the training sources go, where they were converted from positions of files."""
        found = self.manifest.get("origin", {}).get("reach")
        return None if found is None else (Reach(*found["stored"]), Reach(*found["served"]))

    @property
    def index_device(self) -> torch.device:
        """Where row numbers are cheapest to look up."""
        return self._load("train")[0].device

    def size(self, split: str) -> int:
        return self._sizes[split]

    @property
    def reads_ahead(self) -> bool:
        """Whether training gains by a thread that reads ahead: for a GPU from host memory or files, for a CPU from
        files."""
        tier = self._load("train")[2].tier
        return tier == "files" or (tier == "host" and self.device.type == "cuda")

    def batch(self, split: str, index: Tensor) -> Scenes:
        """Scenes by their number in the split, any order: on the source's device."""
        return self.assemble(split, self.read(split, index))

    def read(self, split: str, index: Tensor) -> dict[str, Tensor]:
        """The columns of scenes by number, where they are kept; on any thread."""
        if not self._sizes[split]:
            todo = "Convert them together with the others, or use another split."
            raise DataError(self.path, "", f"no {split} scenes", "some", todo)
        table = self._load(split)[0]
        index = index.to(table.device, torch.int64)
        names = [*(name for name in self.columns if name != "target_nmse"), PACKED[1]]
        taken = {name: value for name in names if (value := table.take(name, index)) is not None}
        return taken | {"index": index}

    def assemble(self, split: str, columns: dict[str, Tensor]) -> Scenes:
        """The scenes of these columns on the source's device."""
        taken = {name: value.to(self.device, non_blocking=True) for name, value in columns.items()}
        shared, unit = self._load(split)[1], taken.pop(PACKED[1], None)
        codes = taken.pop(CODES) if shared is None else shared.to(self.device)
        if "power" in taken:
            u, v = (taken.pop(name, None) for name in ("u", "v"))
            if u is None or v is None:
                u, v = direction_cosines(taken["azimuth"], taken["elevation"])
            taken["factor"] = target_factor(self.array, u, v, taken["range_m"], taken["power"])
        return Scenes(codes=codes if unit is None else unpack_codes(codes, unit), **taken)

    def describe(self) -> str:
        sizes = ", ".join(f"{self._sizes[split]} {split}" for split in SPLITS)
        origin = self.manifest.get("origin", {}).get("format")
        made = f"seed {self.manifest['seed']}" if origin is None else f"converted from {origin}"
        carries = "with the channel" if self.channel else "WITHOUT the channel: these inputs cannot carry the answer"
        target = "exact factors" if "power" in self.columns else "the dense R"
        return f"{self.path} (shards, {made}): {sizes} scenes, {carries}; target: {target}; {self._load('train')[2]}"

    def files(self, split: str) -> list[tuple[Path, dict[str, Any]]]:
        """The shard files of a split with their entries in the manifest."""
        return [(self.path / entry["file"], entry) for entry in self.manifest["splits"][split]["shards"]]

    def _load(self, split: str) -> tuple[Table, Tensor | None, TableMemory]:
        if split not in self._loaded:
            self._loaded[split], self._hashes[split] = self._read(self._shards[split], self._sizes[split])
        return self._loaded[split]

    def _read(
        self, shards: Sequence[OwnShard], rows: int
    ) -> tuple[tuple[Table, Tensor | None, TableMemory], np.ndarray]:
        """One pass, several files at a time: contents, finite values, hashes of scenes, and the columns where they will
        stay."""
        bytes_of = {name: row_bytes(self.task, name) for name in self.columns}
        if CODES in bytes_of:
            bytes_of[CODES] = packed_bytes(self.task.snapshots, self.task.elements)
        memory = choose_memory(
            self.path, rows, sum(bytes_of.values()), self.device, streamable=True, wanted=self._memory
        )
        resident = memory.tier == "device"
        table = Table(
            rows, self.device if resident else torch.device("cpu"), self.device.type == "cuda" and not resident
        )
        left = BIG if memory.tier == "files" else ()
        if left and rows * sum(size for name, size in bytes_of.items() if name not in left) > SHARE * memory.free:
            left = self.columns
        left = [name for name in self.columns if name in left]
        starts = np.cumsum([0, *(shard.scenes for shard in shards)]).tolist()
        spans = [
            (number, shard, start, min(shard.scenes, rows - start))
            for number, (shard, start) in enumerate(zip(shards, starts))
            if start < rows
        ]
        hashes, codes, threads = [np.empty(0, np.uint64)], None, threads_to_open()
        looks = in_threads(lambda span: self._look(span, table, left), spans, threads, 2 * threads)
        for (_, shard, start, take), found in zip(spans, looks):
            hashes.append(found)
            codes = None if CODES in self.columns else _same_codes(shard, codes)
            for name in left:
                table.attach(name, shard.arrays[name])
            if self._progress is not None:
                self._progress(start + take, rows)
        return (table, None if codes is None else codes.to(table.device), memory), np.concatenate(hashes)

    def _look(self, span: tuple[int, OwnShard, int, int], table: Table, left: Sequence[str]) -> np.ndarray:
        """Checks a file and keeps its scenes; on a thread."""
        number, shard, start, take = span
        if left:
            table.files.see(shard.path)
        checked = self._verification.file(number)
        if checked:
            shard.check_contents()  # at once before it is read, while the system still has it in memory
        hashed = self._verification.scenes
        return _keep(shard, self.columns, table, start, take, left, checked=checked, hashed=hashed)

    def _find_overlaps(self) -> list[Overlap]:
        overlap = find_overlap("train", self._hashes["train"], "val", self._hashes["val"])
        return [overlap] if overlap.count else []


def _same_codes(shard: OwnShard, codes: Tensor | None) -> Tensor:
    """The codes of a shard, which must be those of the shards before it. Raises: DataError."""
    stored = shard.arrays["codes"]
    own = torch.from_numpy(next(stored.chunks(stored.shape[0], stored.shape[0])))
    check_finite(shard.path, "codes", own, 0)
    if codes is not None and not torch.equal(own, codes):
        raise DataError(
            shard.path, "codes", "other codes than in the first shard", "one set for all scenes", WRITE_AGAIN
        )
    return own


def _keep(
    shard: OwnShard,
    columns: Sequence[str],
    table: Table,
    start: int,
    take: int,
    left: Sequence[str],
    *,
    checked: bool,
    hashed: bool,
) -> np.ndarray:
    """Copies the first `take` scenes of a shard to rows start, ..., except for columns that are `left` in the file:
    these are read where they are `checked`, and snapshots where they are `hashed`. Returns the hashes. Raises:
    DataError."""
    hashes = [np.empty(0, np.uint64)]
    for name in columns:
        hashing = hashed and name == "snapshots"
        if name in left and not (checked or hashing):
            continue
        for at, raw in zip(range(0, take, CHUNK), shard.arrays[name].chunks(CHUNK, take)):
            chunk = torch.from_numpy(raw)
            check_finite(shard.path, name, chunk, at)
            if hashing:
                hashes.append(scene_hashes(chunk))
            if name in left:
                continue
            for key, values in zip(PACKED, pack_codes(chunk)) if name == CODES else ((name, chunk),):
                table.write(start + at, key, values)
    return np.concatenate(hashes)


def open_own_shard(path: Path, entry: dict[str, Any], task: Task, columns: Sequence[str]) -> OwnShard:
    """One shard, its size, types and shapes checked against the manifest; reads no array. Raises: DataError."""
    if not path.is_file():
        raise DataError(path, "", "no such file", "it, because the manifest lists it", COPY_AGAIN)
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(path, "", f"{size} bytes", f"{entry['bytes']} bytes, as the manifest says", COPY_AGAIN)
    arrays = safetensors_arrays(path)
    for name, shape in shard_shapes(task, columns, entry["scenes"]).items():
        dtype = column_type(name)
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            what = "no such array" if found is None else f"shape {found.shape} of {found.dtype}"
            raise DataError(path, name, what, f"shape {shape} of {dtype}", WRITE_AGAIN)
    return OwnShard(path, entry["sha256"], arrays)


def verify_manifest(source: Any, *, contents: bool = True) -> list[str]:
    """Does what training reads match the manifest? One sentence for each thing that does not; empty: all is well.

    Reads the first shard of each split through `source.batch`, the path that training uses, and compares its
    statistics; with `contents`, hashes every file anew (about 1 GB/s), also those that opening had no need to read. A
    source without a manifest has nothing to check.
    """
    if not isinstance(source, ShardSource):
        return []
    wrong: list[str] = []
    for split in SPLITS:
        for number, (path, entry) in enumerate(source.files(split)):
            if contents and file_hash(path) != entry["sha256"]:
                wrong.append(f"{path}: its SHA-256 is not the manifest's. {WRITE_AGAIN}")
            if number == 0 and entry["scenes"] <= source.size(split):
                found = measure(source.batch(split, torch.arange(entry["scenes"])), source.task.max_sources)
                wrong += [f"{path}: {sentence}" for sentence in differences(entry["statistics"], found)]
    return wrong
