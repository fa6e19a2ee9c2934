"""Writes a data set of simulated scenes: safetensors shards and a manifest, complete or not there at all.

Format: OUT/manifest.json and OUT/SPLIT-00000.safetensors, ... A shard holds float32 columns by the names of `Scenes`
(snapshots, channel, azimuth, elevation, range_m, power, snr_db), count as int64, and the codes once. No N x N matrix:
a scene of RIS-12x12 takes 20.6 kB where the original's takes 373 kB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.data.manifest import MANIFEST
from ris_fast.data.parallel import each_in_order
from ris_fast.data.shard_columns import COLUMNS, FORMAT, scene_bytes
from ris_fast.data.splits import split_sizes
from ris_fast.data.statistics import measure, merge
from ris_fast.data.unfinished import completed, finish, keep, kept, unfinished, write_shard
from ris_fast.physics.random import SPLITS, SceneGenerator
from ris_fast.physics.scenes import Scenes, check_physics, simulate

SHARD_SCENES = 4096
CHUNK = 512  # scenes simulated at a time
VERSION = 1


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: scenes start, ... of a split."""

    folder: Path
    task: Task
    generator: SceneGenerator
    start: int
    rows: int
    number: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.generator.split}-{self.number:05d}.safetensors"


def write_shards(
    config: Config,
    out_dir: str | Path,
    scenes: int | Mapping[str, int],
    *,
    device: torch.device | str = "cpu",
    shard_scenes: int = SHARD_SCENES,
    progress: Callable[[int, int], None] | None = None,
    jobs: int = 1,
) -> Path:
    """Simulate and write a data set; OUT appears under its name only when it is whole.

    Work in progress lies in OUT.partial; the same call again continues it shard by shard.
    Args: scenes: of the training split (the others by `split_sizes`), or of each split. The seed is data.seed.
        progress: called with (scenes written, scenes in all). jobs: processes, each of which writes whole shards; the
        bytes are the same for any number.
    Returns: the manifest's path. Raises: ConfigError for a split without scenes, DataError where OUT is not empty or
        OUT.partial belongs to another data set, StorageError where the file system refuses, WorkerLost where a process
        was killed.
    """
    sizes = split_sizes(scenes) if isinstance(scenes, int) else dict(scenes)
    _check_request(sizes, shard_scenes, jobs)
    check_physics(config.task, device)
    out = Path(os.path.realpath(out_dir))
    plan, total = _plan(config, sizes, shard_scenes), sum(sizes.values())
    if completed(out, plan):
        return out / MANIFEST
    with unfinished(out, plan, total * scene_bytes(config.task, COLUMNS), total) as partial:
        splits = _write_splits(config, partial, sizes, shard_scenes, device, progress, jobs)
        finish(partial, out, {**plan, "splits": splits})
    return out / MANIFEST


def _write_splits(
    config: Config,
    partial: Path,
    sizes: Mapping[str, int],
    shard_scenes: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
    jobs: int,
) -> dict[str, Any]:
    """Writes all shards and returns the manifest's entries. An interrupt says what is done and how to continue."""
    work = [
        ShardJob(
            partial,
            config.task,
            SceneGenerator(config.data.seed, split, device),
            start,
            min(shard_scenes, size - start),
            start // shard_scenes,
        )
        for split, size in sizes.items()
        for start in range(0, size, shard_scenes)
    ]
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in sizes}
    done, total = 0, sum(sizes.values())

    def count(entry: Mapping[str, Any]) -> None:
        nonlocal done
        done += entry["scenes"]
        if progress is not None:
            progress(done, total)

    try:
        for job, entry in zip(work, each_in_order(_write_shard, work, jobs, count)):
            entries[job.generator.split].append(entry)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: {done:,} of {total:,} scenes are in {partial}. Run the same command again: it "
            "continues there."
        ) from None
    return {
        split: {
            "scenes": size,
            "shards": entries[split],
            "statistics": merge([e["statistics"] for e in entries[split]]),
        }
        for split, size in sizes.items()
    }


def _check_request(sizes: Mapping[str, int], shard_scenes: int, jobs: int) -> None:
    if set(sizes) != set(SPLITS) or min(*sizes.values(), shard_scenes) < 1:
        asked = ", ".join(f"{count} {split}" for split, count in sizes.items())
        raise ConfigError(
            f"simulate: {asked} scenes in shards of {shard_scenes}; expected at least one scene for each of "
            f"{', '.join(SPLITS)}. Ask for more (--scenes)."
        )
    if jobs < 1:
        raise ConfigError(f"simulate: --jobs is {jobs}; expected at least one process. Leave it out for all cores.")


def _plan(config: Config, sizes: Mapping[str, int], shard_scenes: int) -> dict[str, Any]:
    """What determines every byte of the data set."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": asdict(config.task),
        "seed": config.data.seed,
        "scenes": dict(sizes),
        "shard_scenes": shard_scenes,
    }


def _write_shard(job: ShardJob) -> dict[str, Any]:
    """Write the shard unless it is there already, and return its entry in the manifest."""
    if (receipt := kept(job.path, job.rows)) is not None:
        return receipt["entry"]
    tensors = simulated_columns(job.task, job.generator, job.start, job.rows)
    scenes = Scenes(codes=tensors["codes"], index=torch.arange(job.rows), **{key: tensors[key] for key in COLUMNS})
    statistics = measure(scenes, job.task.max_sources)
    entry = write_shard(job.path, tensors, {"scenes": job.rows, "statistics": statistics})
    keep(job.folder, entry)
    return entry


def simulated_columns(task: Task, generator: SceneGenerator, start: int, rows: int) -> dict[str, Tensor]:
    """The arrays of a shard with scenes start, ..., start + rows - 1."""
    parts = []
    for first in range(start, start + rows, CHUNK):
        index = torch.arange(first, min(first + CHUNK, start + rows))
        parts.append(simulate(task, index, generator).to("cpu"))
    scenes = Scenes.concatenate(parts)
    return {"codes": scenes.codes.clone(), **{name: getattr(scenes, name).contiguous() for name in COLUMNS}}
