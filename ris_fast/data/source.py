"""The one interface through which training sees scenes, whether simulated or read, and the order of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.errors import DataError
from ris_fast.data.geometry import Reach
from ris_fast.data.place import check_place, guess_source
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate


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


class SimulatedSource:
    """Scenes made on the device when asked for. The seed is data.seed."""

    name = "simulate"
    channel = True
    endless = True
    lacks = ()
    reach = None

    def __init__(self, config: Config, device: torch.device | str) -> None:
        self.task, self.data, self.seed = config.task, config.data, config.data.seed
        self.device = torch.device(device)
        self.notes: list[str] = []

    @property
    def index_device(self) -> torch.device:
        return self.device

    def size(self, split: str) -> int:
        return int(getattr(self.data, f"{split}_scenes"))

    def batch(self, split: str, index: Tensor) -> Scenes:
        return simulate(self.task, index, SceneGenerator(self.seed, split, self.device))

    def describe(self) -> str:
        kind = "the same in every epoch" if self.data.fixed else "fresh in every epoch"
        return (
            f"simulated on {self.device}, seed {self.seed}: {self.data.train_scenes} train ({kind}), "
            f"{self.data.val_scenes} val, {self.data.test_scenes} test scenes, with the channel"
        )


def open_source(
    config: Config, device: torch.device | str, progress: Callable[[int, int], None] | None = None
) -> SceneSource:
    """The source that config.data asks for.

    Args: progress: called with (scenes read, scenes in all) of one split after the other while files are read and
        checked, which for 100,000 scenes of .npz takes a minute or two. Raises: DataError (exit code 3) where the files
        cannot be used.
    """
    kind = config.data.source
    if kind == "auto":
        kind = guess_source(config.data.path)
    elif kind != "simulate":
        if not config.data.path:
            raise DataError(
                "data.path", "", "nothing", f"a folder, because data.source is '{kind}'", "Give --data DIR."
            )
        check_place(Path(config.data.path))
    if kind == "npz":
        from ris_fast.data.npz import NpzSource

        source = NpzSource(config, device, progress)
        _refuse_lost_channel(source, config)
        return source
    if kind == "shards":
        from ris_fast.data.shards import ShardSource

        return ShardSource(config, device, progress)
    return SimulatedSource(config, device)


def _refuse_lost_channel(source: SceneSource, config: Config) -> None:
    """A network that needs H cannot be trained on H c_l; one that asks for H c_l may be, with a note."""
    if not source.channel and config.model.options.get("inputs") not in ("effective_channel", "collapsed"):
        raise DataError(
            config.data.path,
            "H_full",
            "no such key, only H = H c_l",
            f"the channel, which model '{config.model.name}' needs: H c_l cannot carry the answer",
            "Generate the shards with H_full. To train on H c_l all the same, as the original did, use --preset "
            "original --set model.options.inputs=effective_channel --set health.mute=inputs_withhold_answer and "
            "expect a validation NMSE near 0.97: the run ends as stalled, with exit code 4.",
        )


def widened_sector(config: Config, reach: tuple[Reach, Reach] | None) -> tuple[Config, list[str]]:
    """The configuration with a sector that holds the sources as they are served, and a note of what that changed.

    A reader that re-expresses positions from another origin moves near sources out of the sector of the files' own, in
    which a pursuit would not look for them. Files that leave the task's sector themselves, and angles that a person
    set, stay.
    """
    wider: dict[str, float] = {}
    for key, name in (("azimuth_deg", "azimuth"), ("elevation_deg", "elevation")) if reach is not None else ():
        limit, origin = getattr(config.task, key), config.provenance.get(f"task.{key}", "default")
        stored, served = (math.degrees(getattr(each, name)) for each in reach)
        if stored <= 1.01 * limit < served and (origin == "default" or origin.startswith("preset ")):
            wider[key] = min(90.0, math.ceil(served))
    if not wider:
        return config, []
    said = " and ".join(f"task.{key} = {value:g}" for key, value in wider.items())
    provenance = {**config.provenance, **{f"task.{key}": "the files" for key in wider}}
    return replace(config, task=replace(config.task, **wider), provenance=provenance), [
        f"from the centre of the array some sources lie outside the files' own sector: {said} from here on"
    ]


def size_notes(config: Config, found: Mapping[str, int], used: Mapping[str, int]) -> list[str]:
    """Where a split has more scenes than are used, or fewer than someone asked for: a preset and a default only
    limit."""
    notes = []
    for split, there in found.items():
        wanted, origin = (
            getattr(config.data, f"{split}_scenes"),
            config.provenance.get(f"data.{split}_scenes", "default"),
        )
        if there > used[split]:
            notes.append(f"{used[split]} of {there} {split} scenes in use (data.{split}_scenes)")
        elif wanted > there and origin != "default" and not origin.startswith("preset "):
            notes.append(
                f"data.{split}_scenes is {wanted} ({origin}), but there are {there} {split} scenes: all are in use"
            )
    return notes


def epoch_batches(
    source: SceneSource, split: str, epoch: int, batch_size: int, seed: int, fixed: bool, drop_last: bool = False
) -> Iterator[Tensor]:
    """Index tensors of one epoch: every scene exactly once, the ragged last batch included unless `drop_last`.

    Training scenes come in a random order that (seed, epoch) determines; validation and test in their own. From an
    endless source, unless `fixed`, epoch e has the fresh scenes e * size + i.
    Args: epoch counts from 0. Yields: (<= batch_size,) int64 on the source's index device.
    """
    if batch_size < 1 or epoch < 0:
        raise ValueError(f"epoch_batches: batch_size is {batch_size} and epoch {epoch}; at least 1 and 0 are needed.")
    scenes = source.size(split)
    order = torch.arange(scenes)
    if split == "train":
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(scenes, generator=generator)
        if source.endless and not fixed:
            order += epoch * scenes
    if source.index_device.type == "cuda":
        order = order.pin_memory()
    order = order.to(source.index_device, non_blocking=True)
    last = scenes - scenes % batch_size if drop_last else scenes
    for start in range(0, last, batch_size):
        yield order[start : min(start + batch_size, last)]
