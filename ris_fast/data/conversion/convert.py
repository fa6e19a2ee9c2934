"""One pass over files of scenes that writes them as our shards; each array is decoded once, and little is in memory.

The values are checked as `NpzSource` checks them, positions are re-expressed for the centred array, and a dense R is
replaced by its exact factors where there are any: training on the converted set is training on the files.
Legend: B batch, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.conversion.building import Building
from ris_fast.data.conversion.labels import refuse_unrelated
from ris_fast.data.conversion.manifest import final_manifest
from ris_fast.data.conversion.scene_file import Files, SceneFile
from ris_fast.data.data_path import ONE_POOL
from ris_fast.data.errors import DataError
from ris_fast.data.geometry import CENTRED
from ris_fast.data.manifest import MANIFEST
from ris_fast.data.npz_format import check_values
from ris_fast.data.npz_load import (
    Assumption,
    Facts,
    centred_sources,
    compare_channels,
    find_offset_of,
    same_codes,
    target_columns,
)
from ris_fast.data.shard_columns import CODES, FORMAT, scene_bytes
from ris_fast.data.splits import split_rows
from ris_fast.data.unfinished import completed, finish, keep, kept, partial_of, read_plan, unfinished
from ris_fast.physics.array import RISArray
from ris_fast.physics.random import SPLITS

SHARD_BYTES = 2**27  # of one shard at most: what a conversion holds in memory is a few of them
SHARD_SCENES = 4096
VERSION = 2
SAME_POWER = 0.02  # of a scene's power, by which given powers may miss those of R


def convert(
    config: Config, files: Files, out_dir: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Writes files of scenes as a data set of ours; OUT appears under its name only when it is whole.

    Work in progress lies in OUT.partial; the same call again continues it shard by shard. All scenes are converted: of
    files without splits, validation and test in the proportions of data.train_scenes, val_scenes and test_scenes.
    Returns: the manifest's path. Raises: DataError for values that cannot be used, and as `write_shards` does.
    """
    out = Path(os.path.realpath(out_dir))
    known = _assumptions(out)
    while True:
        one = Conversion.of(config, files, **known)
        if completed(out, one.plan):
            return out / MANIFEST
        with unfinished(out, one.plan, one.total * scene_bytes(config.task, one.columns), one.total) as partial:
            try:
                receipts = one.run(partial, progress)
            except Assumption as found:
                known[found.setting] = False
                for shard in partial.glob("*-*"):
                    shard.unlink()  # with other columns than the set will have
                continue
            finish(partial, out, final_manifest(config, files.origin, one.plan, receipts, partial))
            return out / MANIFEST


def _assumptions(out: Path) -> dict[str, bool]:
    """What an earlier call had found out; nothing where there was none."""
    plan = read_plan(partial_of(out)) or read_plan(out)
    columns = plan.get("columns", ()) if isinstance(plan, dict) else ()
    return {"exact": "power" in columns, "shared": CODES not in columns} if columns else {}


@dataclass(frozen=True)
class Conversion:
    """What is settled before the pass. `exact`: the target is kept as source powers, else as the dense R; `shared`:
    all scenes have the codes of the first."""

    config: Config
    files: Files
    exact: bool
    shared: bool
    sizes: dict[str, int]
    rows: dict[str, Tensor]  # of each split, in the one pool; empty where files have splits
    offsets: dict[str, tuple[float, float]]  # of each part
    codes: dict[str, Tensor]  # of the first scene of each part

    @classmethod
    def of(cls, config: Config, files: Files, exact: bool = True, shared: bool = True) -> Conversion:
        totals = {part: sum(file.scenes for file in each) for part, each in files.parts.items()}
        rows = dict(files.rows)
        if ONE_POOL in totals and not rows:
            rows = _pool_rows(config, files.root, totals[ONE_POOL])
        sizes = {split: len(rows.get(split, ())) if rows else totals.get(split, 0) for split in SPLITS}
        keys = next(iter(files.parts.values()))[0].keys
        exact = exact and "ptr" in keys
        offsets, codes = {}, {}
        for part, each in files.parts.items():
            chunk = _first_chunk(config, each[0])
            codes[part] = chunk["codes"][0].clone()
            found = "R" in chunk and "ptr" in chunk and files.offset is None
            offset = find_offset_of(RISArray.of(config.task), chunk) if found else files.offset or CENTRED
            offsets[part] = (float(offset[0]), float(offset[1]))
            if "R" in chunk and "ptr" in chunk:
                refuse_unrelated(files.root, config.task, offsets[part], chunk)
        return cls(config, files, exact, shared, sizes, rows, offsets, codes)

    @property
    def keys(self) -> frozenset[str]:
        return next(iter(self.files.parts.values()))[0].keys

    @property
    def columns(self) -> list[str]:
        names = ["snapshots", "channel" if "H_full" in self.keys else "effective_channel"]
        names += ["azimuth", "elevation", "range_m"] if "ptr" in self.keys else []
        names += ["power", "u", "v"] if self.exact else ["covariance"]
        names += ["target_nmse"] if "ptr" in self.keys and not self.exact else []
        return [*names, "snr_db", "count", *([] if self.shared else [CODES])]

    @property
    def shard_scenes(self) -> int:
        return max(1, min(SHARD_SCENES, SHARD_BYTES // scene_bytes(self.config.task, self.columns)))

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def plan(self) -> dict[str, Any]:
        """What determines every byte of the data set."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": asdict(self.config.task),
            "scenes": self.sizes,
            "shard_scenes": self.shard_scenes,
            "columns": self.columns,
            "offsets": {part: list(offset) for part, offset in self.offsets.items()},
            "files": self.files.listing(),
            "settings": dict(self.files.settings),
        }

    def run(self, folder: Path, progress: Callable[[int, int], None] | None) -> dict[str, list[dict[str, Any]]]:
        """Writes every shard that is not there yet. Returns: the receipts of each split, in order."""
        one = _Pass(self, folder)
        read, total = 0, sum(file.scenes for each in self.files.parts.values() for file in each)
        try:
            for part, each in self.files.parts.items():
                start = 0
                for file in each:
                    for at, chunk in file.chunks(
                        lambda a, b, part=part, start=start: one.needs(part, start + a, start + b)
                    ):
                        checked(file, chunk, at, self.config)
                        one.take(part, start + at, chunk)
                        one.settle(end_of_file=not file.checked_at_end)
                        if progress is not None:
                            progress(read + at + len(chunk["K"]), total)
                    start, read = start + file.scenes, read + file.scenes
                    one.settle(end_of_file=True)
                    if progress is not None:
                        progress(read, total)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {one.whole:,} of {self.total:,} scenes are in {folder}. Run the same command again: it"
                " continues there."
            ) from None
        return {split: [one.receipts[split, number] for number in range(one.shards(split))] for split in SPLITS}


class _Pass:
    """The shards that are whole, those that are being built, and those that wait for the end of their file."""

    def __init__(self, plan: Conversion, folder: Path) -> None:
        self.plan, self.folder, self.array = plan, folder, RISArray.of(plan.config.task)
        self.receipts: dict[tuple[str, int], dict[str, Any]] = {}
        self.building: dict[tuple[str, int], Building] = {}
        self.waiting: list[tuple[tuple[str, int], dict[str, Any]]] = []
        for split in SPLITS:
            for number in range(self.shards(split)):
                if (receipt := kept(self.path(split, number), self.rows(split, number))) is not None:
                    self.receipts[split, number] = receipt

    @property
    def whole(self) -> int:
        """Scenes in shards that a later call keeps."""
        return sum(receipt["entry"]["scenes"] for receipt in self.receipts.values())

    def shards(self, split: str) -> int:
        return -(-self.plan.sizes[split] // self.plan.shard_scenes)

    def rows(self, split: str, number: int) -> int:
        return min(self.plan.shard_scenes, self.plan.sizes[split] - number * self.plan.shard_scenes)

    def path(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:05d}.safetensors"

    def needs(self, part: str, start: int, end: int) -> bool:
        """Whether rows start, ..., end - 1 of a part are in a shard that is not whole."""
        return any(True for _ in self._pieces(part, start, end))

    def _pieces(self, part: str, start: int, end: int) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """The shards that rows of a part belong to, unless they are whole: (split, number), rows in the part."""
        size = self.plan.shard_scenes
        for split in SPLITS if part == ONE_POOL else (part,):
            if part == ONE_POOL:
                chosen = self.plan.rows.get(split, torch.zeros(0, dtype=torch.int64))
                first, last = (int(torch.searchsorted(chosen, end_)) for end_ in (start, end))
            else:
                first, last = start, end
            for number in range(first // size, -(-last // size)):
                low, high = max(first, number * size), min(last, (number + 1) * size)
                if low < high and (split, number) not in self.receipts:
                    yield (
                        (split, number),
                        self.plan.rows[split][low:high] if part == ONE_POOL else torch.arange(low, high),
                    )

    def take(self, part: str, start: int, chunk: dict[str, Tensor]) -> None:
        """Rows start, ... of a part, into the shards that they belong to."""
        if self.plan.shared and not same_codes(chunk["codes"], self.plan.codes[part]):
            raise Assumption("shared")
        for key, rows in list(self._pieces(part, start, start + len(chunk["K"]))):
            if key not in self.building:
                facts = Facts(self.plan.exact, self.plan.offsets[part])
                codes = self.plan.codes[part].clone() if self.plan.shared else None
                self.building[key] = Building(self.path(*key), self.rows(*key), facts, codes)
            one = self.building[key]
            whole = len(rows) == len(chunk["K"])
            one.add(self._columns(one, chunk if whole else {name: each[rows - start] for name, each in chunk.items()}))
            if one.full:
                entry, facts = self.building.pop(key).write(self.plan.config.task.max_sources)
                self.waiting.append((key, {"entry": entry, "facts": facts}))

    def settle(self, *, end_of_file: bool) -> None:
        """Leaves receipts of what is written, once the bytes that it came from are known to be right."""
        if end_of_file:
            for key, receipt in self.waiting:
                keep(self.folder, receipt["entry"], receipt["facts"])
                self.receipts[key] = receipt
            self.waiting.clear()

    def _columns(self, one: Building, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the shard keeps of a chunk."""
        found = {"snapshots": chunk["y"], "snr_db": chunk["snr"].float(), "count": chunk["K"].to(torch.int64)}
        found |= {"channel": chunk["H_full"]} if "H_full" in chunk else {"effective_channel": chunk["H"]}
        found |= {} if self.plan.shared else {CODES: chunk["codes"]}
        found |= self._target(one, chunk)
        compare_channels(one.facts, chunk, chunk["codes"] if one.codes is None else one.codes)
        return {name: found[name].contiguous() for name in self.plan.columns}

    def _target(self, one: Building, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        if "R" not in chunk:
            return _given_powers(self.array, one.facts, chunk)
        columns = {} if self.plan.exact else {"covariance": _normalised(chunk["R"])}
        if "ptr" in chunk:
            columns |= target_columns(self.array, one.facts, chunk)
            fit = one.facts.fits.pop()
            columns |= {} if self.plan.exact else {"target_nmse": fit.float()}
            if "power" in columns and "power" in chunk:
                one.other_powers += _other_powers(chunk["power"], columns["power"])
        return columns


def _given_powers(array: RISArray, facts: Facts, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns of exact sources whose powers are given, scaled so that R has the trace N."""
    sources, active = centred_sources(array, facts, chunk)
    power = (chunk["power"].double() * active).clamp_min(0.0)
    power = power * (array.elements / power.sum(1, keepdim=True))
    positions = {"azimuth": sources.azimuth, "elevation": sources.elevation, "range_m": sources.range_m * active}
    columns = positions | {"power": power, "u": sources.u, "v": sources.v}
    return {name: values.float() for name, values in columns.items()}


def _normalised(covariance: Tensor) -> Tensor:
    """R with the trace N."""
    trace = covariance[..., 0].diagonal(dim1=1, dim2=2).sum(1)
    return covariance * (covariance.shape[1] / trace)[:, None, None, None]


def _other_powers(given: Tensor, found: Tensor) -> int:
    """In how many scenes the given powers are not those of R."""
    shares = [each.double() / each.double().sum(1, keepdim=True).clamp_min(1e-300) for each in (given, found)]
    return int(((shares[0] - shares[1]).abs().amax(1) > SAME_POWER).sum())


def checked(file: SceneFile, chunk: dict[str, Tensor], at: int, config: Config) -> None:
    """Every value of a chunk is one that can be trained on. Raises: DataError with the file's own names."""
    try:
        check_values(file.path, chunk, at, config.task)
    except DataError as error:
        name = file.names.get(error.key, error.key)
        raise DataError(error.where, name, error.found, error.expected, error.todo) from None


def _first_chunk(config: Config, file: SceneFile) -> dict[str, Tensor]:
    """The first scenes of a file, checked."""
    chunks = file.chunks(lambda *_: True)
    at, chunk = next(chunks)
    close = getattr(chunks, "close", None)
    if close is not None:
        close()
    checked(file, chunk, at, config)
    return chunk


def _pool_rows(config: Config, root: Path, total: int) -> dict[str, Tensor]:
    """The rows of each split: those that `NpzSource` takes where it takes all scenes, and in the same proportions
    where there are more."""
    wanted = {split: getattr(config.data, f"{split}_scenes") for split in SPLITS}
    times = max(1, -(-total // sum(wanted.values())))
    return split_rows(root, total, {split: times * each for split, each in wanted.items()})
