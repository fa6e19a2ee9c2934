"""How fast scenes are read from files in random order, beside what the trainer consumes, and what reading ahead brings.

Run: pytest bench/test_reading.py --benchmark-json=bench/results/reading.json
About two minutes and 300 MB of temporary files. Figures are in extra_info, taken in turns on the same cores; a
repetition in which the process waited for a core is set aside. Readers use one thread, the trainer all of them. "cold"
files were dropped from the page cache before; what the disk's own cache and the hypervisor's keep, nobody here drops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.data.open_source import open_source
from ris_fast.data.order import EpochOrder
from ris_fast.data.prefetch import scene_groups
from ris_fast.data.source import epoch_batches
from ris_fast.data.write import write_shards
from ris_fast.timing import alternate, conditions, once, summary, threads
from ris_fast.training.trainer import Trainer
from tests.data.make_npz import original_arrays, write_npz

CPU = torch.device("cpu")
BATCH, SCENES, NPZ_SCENES = 256, 4096, 512
BATCHES = 8  # read or trained on in one repetition
WANTED = 3.0  # times the trainer's rate


def config_of(folder: Path, memory: str = "auto", **data: Any) -> Config:
    config = load_config(preset="laptop", flags={"data.path": str(folder), "training.device": "cpu"})
    data = {"memory": memory, "train_scenes": SCENES, "val_limit": 64, **data}
    return replace(config, data=replace(config.data, **data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards: 4,096 scenes in four files. npz: 512 scenes of the original's form in one."""
    root = tmp_path_factory.mktemp("reading")
    sizes = {"train": SCENES, "val": 64, "test": 1}
    config = load_config(preset="laptop")
    write_shards(config, root / "shards", sizes, shard_scenes=SCENES // 4)
    for split, scenes in (("train", NPZ_SCENES), ("val", 64)):
        write_npz(root / "npz" / split / "a.npz", original_arrays(scenes, task=config.task, split=split))
    return root


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("train*/*" if (folder / "train").is_dir() else "train*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def from_disk() -> int:
    """Bytes that this process has had read from disks so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def reader(source: Any) -> Callable[[], None]:
    """Reads the next batches of an endless random order: what a thread does that reads ahead."""
    scenes = source.size("train")
    order = torch.from_numpy(EpochOrder(scenes, 0, 0)(0, scenes)).split(BATCH)
    batches: Iterator[torch.Tensor] = cycle(order[: scenes // BATCH])

    def read() -> None:
        for index in islice(batches, BATCHES):
            source.read("train", index)

    return read


def consumer(folder: Path) -> Callable[[], None]:
    """The trainer's steps on scenes that are there already."""
    trainer = Trainer(config_of(folder, "host"))
    groups = list(islice(trainer._groups(), BATCHES))
    trainer.model.train()

    def train() -> None:
        for group in groups:
            trainer.step(group, 1000)

    return train


def with_rates(found: dict[str, Any], scenes: int) -> dict[str, Any]:
    return {name: {**each, "scenes_per_s": scenes / each["s"]} for name, each in found.items()}


@pytest.mark.benchmark(group="reading against training")
def test_reading_outpaces_training(benchmark: Any, folder: Path) -> None:
    """Wanted: every way of reading at least three times as fast as two cores train."""
    places = {
        "shards in files": config_of(folder / "shards", "files"),
        "shards in host memory": config_of(folder / "shards", "host"),
        ".npz in files": config_of(folder / "npz", "files"),
        ".npz in host memory": config_of(folder / "npz", "host"),
    }
    with threads(1):
        sources = {name: open_source(config, CPU) for name, config in places.items()}
    calls = {name: on_one_thread(reader(source)) for name, source in sources.items()}
    calls["training"] = consumer(folder / "shards")
    found = with_rates(alternate(calls, CPU, quiet=15, seconds=30.0, warm=2), BATCH * BATCHES)
    read, runs, call = from_disk(), [], calls["shards in files"]
    for _ in range(7):
        forget(folder / "shards")
        runs.append(once(call, CPU))
    cold = with_rates({"shards in files, cold": summary(runs)}, BATCH * BATCHES)
    scene = sources["shards in files"]._load("train")[2].row_bytes
    asked = 7 * BATCH * BATCHES * scene
    found |= {name: {**each, "disk_bytes_over_asked": (from_disk() - read) / asked} for name, each in cold.items()}
    ratios = {name: each["scenes_per_s"] / found["training"]["scenes_per_s"] for name, each in found.items()}
    benchmark.extra_info.update(variants=found, times_training=ratios, wanted=WANTED, batch_size=BATCH)
    benchmark.extra_info.update(scene_bytes=scene, conditions=conditions(CPU))
    benchmark.pedantic(call, rounds=1)


def on_one_thread(call: Callable[[], None]) -> Callable[[], None]:
    def alone() -> None:
        with threads(1):
            call()

    return alone


@pytest.mark.benchmark(group="training from files")
def test_training_from_files(benchmark: Any, folder: Path) -> None:
    """Whole epochs of 16 steps: from memory, and from files with and without a thread that reads ahead."""
    path, calls = folder / "shards", {}
    for memory in ("host", "files"):
        trainer = Trainer(config_of(path, memory))
        trainer.model.train()
        if memory == "host":
            calls["host memory"] = epoch(trainer, trainer.source)
            continue
        ways = {"at once": SimpleNamespace(batch=trainer.source.batch), "read ahead": trainer.source}
        for way, source in ways.items():
            calls[f"files, {way}"] = epoch(trainer, source)
            calls[f"files, cold, {way}"] = epoch(trainer, source, lambda: forget(path))
    found = with_rates(alternate(calls, CPU, quiet=15, seconds=45.0, warm=1), SCENES)
    benchmark.extra_info.update(variants=found, batch_size=BATCH, conditions=conditions(CPU))
    benchmark.pedantic(calls["files, read ahead"], rounds=1)


def epoch(trainer: Trainer, source: Any, before: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def train() -> None:
        before()
        for _, group in scene_groups(source, "train", trainer._index_groups()):
            trainer.step(group, 1000)

    return train


@pytest.mark.benchmark(group="order of an epoch")
@pytest.mark.parametrize("scenes", [160_000, 2**18, 10**9])
def test_order(benchmark: Any, scenes: int) -> None:
    """Batches of the first 160,000 positions; beside torch.randperm, which holds all of an epoch at once."""
    source = SimpleNamespace(size=lambda split: scenes, endless=False, index_device=CPU)
    part = 160_000 // BATCH
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: list(islice(epoch_batches(source, "train", 1, BATCH, 0, False), part))
    }
    if scenes < 10**7:
        calls["torch.randperm"] = lambda: torch.randperm(scenes)[:160_000].split(BATCH)
    with threads(1):
        found = alternate(calls, CPU, quiet=25, seconds=3.0)
    benchmark.extra_info.update(variants=found, positions=160_000, scenes=scenes, conditions=conditions(CPU))
    benchmark.pedantic(calls["ours"], rounds=5)
