"""Reader of our own data sets (see write.py), and the check of a data set against its manifest.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.config import Config, Task
from ris_fast.data.arrays import COPY_AGAIN, StoredArray, safetensors_arrays
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import Overlap, find_overlap, scene_hashes
from ris_fast.data.geometry import target_factor
from ris_fast.data.npz_format import check_finite
from ris_fast.data.statistics import differences, measure
from ris_fast.data.table import Placement, Table, place_table
from ris_fast.data.write import COLUMNS, FORMAT, MANIFEST, VERSION, file_hash
from ris_fast.physics.array import RISArray, direction_cosines
from ris_fast.physics.random import SPLITS
from ris_fast.physics.scenes import Scenes

BIG = ("snapshots", "channel")
CHUNK = 512
WRITE_AGAIN = "Write the data set again with `ris-fast simulate`, or copy it again."


class ShardSource:
    """Scenes of a folder written by `ris-fast simulate`. train and val are read on opening, test on first use."""

    name = "shards"
    channel = True
    endless = False

    def __init__(self, config: Config, device: torch.device | str) -> None:
        self.task, self.path, self.device = config.task, Path(config.data.path), torch.device(device)
        self.array = RISArray.of(config.task)
        self.manifest = read_manifest(self.path, config.task)
        self._found = {split: self.manifest["splits"][split]["scenes"] for split in SPLITS}
        self._sizes = {split: min(found, getattr(config.data, f"{split}_scenes"))
                       for split, found in self._found.items()}
        self._loaded: dict[str, tuple[Table, Tensor, Placement]] = {}
        self._hashes: dict[str, list[bytes]] = {}
        for split in SPLITS[:2]:
            self._load(split)
        self.overlaps = self._find_overlaps()
        self.notes = [str(overlap) for overlap in self.overlaps]
        self.notes += [f"{self._sizes[split]} of {found} {split} scenes in use (data.{split}_scenes)"
                       for split, found in self._found.items() if found > self._sizes[split]]

    @property
    def index_device(self) -> torch.device:
        """Where row numbers are cheapest to look up."""
        return self._load("train")[0].device

    def size(self, split: str) -> int:
        return self._sizes[split]

    def batch(self, split: str, index: Tensor) -> Scenes:
        """Scenes by their number in the split, any order: on the source's device."""
        table, codes, _ = self._load(split)
        index = index.to(table.device, torch.int64)
        taken = {name: value.to(self.device) for name in COLUMNS if (value := table.take(name, index)) is not None}
        u, v = direction_cosines(taken["azimuth"], taken["elevation"])
        factor = target_factor(self.array, u, v, taken["range_m"], taken["power"])
        return Scenes(codes=codes.to(self.device), index=index.to(self.device), factor=factor, **taken)

    def describe(self) -> str:
        sizes = ", ".join(f"{self._sizes[split]} {split}" for split in SPLITS)
        return (f"{self.path} (shards, seed {self.manifest['seed']}): {sizes} scenes, with the channel; "
                f"target: exact factors; {self._load('train')[2]}")

    def files(self, split: str) -> list[tuple[Path, dict[str, Any]]]:
        """The shard files of a split with their entries in the manifest."""
        return [(self.path / entry["file"], entry) for entry in self.manifest["splits"][split]["shards"]]

    def _load(self, split: str) -> tuple[Table, Tensor, Placement]:
        if split not in self._loaded:
            shards = [open_own_shard(path, entry, self.task) for path, entry in self.files(split)]
            self._loaded[split], self._hashes[split] = self._read(shards, self._sizes[split])
        return self._loaded[split]

    def _read(self, shards: list[dict[str, StoredArray]],
              rows: int) -> tuple[tuple[Table, Tensor, Placement], list[bytes]]:
        """One pass in order: finite values, hashes, and the columns where they will stay."""
        row_bytes = sum(shards[0][name].row_bytes for name in COLUMNS)
        placement = place_table(self.path, rows * row_bytes, self.device, mappable=True)
        table = Table(rows, self.device if placement.place == "device" else torch.device("cpu"))
        hashes: list[bytes] = []
        codes = torch.from_numpy(np.array(shards[0]["codes"].map()))
        start = 0
        for shard in shards:
            if not np.array_equal(shard["codes"].map(), codes):
                raise DataError(shard["codes"].file, "codes", "other codes than in the first shard",
                                "one set for all scenes", WRITE_AGAIN)
            take = min(shard["snapshots"].shape[0], rows - start)
            for name in COLUMNS if take > 0 else ():
                on_disk = placement.place == "mapped" and name in BIG
                for at, raw in zip(range(0, take, CHUNK), shard[name].chunks(CHUNK, take)):
                    chunk = torch.from_numpy(raw)
                    check_finite(shard[name].file, name, chunk, at)
                    hashes += scene_hashes(chunk) if name == "snapshots" else []
                    if not on_disk:
                        table.write(start + at, name, chunk)
                if on_disk:
                    table.attach(name, shard[name].map())
            start += max(take, 0)
        check_finite(shards[0]["codes"].file, "codes", codes, 0)
        return (table, codes.to(table.device), placement), hashes

    def _find_overlaps(self) -> list[Overlap]:
        overlap = find_overlap("train", self._hashes["train"], "val", self._hashes["val"])
        return [overlap] if overlap.count else []


def read_manifest(path: Path, task: Task) -> dict[str, Any]:
    """The manifest, if it describes this very task. Raises: DataError."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(path, "", f"no {MANIFEST}", "a data set written by `ris-fast simulate`",
                        "Give the right data.path, or write one.") from None
    except ValueError as problem:
        raise DataError(file, "", f"no readable JSON ({problem})", "a manifest", COPY_AGAIN) from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise DataError(file, "format", f"{manifest.get('format') if isinstance(manifest, dict) else manifest!r}",
                        f"'{FORMAT}' version {VERSION}", WRITE_AGAIN)
    missing = {"task", "seed", "splits"} - set(manifest) or set(SPLITS) - set(manifest["splits"])
    if missing:
        raise DataError(file, sorted(missing)[0], "no such entry", "it", COPY_AGAIN)
    for key, value in asdict(task).items():
        if manifest["task"].get(key) != value:
            raise DataError(file, f"task.{key}", f"{manifest['task'].get(key)!r} in the data",
                            f"{value!r}, as configured",
                            f"Use --set task.{key}={manifest['task'].get(key)}, or write a data set of this task.")
    return manifest


def open_own_shard(path: Path, entry: dict[str, Any], task: Task) -> dict[str, StoredArray]:
    """The arrays of one shard, their size, types and shapes checked against the manifest. Raises: DataError."""
    if not path.is_file():
        raise DataError(path, "", "no such file", "it, because the manifest lists it", COPY_AGAIN)
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(path, "", f"{size} bytes", f"{entry['bytes']} bytes, as the manifest says", COPY_AGAIN)
    arrays = safetensors_arrays(path)
    l, m, n, k, rows = task.snapshots, task.bs_antennas, task.elements, task.max_sources, entry["scenes"]
    shapes = {"codes": (l, n, 2), "snapshots": (rows, l, m, 2), "channel": (rows, m, n, 2), "snr_db": (rows,),
              "count": (rows,), **{name: (rows, k) for name in ("azimuth", "elevation", "range_m", "power")}}
    for name, shape in shapes.items():
        dtype = np.dtype(np.int64 if name == "count" else np.float32)
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            what = "no such array" if found is None else f"shape {found.shape} of {found.dtype}"
            raise DataError(path, name, what, f"shape {shape} of {dtype}", WRITE_AGAIN)
    return arrays


def verify_manifest(source: Any, *, contents: bool = True) -> list[str]:
    """Does what training reads match the manifest? One sentence for each thing that does not; empty: all is well.

    Reads the first shard of each split through `source.batch`, the path that training uses, and compares its
    statistics; with `contents`, hashes every file (about 1 GB/s). A source without a manifest has nothing to check.
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
