"""Scenes from the original pipeline's .npz shards.

What it does about the original's habits: the off-centre array is shifted to the centred one; the dense R is replaced
by its exact factors where there are any; scenes shared between splits are counted; a missing H_full is said aloud.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.data_path import ONE_POOL, find_npz
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import Overlap, find_copies, find_overlap
from ris_fast.data.geometry import Reach, target_factor
from ris_fast.data.npz_format import open_shard
from ris_fast.data.npz_load import LoadedSplit, hash_snapshots, load_split
from ris_fast.data.npz_notes import NO_CHANNEL, channel_notes, fit_note, geometry_notes, snr_notes
from ris_fast.data.packed_codes import PACKED, packed_bytes, unpack_codes
from ris_fast.data.splits import size_notes, split_rows
from ris_fast.physics.array import RISArray
from ris_fast.physics.random import SPLITS
from ris_fast.physics.scenes import Scenes

COLUMNS = (
    "snapshots",
    "channel",
    "effective_channel",
    "covariance",
    "azimuth",
    "elevation",
    "range_m",
    "power",
    "u",
    "v",
    "count",
    "snr_db",
)


class NpzSource:
    """Scenes of a folder with train/, val/ and test/, of a flat folder, or of one file.

    train and val are read when the source is opened, test when first asked for. `notes` are lines that a person
    should read before training. Raises: DataError on opening, or on first use of test.
    """

    name = "npz"
    endless = False

    def __init__(
        self, config: Config, device: torch.device | str, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.task, self.path, self.device = config.task, Path(config.data.path), torch.device(device)
        self.array, self._config, self._progress = RISArray.of(config.task), config, progress
        wanted = {split: getattr(config.data, f"{split}_scenes") for split in SPLITS}
        self._shards = {
            part: [open_shard(file, config.task) for file in files] for part, files in find_npz(self.path).items()
        }
        self.channel = self._same_channel()
        self._found = {part: sum(s.scenes for s in shards) for part, shards in self._shards.items()}
        self._rows: dict[str, Tensor] = {}
        if ONE_POOL in self._shards:
            self._rows = split_rows(self.path, self._found[ONE_POOL], wanted)
            self._sizes = {split: rows.numel() for split, rows in self._rows.items()}
        else:
            self._sizes = {split: min(self._found.get(split, 0), wanted[split]) for split in SPLITS}
        self._loaded: dict[str, LoadedSplit] = {}
        for split in SPLITS[:2]:
            self._load(split)
        self._rows = {split: rows.to(self.index_device) for split, rows in self._rows.items()}
        self.overlaps = self._find_overlaps()
        self.notes = self._notes()

    @property
    def reach(self) -> tuple[Reach, Reach]:
        """How far the training sources go: as the files have them, and as the scenes do."""
        facts = self._load("train").facts
        return facts.stored, facts.served

    @property
    def lacks(self) -> tuple[str, ...]:
        """The fields of `Scenes` that the scenes of training or validation do not have."""
        exact = all(self._load(split).facts.exact for split in SPLITS[:2])
        return (() if exact else ("factor", "power")) + (() if self.channel else ("channel",))

    @property
    def index_device(self) -> torch.device:
        """Where row numbers are cheapest to look up."""
        return self._load("train").table.device

    def size(self, split: str) -> int:
        return self._sizes[split]

    def batch(self, split: str, index: Tensor) -> Scenes:
        """Scenes by their number in the split, any order: on the source's device."""
        if not self._sizes[split]:
            raise DataError(
                self.path,
                "",
                f"no {split} scenes",
                f"a folder {split}/ with shards",
                "Add it, or put all shards into one flat folder to have them split by number.",
            )
        return self.assemble(split, self.read(split, index))

    @property
    def reads_ahead(self) -> bool:
        """Whether training gains by a thread that reads ahead, as of shards."""
        tier = self._load("train").memory.tier
        return tier == "files" or (tier == "host" and self.device.type == "cuda")

    def read(self, split: str, index: Tensor) -> dict[str, Tensor]:
        """The columns of scenes by number, where they are kept; on any thread."""
        table = self._load(split).table
        index = index.to(table.device, torch.int64)
        rows = self._rows[split][index] if self._rows else index
        taken = {name: value for name in (*COLUMNS, *PACKED) if (value := table.take(name, rows)) is not None}
        return taken | {"index": index}

    def assemble(self, split: str, columns: dict[str, Tensor]) -> Scenes:
        """The scenes of these columns on the source's device."""
        loaded = self._load(split)
        taken = {name: value.to(self.device, non_blocking=True) for name, value in columns.items()}
        codes = self._codes(loaded, *(taken.pop(name, None) for name in PACKED), taken["index"].numel())
        if loaded.facts.exact:
            u, v = taken.pop("u"), taken.pop("v")
            taken["factor"] = target_factor(self.array, u, v, taken["range_m"], taken["power"])
        else:
            trace = taken["covariance"][..., 0].diagonal(dim1=1, dim2=2).sum(1)
            taken["covariance"] = taken["covariance"] * (self.array.elements / trace)[:, None, None, None]
        return Scenes(codes=codes, **taken)

    def _codes(self, loaded: LoadedSplit, own: Tensor | None, unit: Tensor | None, scenes: int) -> Tensor:
        """(L, N, 2), or (B, L, N, 2) as soon as the scenes of any split in memory have codes of their own."""
        if own is not None:
            return own if unit is None else unpack_codes(own, unit)
        assert loaded.codes is not None
        shared = loaded.codes.to(self.device)
        each = any(other.codes is None for other in self._loaded.values())
        return shared.repeat(scenes, 1, 1, 1) if each else shared

    def describe(self) -> str:
        """One line: how many scenes, what the inputs carry, what the target is, where it all lives."""
        sizes = ", ".join(f"{self._sizes[split]} {split}" for split in SPLITS)
        carries = (
            "with the channel H_full"
            if self.channel
            else "WITHOUT the channel (no H_full, only H c_l): these inputs cannot carry the answer"
        )
        loaded = self._load("train")
        fit = self.target_fit("train")
        target = (
            f"{'exact factors of R' if loaded.facts.exact else 'the dense R'} (NMSE of R on its own sources: "
            f"median {float(fit.median()):.2g}, largest {float(fit.max()):.2g})"
        )
        return f"{self.path} (.npz): {sizes} scenes, {carries}; target: {target}; {loaded.memory}"

    def target_fit(self, split: str) -> Tensor:
        """NMSE of each scene's R fitted as a sum over the scene's own sources: (scenes,) float64.

        About 1e-11 for R made of the sources as they are stored, 0.01 where elements moved by a few hundredths of a
        wavelength, 1 where R belongs to other sources or the task's array is not the files'.
        """
        fit = torch.cat(self._load(split).facts.fits)
        return fit[self._rows[split].cpu()] if self._rows else fit

    def labels(self, split: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ptr (B, 3 K_max) as stored, K (B,) and the dense R (B, N, N, 2) of scenes by number, on the CPU.

        Only where the target is the dense R: exact factors belong to their sources by construction.
        """
        loaded = self._load(split)
        index = index.to(loaded.table.device, torch.int64)
        rows = self._rows[split][index] if self._rows else index
        ptr, count, covariance = (loaded.table.take(name, rows) for name in ("ptr", "count", "covariance"))
        assert ptr is not None and count is not None and covariance is not None
        return ptr.cpu(), count.cpu(), covariance.cpu()

    def _same_channel(self) -> bool:
        """Whether the shards carry H_full. All of them must agree."""
        shards = [shard for part in self._shards.values() for shard in part]
        for shard in shards:
            if shard.channel != shards[0].channel:
                have, lack = (shard, shards[0]) if shard.channel else (shards[0], shard)
                raise DataError(
                    lack.path,
                    "H_full",
                    "no such key",
                    f"it, because {have.path.name} has it",
                    "Keep shards with and without H_full in different folders.",
                )
        return shards[0].channel

    def _load(self, split: str) -> LoadedSplit:
        part = ONE_POOL if self._rows else split
        if part not in self._loaded:
            rows = sum(self._sizes.values()) if self._rows else self._sizes[split]
            self._loaded[part] = load_split(
                self.path, self._shards[part], rows, self.task, self.device, self._progress, self._config.data.memory
            )
        return self._loaded[part]

    def hashes(self, split: str) -> np.ndarray:
        """(scenes,) uint64: a hash for each scene of a split, in order."""
        if split == "test" and not self._rows and split not in self._loaded:
            return hash_snapshots(self._shards.get(split, ()), self._sizes[split])
        all_rows = np.concatenate(self._load(split).facts.hashes)
        return all_rows[self._rows[split].cpu().numpy()] if self._rows else all_rows

    def _find_overlaps(self) -> list[Overlap]:
        train, val, test = (self.hashes(split) for split in SPLITS)
        found = (
            find_overlap("train", train, "val", val),
            find_overlap("train", train, "test", test),
            find_overlap("val", val, "test", test),
        )
        return [overlap for overlap in found if overlap.count]

    def _notes(self) -> list[str]:
        loaded = self._load("train")
        notes = [str(overlap) for overlap in self.overlaps]
        if copies := find_copies(self.hashes("train")):
            notes.append(
                f"{copies} of {self._sizes['train']} train scenes {'repeats' if copies == 1 else 'repeat'} an"
                " earlier one"
            )
        notes += [] if self.channel else [NO_CHANNEL]
        notes += geometry_notes(loaded.facts)
        if loaded.codes is None:
            kept = packed_bytes(self.task.snapshots, self.task.elements) / 1e3
            notes.append(f"each scene has codes of its own: they are kept in 16 bits, {kept:.1f} kB a scene")
        notes += [] if loaded.facts.exact else [fit_note(self.target_fit("train"))]
        notes += channel_notes(loaded.facts)
        return notes + self._size_notes() + snr_notes(loaded.table.columns["snr_db"], self.task)

    def _size_notes(self) -> list[str]:
        if not self._rows:
            return size_notes(self._config, self._found, self._sizes)
        return [
            (
                f"no train/ folder: the {sum(self._sizes.values())} of {self._found[ONE_POOL]} scenes in use are "
                "split by number, validation and test at even distances, train the rest"
            ),
            *size_notes(self._config, self._sizes, self._sizes),
        ]
