"""Writes a data set of simulated scenes: safetensors shards and a manifest, complete or not there at all.

Format: OUT/manifest.json and OUT/SPLIT-00000.safetensors, ... A shard holds float32 columns by the names of `Scenes`
(snapshots, channel, azimuth, elevation, range_m, power, snr_db), count as int64, and the codes once. No N x N matrix:
a scene of RIS-12x12 takes 20.6 kB where the original's takes 373 kB.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.data.data_path import PLAN
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import COLUMNS, FORMAT, MANIFEST, VERSION, file_hash
from ris_fast.data.splits import split_sizes
from ris_fast.data.statistics import measure, merge
from ris_fast.files import locked, make_folder, save_tensors, write_text, writing
from ris_fast.physics.random import SPLITS, SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate

SHARD_SCENES = 4096
CHUNK = 512  # scenes simulated at a time


def write_shards(
    config: Config,
    out_dir: str | Path,
    scenes: int | Mapping[str, int],
    *,
    device: torch.device | str = "cpu",
    shard_scenes: int = SHARD_SCENES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Simulate and write a data set; OUT appears under its name only when it is whole.

    Work in progress lies in OUT.partial; the same call again continues it shard by shard.
    Args: scenes: of the training split (the others by `split_sizes`), or of each split. The seed is data.seed.
        progress: called with (scenes written, scenes in all).
    Returns: the manifest's path. Raises: ConfigError for a split without scenes, DataError where OUT is not empty or
        OUT.partial belongs to another data set, StorageError where the file system refuses.
    """
    sizes = split_sizes(scenes) if isinstance(scenes, int) else dict(scenes)
    _check_request(sizes, shard_scenes)
    out = Path(os.path.realpath(out_dir))
    plan = _plan(config, sizes, shard_scenes)
    partial = out.with_name(out.name + ".partial")
    with writing(out):
        _check_target(out, partial, plan)
        _check_room(partial, config.task, sum(sizes.values()))
    make_folder(partial)
    with _alone(partial):
        _check_target(out, partial, plan)  # another process may have finished while this one looked
        write_text(partial / PLAN, json.dumps(plan, indent=1) + "\n")
        splits = _write_splits(config, partial, sizes, shard_scenes, device, progress)
        _finish(partial, out, {**plan, "splits": splits})
    return out / MANIFEST


def _write_splits(
    config: Config,
    partial: Path,
    sizes: Mapping[str, int],
    shard_scenes: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Writes all shards and returns the manifest's entries. An interrupt says what is done and how to continue."""
    splits: dict[str, Any] = {}
    done, total = 0, sum(sizes.values())
    try:
        for split, size in sizes.items():
            entries = []
            generator = SceneGenerator(config.data.seed, split, device)
            for start in range(0, size, shard_scenes):
                rows = min(shard_scenes, size - start)
                entries.append(_write_shard(partial, config.task, generator, start, rows, shard_scenes))
                done += rows
                if progress is not None:
                    progress(done, total)
            splits[split] = {"scenes": size, "shards": entries, "statistics": merge([e["statistics"] for e in entries])}
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: {done:,} of {total:,} scenes are in {partial}. Run the same command again: it "
            "continues there."
        ) from None
    return splits


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keeps two processes from writing one data set. Raises: ConfigError."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(partial))
        except BlockingIOError:
            raise ConfigError(
                f"{partial}: another process is writing this data set. Wait for it or stop it, or choose another --out."
            ) from None
        yield


def _check_request(sizes: Mapping[str, int], shard_scenes: int) -> None:
    if set(sizes) != set(SPLITS) or min(*sizes.values(), shard_scenes) < 1:
        asked = ", ".join(f"{count} {split}" for split, count in sizes.items())
        raise ConfigError(
            f"simulate: {asked} scenes in shards of {shard_scenes}; expected at least one scene for each of "
            f"{', '.join(SPLITS)}. Ask for more (--scenes)."
        )


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


def _check_target(out: Path, partial: Path, plan: Mapping[str, Any]) -> None:
    """The target is new or empty, and unfinished work there is of this very data set. Raises: DataError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            out, "", "something there already", "a new or empty folder", "Remove it or choose another --out."
        )
    if out.is_symlink():
        raise DataError(
            out, "", "a link that leads in a circle", "a new or empty folder", "Remove it or choose another --out."
        )
    if out.is_mount():
        raise DataError(
            out,
            "",
            "a mount point, which no finished data set can take the name of",
            "a folder within it",
            f"Give --out {shlex.quote(str(out / 'scenes'))}.",
        )
    begun = any(path.name != PLAN for path in partial.glob("[!.]*"))
    if begun and _read_plan(partial) != plan:
        raise DataError(
            partial,
            "",
            "the unfinished work of another data set",
            "the same task, seed and sizes",
            "Remove it, or run the earlier command again to finish it.",
        )


def _check_room(partial: Path, task: Task, scenes: int) -> None:
    """Refuses a data set that the disk cannot hold before hours of simulation, not after. A disk without size
    passes."""
    values = 2 * task.bs_antennas * (task.snapshots + task.elements) + 4 * task.max_sources + 1
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    wanted = scenes * (4 * values + 8) - there
    disk = shutil.disk_usage(next(folder for folder in (partial, *partial.parents) if folder.exists()))
    if disk.total and wanted > disk.free:
        raise DataError(
            partial,
            "",
            f"{disk.free / 1e9:,.1f} GB free",
            f"{wanted / 1e9:,.1f} GB for {scenes:,} scenes",
            "Free space there, or write elsewhere (--out).",
        )


def _read_plan(partial: Path) -> Any:
    try:
        return json.loads((partial / PLAN).read_text())
    except (OSError, ValueError):
        return None


def _finish(partial: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """Without its plan and what writers that were killed left, the folder gets its name."""
    write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    with writing(out):
        for left in (partial / PLAN, *partial.glob(".*")):
            left.unlink()
        os.replace(partial, out)


def _write_shard(
    folder: Path, task: Task, generator: SceneGenerator, start: int, rows: int, shard_scenes: int
) -> dict[str, Any]:
    """Write rows start ... of a split unless they are there already, and return the shard's entry in the manifest."""
    name = f"{generator.split}-{start // shard_scenes:05d}.safetensors"
    path = folder / name
    tensors = _finished(path)
    if tensors is None:
        tensors = _simulate(task, generator, start, rows)
        save_tensors(path, tensors)
    scenes = Scenes(codes=tensors["codes"], index=torch.arange(rows), **{key: tensors[key] for key in COLUMNS})
    return {
        "file": name,
        "scenes": rows,
        "bytes": path.stat().st_size,
        "sha256": file_hash(path),
        "statistics": measure(scenes, task.max_sources),
    }


def _finished(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a shard that an earlier, interrupted call wrote in full."""
    try:
        return load_file(path) if path.exists() else None
    except SafetensorError:
        return None


def _simulate(task: Task, generator: SceneGenerator, start: int, rows: int) -> dict[str, Tensor]:
    parts = []
    for first in range(start, start + rows, CHUNK):
        index = torch.arange(first, min(first + CHUNK, start + rows))
        parts.append(simulate(task, index, generator).to("cpu"))
    scenes = Scenes.concatenate(parts)
    return {"codes": scenes.codes.clone(), **{name: getattr(scenes, name).contiguous() for name in COLUMNS}}
