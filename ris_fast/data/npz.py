"""Scenes from the original pipeline's .npz shards.

What it does about the original's habits: the off-centre array is shifted to the centred one; the dense R is replaced
by its exact factors where there are any; scenes shared between splits are counted; a missing H_full is said aloud.
Legend: B batch, L snapshots, M base-station antennas, N RIS elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import Overlap, find_copies, find_overlap
from ris_fast.data.geometry import CENTRED, Reach, target_factor
from ris_fast.data.npz_format import open_shard
from ris_fast.data.npz_load import APART, PACKED, LoadedSplit, clearly_apart, hash_snapshots, load_split
from ris_fast.data.packed_codes import packed_bytes, unpack_codes
from ris_fast.data.place import npz_files
from ris_fast.data.source import size_notes
from ris_fast.physics.array import RISArray
from ris_fast.physics.random import SPLITS
from ris_fast.physics.scenes import Scenes

ONE_POOL = "all"
BEYOND_DB = 0.5  # labels that are measured go a little beyond the range that was asked for


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
        loaded = self._load(split)
        index = index.to(loaded.table.device, torch.int64)
        rows = self._rows[split][index] if self._rows else index
        taken = {
            name: value.to(self.device) for name in _COLUMNS if (value := loaded.table.take(name, rows)) is not None
        }
        codes = self._codes(loaded, rows)
        if loaded.facts.exact:
            u, v = taken.pop("u"), taken.pop("v")
            taken["factor"] = target_factor(self.array, u, v, taken["range_m"], taken["power"])
        else:
            trace = taken["covariance"][..., 0].diagonal(dim1=1, dim2=2).sum(1)
            taken["covariance"] = taken["covariance"] * (self.array.elements / trace)[:, None, None, None]
        return Scenes(codes=codes, index=index.to(self.device), **taken)

    def _codes(self, loaded: LoadedSplit, rows_B: Tensor) -> Tensor:
        """(L, N, 2), or (B, L, N, 2) as soon as the scenes of any split in memory have codes of their own."""
        if loaded.codes is None:
            codes, unit = (loaded.table.take(name, rows_B) for name in PACKED)
            return (codes if unit is None else unpack_codes(codes, unit)).to(self.device)
        shared = loaded.codes.to(self.device)
        own = any(each.codes is None for each in self._loaded.values())
        return shared.repeat(rows_B.numel(), 1, 1, 1) if own else shared

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
        return f"{self.path} (.npz): {sizes} scenes, {carries}; target: {target}; {loaded.placement}"

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
            self._loaded[part] = load_split(self.path, self._shards[part], rows, self.task, self.device, self._progress)
        return self._loaded[part]

    def hashes(self, split: str) -> list[bytes]:
        """16 bytes for each scene of a split, in order."""
        if split == "test" and not self._rows and split not in self._loaded:
            return hash_snapshots(self._shards.get(split, ()), self._sizes[split])
        all_rows = self._load(split).facts.hashes
        return [all_rows[i] for i in self._rows[split].tolist()] if self._rows else all_rows

    def _find_overlaps(self) -> list[Overlap]:
        train, val, test = (self.hashes(split) for split in SPLITS)
        found = (
            find_overlap("train", train, "val", val),
            find_overlap("train", train, "test", test),
            find_overlap("val", val, "test", test),
        )
        return [overlap for overlap in found if overlap.count]

    def _notes(self) -> list[str]:
        facts = self._load("train").facts
        notes = [str(overlap) for overlap in self.overlaps]
        if copies := find_copies(self.hashes("train")):
            notes.append(
                f"{copies} of {self._sizes['train']} train scenes {'repeats' if copies == 1 else 'repeat'} an"
                " earlier one"
            )
        if not self.channel:
            notes.append(
                "no H_full in the files: the map from measurement to aperture is lost, and the validation "
                "NMSE will stay near 0.97 however well the optimizer works; generate the shards with H_full"
            )
        if facts.offset != CENTRED:
            notes.append(
                f"the files' array is off-centre by {_spacings(facts.offset)}: source positions are "
                "re-expressed for the centred array, which leaves every covariance as it is"
            )
        if facts.clamped:
            notes.append(
                f"sources so near the edge that their shifted direction does not exist: {facts.clamped}; "
                "their angle labels are the nearest that do, their covariances are exact"
            )
        if self._load("train").codes is None:
            kept = packed_bytes(self.task.snapshots, self.task.elements) / 1e3
            notes.append(f"each scene has codes of its own: they are kept in 16 bits, {kept:.1f} kB a scene")
        if not facts.exact:
            notes.append(self._fit_note())
        if facts.wrong_collapsed:
            why = (
                "but H_full times the conjugate of c_l: the codes are conjugated, in the files or in H"
                if 2 * facts.conjugate_codes > facts.wrong_collapsed
                else "H, H_full or the codes are wrong"
            )
            notes.append(
                f"in {facts.wrong_collapsed} scenes H is not H_full c_l{', ' if why.startswith('but') else ': '}{why}"
            )
        return notes + self._size_notes() + self._snr_note()

    def _fit_note(self) -> str:
        fit = self.target_fit("train")
        apart = clearly_apart(fit)
        said = (
            f"R is not exactly a sum over its own sources: NMSE {float(fit.median()):.2g} at the median, "
            f"{float(fit.max()):.2g} at most; the dense R is used as the target"
        )
        if apart == 0:
            return f"{said}. Element jitter, or a slightly different array, does this"
        return (
            f"{said}. In {apart} of {fit.numel()} train scenes (NMSE above {APART:g}) R does not belong to the scene's"
            " sources, or the task's array is not the one of the files"
        )

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

    def _snr_note(self) -> list[str]:
        snr = self._load("train").table.columns["snr_db"]
        ends = {float(end): int((snr == end).sum()) for end in torch.aminmax(snr)}
        clipped = [f"{count} at {end:g} dB" for end, count in ends.items() if count > max(3, 0.002 * snr.numel())]
        low, high = (float(each) for each in torch.aminmax(snr))
        if high > self.task.snr_max_db + BEYOND_DB:
            beyond = [f"snr labels go up to {high:.3g} dB; the task says {self.task.snr_max_db:g}"]
        elif low < self.task.snr_min_db - BEYOND_DB:
            beyond = [f"snr labels go down to {low:.3g} dB; the task says {self.task.snr_min_db:g}"]
        else:
            beyond = []
        return beyond + (
            [f"snr labels pile up at an end ({', '.join(clipped)}): they were clipped there"] if clipped else []
        )


_COLUMNS = (
    "snapshots",
    "channel",
    "collapsed",
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


def _spacings(offset: tuple[float, float]) -> str:
    """'half an element in both axes', '1.25 elements in x and -3 in y'."""
    named = {(-0.5, -0.5): "both axes", (-0.5, 0.0): "x", (0.0, -0.5): "y"}.get(offset)
    x, y = (round(each, 3) + 0.0 for each in offset)  # adding zero, minus zero loses its sign
    return f"half an element in {named}" if named else f"{x:g} elements in x and {y:g} in y"


def find_npz(path: Path) -> dict[str, list[Path]]:
    """Shard files by split, or all under one name where there is no train/ folder. Raises: DataError."""
    if path.is_file():
        return {ONE_POOL: [path]}
    folders = {split: npz_files(path / split) for split in SPLITS if (path / split).is_dir()}
    if not folders:
        files = npz_files(path)
        if not files:
            raise DataError(
                path,
                "",
                "no .npz file and no train/ folder",
                "shards, flat or in train/, val/, test/",
                "Give the right --data DIR, or generate the data.",
            )
        return {ONE_POOL: files}
    for split in ("train", "val"):
        if not folders.get(split):
            what = "an empty folder" if split in folders else "no such folder"
            raise DataError(
                path / split,
                "",
                what,
                f"at least one {split} shard (.npz)",
                "Add it, or put all shards into one flat folder to have them split by number.",
            )
    return {split: files for split, files in folders.items() if files}


def split_rows(path: Path, total: int, wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """Disjoint row numbers for each split out of one pool, the same on every call.

    The first sum(wanted) rows are used, or all of them in the same proportions. Validation and test are spread
    evenly, so that a file sorted by anything still gives fair splits.
    """
    asked = sum(wanted.values())
    if total < len(SPLITS):
        raise DataError(
            path, "", f"{total} scenes to split", f"at least {len(SPLITS)}", "Give more scenes, or train/ and val/."
        )
    used = min(total, asked)
    val, test = (max(1, wanted[split] * used // asked) for split in ("val", "test"))
    held = val + test
    if held >= used:
        val, test, held = 1, 1, 2
    positions = (2 * torch.arange(held) + 1) * used // (2 * held)
    chosen = (2 * torch.arange(test) + 1) * held // (2 * test)
    is_test = torch.zeros(held, dtype=torch.bool)
    is_test[chosen] = True
    is_train = torch.ones(used, dtype=torch.bool)
    is_train[positions] = False
    return {"train": is_train.nonzero()[:, 0], "val": positions[~is_test], "test": positions[is_test]}
