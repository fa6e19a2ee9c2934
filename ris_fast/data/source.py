"""The interface through which training sees scenes, whether simulated or read, and the order of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ris_fast.data.geometry import Reach
from ris_fast.data.order import BLOCK, EpochOrder
from ris_fast.physics.scenes import Scenes


class SceneSource(Protocol):
    """Scenes of three splits by number.

    `channel`: whether the scenes carry H; without it the inputs cannot carry the answer. `endless`: whether training
    scenes beyond size("train") exist. `index_device`: where indices are cheapest. `notes`: lines that a person should
    read before training, empty where all is well. `lacks`: fields of `Scenes` that are None in training or validation.
    `reach`: how far the sources of files go, as stored and as served; None where that is the task's.
    """

    name: str
    channel: bool
    endless: bool
    device: torch.device
    notes: list[str]
    lacks: tuple[str, ...]
    reach: tuple[Reach, Reach] | None

    @property
    def index_device(self) -> torch.device: ...

    def size(self, split: str) -> int: ...

    def batch(self, split: str, index: Tensor) -> Scenes: ...

    def describe(self) -> str: ...


def epoch_batches(
    source: SceneSource,
    split: str,
    epoch: int,
    batch_size: int,
    seed: int,
    fixed: bool,
    drop_last: bool = False,
    start: int = 0,
) -> Iterator[Tensor]:
    """Index tensors of one epoch: every scene exactly once, the ragged last batch included unless `drop_last`.

    Training scenes come in a random order that (seed, epoch) determines; validation and test in their own. From an
    endless source, unless `fixed`, epoch e has the fresh scenes e * size + i.
    Args: epoch counts from 0. start: scenes of the epoch that are done; it goes on behind them, at no cost.
    Yields: (<= batch_size,) int64 on the source's index device. No more than a block of the order is in memory.
    """
    if batch_size < 1 or epoch < 0 or start < 0:
        raise ValueError(
            f"epoch_batches: batch_size is {batch_size}, epoch {epoch} and start {start}; at least 1, 0 and 0 are"
            " needed."
        )
    scenes = source.size(split)
    order, first = EpochOrder(scenes, seed, epoch) if split == "train" else np.arange, 0
    if split == "train" and source.endless and not fixed:
        first = epoch * scenes
    last = scenes - scenes % batch_size if drop_last else scenes
    block = batch_size * max(1, BLOCK // batch_size)
    for at in range(start, last, block):
        index = torch.from_numpy(order(at, min(at + block, last)) + first)
        if source.index_device.type == "cuda":
            index = index.pin_memory()
        yield from index.to(source.index_device, non_blocking=True).split(batch_size)
