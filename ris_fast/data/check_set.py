"""The check of a whole data set of ours: every byte, its statistics, its splits, and some scenes simulated again.

It also says what of an unfinished one is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial as given
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import ConfigError, Task
from ris_fast.data.arrays import COPY_AGAIN
from ris_fast.data.data_path import PLAN
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import find_copies, find_overlap, scene_hashes
from ris_fast.data.manifest import CHECKSUM, MANIFEST, NO_CHECKSUM, columns_of, read_any_manifest
from ris_fast.data.npz_format import check_finite
from ris_fast.data.shard_columns import COLUMNS
from ris_fast.data.shards import OwnShard, open_own_shard
from ris_fast.data.statistics import differences, measure, merge
from ris_fast.data.unfinished import kept, partial_of, read_plan
from ris_fast.physics.random import SPLITS, SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate

AGAIN = 16  # scenes of each split that are simulated again, at even distances
ROUNDING = 1e-4  # relative, between two devices


@dataclass
class SetCheck:
    """What a check found: `wrong`, one line for each file; `summary`, what there is."""

    wrong: list[str] = field(default_factory=list)
    summary: str = ""

    @property
    def whole(self) -> bool:
        return not self.wrong


def check_set(folder: Path, jobs: int, progress: Callable[[int, int], None] | None = None) -> SetCheck:
    """Checks a data set, or the unfinished work on one, by `jobs` threads.

    Raises: DataError where there is no data set of ours, or its manifest cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        for there in (folder, partial_of(folder)):
            if (there / PLAN).is_file():
                return _check_unfinished(there, jobs, progress)
    manifest = read_any_manifest(folder)
    found, unmade = SetCheck(), ""
    hashes = {split: [np.empty(0, np.uint64)] for split in SPLITS}
    work = [(split, entry) for split in SPLITS for entry in manifest["splits"][split]["shards"]]
    done, total = 0, sum(entry["scenes"] for _, entry in work)
    task = _task(folder, manifest)
    with ThreadPoolExecutor(jobs) as pool:
        one = given(_check_shard, folder, task, columns_of(manifest))
        for (split, entry), result in zip(work, pool.map(one, [entry for _, entry in work])):
            found.wrong += [result] if isinstance(result, str) else []
            hashes[split] += [] if isinstance(result, str) else [result]
            done += entry["scenes"]
            if progress is not None:
                progress(done, total)
    found.wrong += _check_splits(folder, manifest, {split: np.concatenate(each) for split, each in hashes.items()})
    if manifest["version"] == 1 and found.whole:
        try:
            found.wrong += _simulated_again(folder, task, manifest)
        except ConfigError as problem:  # its own codes or channel are not here, which reading it does not need
            unmade = f"; no scene could be simulated again: {problem}"
    listed = {entry["file"] for _, entry in work}
    unknown = sorted(path for path in folder.glob("*.safetensors") if path.name not in listed)
    found.wrong += [f"{path}: the manifest does not list it. Remove it." for path in unknown]
    size = sum(entry["bytes"] for _, entry in work)
    found.summary = f"{total:,} scenes in {len(work)} shards, {size / 1e9:.2f} GB"
    found.summary += unmade + ("" if CHECKSUM in manifest else f"; {NO_CHECKSUM}")
    return found


def _task(folder: Path, manifest: Mapping[str, Any]) -> Task:
    try:
        return Task(
            **{item.name: manifest["task"][item.name] for item in fields(Task) if item.name in manifest["task"]}
        )
    except (TypeError, ValueError) as problem:
        raise DataError(folder / MANIFEST, "task", f"no task ({problem})", "a task", COPY_AGAIN) from None


def _check_shard(folder: Path, task: Task, columns: tuple[str, ...], entry: dict[str, Any]) -> np.ndarray | str:
    """The hashes of its scenes, or a line on what is wrong."""
    path = folder / entry["file"]
    try:
        shard = open_own_shard(path, entry, task, columns)
        shard.check_contents()
        scenes = read_shard(shard, columns)
        for item in fields(scenes):
            if (value := getattr(scenes, item.name)) is not None:
                check_finite(path, item.name, value, 0)
    except (DataError, OSError) as problem:
        return str(problem)
    if wrong := differences(entry["statistics"], measure(scenes, task.max_sources)):
        return f"{path}: {', '.join(wrong)}. {COPY_AGAIN}"
    return scene_hashes(scenes.snapshots)


def read_shard(shard: OwnShard, columns: tuple[str, ...]) -> Scenes:
    """The columns of a shard that are fields of `Scenes`, mapped."""
    names = {item.name for item in fields(Scenes)} & {*columns, "codes"}
    arrays = {name: torch.from_numpy(np.array(shard.arrays[name].map(), copy=True)) for name in names}
    return Scenes(index=torch.arange(shard.scenes), **arrays)


def _check_splits(folder: Path, manifest: Mapping[str, Any], hashes: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Statistics of whole splits, and scenes that are in two of them."""
    for split in SPLITS:
        entry = manifest["splits"][split]
        if not entry["shards"]:
            continue
        whole = merge([each["statistics"] for each in entry["shards"]])
        if wrong := differences(entry.get("statistics", {}), whole):
            yield f"{folder / MANIFEST}: splits.{split}: {', '.join(wrong)}. {COPY_AGAIN}"
        if copies := find_copies(hashes[split]):
            yield f"{folder}: {copies} {split} scenes repeat an earlier one of their split"
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        overlap = find_overlap(first, hashes[first], second, hashes[second])
        if overlap.count:
            yield f"{folder}: {overlap}"


def _simulated_again(folder: Path, task: Task, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Some scenes of each split against the simulator: bit for bit, or to rounding where another device made them."""
    for split in SPLITS:
        start, shards = 0, manifest["splits"][split]["shards"]
        chosen = torch.linspace(0, manifest["splits"][split]["scenes"] - 1, AGAIN).long().unique()
        for entry in shards:
            rows = chosen[(chosen >= start) & (chosen < start + entry["scenes"])]
            shard = open_own_shard(folder / entry["file"], entry, task, COLUMNS)
            if rows.numel():
                made = simulate(task, rows, SceneGenerator(manifest["seed"], split))
                if wrong := _unlike(shard, rows - start, made):
                    yield f"{shard.path}: {wrong} not what seed {manifest['seed']} makes. Write the data set again."
            start += entry["scenes"]


def _unlike(shard: OwnShard, rows: Tensor, made: Scenes) -> str:
    """The columns of a shard that are not those of the scenes simulated again; empty where all are."""
    wrong = []
    for name in (*COLUMNS, "codes"):
        stored = shard.arrays[name].map()
        there = torch.from_numpy(np.array(stored if name == "codes" else stored[rows.numpy()]))
        again = getattr(made, name)
        if not torch.equal(there, again):
            away = float((there.double() - again.double()).norm() / again.double().norm().clamp_min(1e-300))
            wrong += [f"{name} (relative {away:.1g})"] if away > ROUNDING else []
    return f"{', '.join(wrong)} {'are' if len(wrong) > 1 else 'is'}" if wrong else ""


def _check_unfinished(folder: Path, jobs: int, progress: Callable[[int, int], None] | None) -> SetCheck:
    """What is whole, what is damaged and what is missing of an unfinished data set."""
    plan = read_plan(folder)
    try:
        size = plan["shard_scenes"]
        work = [
            (folder / f"{split}-{start // size:05d}.safetensors", min(size, scenes - start))
            for split, scenes in plan["scenes"].items()
            for start in range(0, scenes, size)
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        return SetCheck([f"{folder / PLAN}: no readable plan. Remove {folder} and begin anew."], "nothing of use")
    found, whole, scenes, done = SetCheck(), 0, 0, 0
    total = sum(rows for _, rows in work)
    with ThreadPoolExecutor(jobs) as pool:
        for (path, rows), receipt in zip(work, pool.map(lambda each: kept(*each), work)):
            done += rows
            if progress is not None:
                progress(done, total)
            if receipt is not None:
                whole, scenes = whole + 1, scenes + rows
            elif path.exists():
                found.wrong.append(f"{path}: not known to be whole; it will be made again")
    missing = len(work) - whole - len(found.wrong)
    if missing or not found.wrong:
        found.wrong.append(f"{folder}: unfinished. Run the command that began it again: it continues there.")
    found.summary = (
        f"{whole} of {len(work)} shards are whole ({scenes:,} of {total:,} scenes), {missing} missing,"
        f" {len(work) - whole - missing} to be made again"
    )
    return found
