"""How much memory a run's first step needs, known before it: a CPU that runs out of it ends the process without a
word."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import autocast, network_inputs

if TYPE_CHECKING:
    from ris_fast.training.trainer import Trainer

SAFE = 0.6  # of what is free: a step takes up to 1.4 times what its scenes and saved tensors do (measured)
FEW, MORE = 2, 6  # scenes of two small batches, whose difference says what a scene needs
SMALL, SMALL_EPOCH = (
    512,
    10**7,
)  # scenes at once, and in an epoch, that are not measured: every machine that trains has room for them
INDEX_BYTES = 24  # of a training scene: its place in the order of an epoch, while that is drawn


class OutOfMemory(RuntimeError):
    """The batch does not fit into memory; the message says which would. Exit code 5."""

    exit_code = 5


def refuse_too_large(trainer: Trainer) -> None:
    """Raises OutOfMemory where what a step and the validation set hold at once is more than a CPU has free, naming the
    setting."""
    sizes = effective(trainer)
    at_once = max(sizes["training.batch_size"] * sizes["training.accumulate"], sizes["data.val_limit"] // 16)
    if trainer.device.type != "cpu" or (at_once <= SMALL and sizes["data.train_scenes"] <= SMALL_EPOCH):
        return  # a GPU says so itself
    parts, free = needed_bytes(trainer), free_memory()
    total = sum(parts.values())
    if total <= free:
        return
    setting = max(parts, key=parts.__getitem__)
    value = getattr(getattr(trainer.config, setting.split(".")[0]), setting.split(".")[1])
    most = math.floor(sizes[setting] * max(0.0, SAFE * free - total + parts[setting]) / parts[setting])
    others = [f"{name}, {gigabytes(part)}" for name, part in parts.items() if part > SAFE * free and name != setting]
    fits = (
        f"{setting} = {_round(most)} would fit"
        if most >= 1
        else (
            f"So do {' and '.join(others)}: lower them together"
            if others
            else "Not even 1 would fit: use a smaller network"
        )
    )
    raise OutOfMemory(
        f"{setting} = {value:,} exceeds this machine's memory: the run would hold about {gigabytes(total)} at once, "
        f"{gigabytes(parts[setting])} of it for that setting, and {gigabytes(free)} are free. {fits}."
    )


def effective(trainer: Trainer) -> dict[str, int]:
    """Scenes that each setting stands for at most: no step has more than an epoch, no validation more than its
    split."""
    config, train = trainer.config, trainer.source.size("train")
    batch = min(config.training.batch_size, train)
    return {
        "training.batch_size": batch,
        "training.accumulate": min(math.ceil(train / batch), config.training.accumulate),
        "data.val_limit": min(config.data.val_limit, trainer.source.size("val")),
        "data.train_scenes": train,
    }


def needed_bytes(trainer: Trainer) -> dict[str, float]:
    """Bytes by the setting that asks for them: activations and scenes of a micro-batch, scenes of the others, of
    validation, indices."""
    sizes = effective(trainer)
    scene, saved = bytes_per_scene(trainer)
    batch = sizes["training.batch_size"]
    held = 0 if trainer.source.name != "simulate" else scene  # scenes that were read are in memory already
    return {
        "training.batch_size": batch * (scene + saved),
        "training.accumulate": (sizes["training.accumulate"] - 1) * batch * held,
        "data.val_limit": sizes["data.val_limit"] * held,
        "data.train_scenes": INDEX_BYTES * sizes["data.train_scenes"],
    }


def bytes_per_scene(trainer: Trainer) -> tuple[float, float]:
    """Of its arrays, and of what its forward pass keeps for the backward pass; by two small batches, which train
    nothing."""
    few, more = (min(size, trainer.source.size("train")) for size in (FEW, MORE))
    measured = [(size, *_measure(trainer, size)) for size in dict.fromkeys((few, more))]
    size, scenes, saved = measured[-1]
    if len(measured) == 1:
        return scenes / size, saved / size
    return scenes / size, max(0.0, (saved - measured[0][2]) / (size - measured[0][0]))


def _measure(trainer: Trainer, size: int) -> tuple[int, int]:
    """Bytes of the scenes, and of the distinct tensors that a forward pass over them keeps."""
    scenes = trainer.source.batch("train", torch.arange(size, device=trainer.source.index_device))
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.random.fork_rng([]), saved_tensors_hooks(keep, lambda value: value):
        with autocast(trainer.device, trainer.config.training.precision):
            prediction = trainer.model(*network_inputs(scenes))
        loss = trainer.loss(prediction, scenes)[0]
    del loss
    own = {
        parameter.untyped_storage().data_ptr() for parameter in (*trainer.model.parameters(), *trainer.model.buffers())
    }
    return _bytes(scenes), sum(each for place, each in kept.items() if place not in own)


def _bytes(scenes: Scenes) -> int:
    values: list[Any] = [getattr(scenes, each.name) for each in fields(scenes) if each.name != "codes"]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def gigabytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _round(number: int) -> int:
    """Two significant digits, downwards."""
    scale = 10 ** max(0, len(str(number)) - 2)
    return number // scale * scale


def free_memory() -> float:
    """Bytes that a process may still take here: what the machine has left, or its control group, if that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    listing = Path("/proc/meminfo")
    if listing.is_file():
        free = next(
            (
                int(line.split()[1]) * 1024
                for line in listing.read_text().splitlines()
                if line.startswith("MemAvailable")
            ),
            free,
        )
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
            free = min(free, most - now)
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return free
