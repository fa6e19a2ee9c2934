"""Scenes read ahead by a thread are those read at once, in their order, and the thread ends with its reader."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Config, Data
from ris_fast.data.npz import NpzSource
from ris_fast.data.prefetch import GROUPS_AHEAD, in_threads, scene_groups
from ris_fast.data.shards import ShardSource
from ris_fast.data.simulated import SimulatedSource
from ris_fast.data.source import epoch_batches
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL, write_folders


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ris-fast-ahead")]


def sources(root: Path, memory: str) -> dict[str, Any]:
    if not (root / "shards").exists():
        write_shards(Config(task=SMALL), root / "shards", {"train": 50, "val": 8, "test": 4}, shard_scenes=16)
        write_folders(root / "npz", train=50)
    return {
        "shards": ShardSource(Config(task=SMALL, data=Data(path=str(root / "shards"), memory=memory)), "cpu"),
        "npz": NpzSource(Config(task=SMALL, data=Data(path=str(root / "npz"), memory=memory)), "cpu"),
    }


def groups(source: Any) -> list[list[Tensor]]:
    return [[index] for index in epoch_batches(source, "train", 1, 8, 0, False)]


@pytest.mark.parametrize("kind", ["shards", "npz"])
def test_scenes_read_ahead_are_those_read_at_once(tmp_path: Path, kind: str) -> None:
    ahead, host = (sources(tmp_path, memory)[kind] for memory in ("files", "host"))
    assert ahead.reads_ahead and not host.reads_ahead
    found = list(scene_groups(ahead, "train", groups(ahead)))
    assert [group for group, _ in found] and readers() == []
    for (group, (scenes,)), (index,) in zip(found, groups(host), strict=True):
        assert torch.equal(group[0], index) and torch.equal(scenes.index, index)
        expected = host.batch("train", index)
        for item in fields(expected):
            a, b = getattr(scenes, item.name), getattr(expected, item.name)
            assert (a is None and b is None) or torch.equal(a, b), item.name


def test_sources_that_make_their_scenes_are_not_read_ahead() -> None:
    source = SimulatedSource(Config(task=SMALL, data=Data(train_scenes=16)), "cpu")
    found = scene_groups(source, "train", [[torch.arange(4)]] * 3)
    next(found)
    assert readers() == [] and len(list(found)) == 2


class Failing:
    """Fails at the fourth group; counts what it is asked for."""

    reads_ahead = True

    def __init__(self) -> None:
        self.read_groups: list[int] = []
        self.threads: set[str] = set()

    def read(self, split: str, index: Tensor) -> dict[str, Tensor]:
        self.read_groups.append(int(index[0]))
        self.threads.add(threading.current_thread().name)
        if int(index[0]) == 3:
            raise OSError("the disk is gone")
        return {"index": index}

    def assemble(self, split: str, columns: dict[str, Tensor]) -> Any:
        assert threading.current_thread() is threading.main_thread()
        return int(columns["index"][0])


def numbered(count: int) -> list[list[Tensor]]:
    return [[torch.tensor([number])] for number in range(count)]


def test_an_error_of_the_thread_is_raised_at_its_group() -> None:
    source, seen = Failing(), []
    with pytest.raises(OSError, match="the disk is gone"):
        for _, found in scene_groups(source, "train", numbered(20)):  # type: ignore[arg-type]
            seen += found
    assert seen == [0, 1, 2] and readers() == [] and len(source.threads) == 1
    assert len(source.read_groups) <= 4 + GROUPS_AHEAD


def test_an_error_of_the_order_is_raised_after_what_came_before_is_begun() -> None:
    def broken() -> Any:
        yield from numbered(2)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(scene_groups(Failing(), "train", broken()))  # type: ignore[arg-type]
    assert readers() == []


def test_no_more_than_a_few_groups_are_read_ahead() -> None:
    source = Failing()
    found = scene_groups(source, "train", iter(numbered(3)))  # type: ignore[arg-type]
    next(found)
    assert len(source.read_groups) <= GROUPS_AHEAD + 1
    found.close()
    assert readers() == []


def test_a_reader_that_is_left_ends_its_thread() -> None:
    def interrupted() -> None:
        for _ in scene_groups(Failing(), "train", numbered(20)):  # type: ignore[arg-type]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert readers() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_in_threads_keeps_order_and_raises_the_first_error(threads: int) -> None:
    barrier = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            barrier.wait(0.05)  # later ones are done before
        if number in (5, 6):
            raise ValueError(str(number))
        return number * number

    found: list[int] = []
    with pytest.raises(ValueError, match="^5$"):
        for value in in_threads(work, range(9), threads, 4):
            found.append(value)
    assert found == [0, 1, 4, 9, 16] and readers() == []
    assert list(in_threads(abs, [], threads, 4)) == []
