"""How much memory a run's first step needs, known before it: a CPU that runs out of it ends the process without a
word."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ris_fast import exit_codes
from ris_fast.config.schema import Config
from ris_fast.data.source import SceneSource
from ris_fast.environment import free_memory
from ris_fast.physics.scenes import Scenes
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.step import autocast, network_inputs

SAFE = 0.6  # of what is free: a step takes up to 1.4 times what its scenes and saved tensors do (measured)
FEW, MORE = 2, 6  # scenes of two small batches, whose difference says what a scene needs
SMALL = 512  # scenes at once that are not measured: every machine that trains has room for them
SMALL_EPOCH = 10**7  # likewise, scenes in an epoch
INDEX_BYTES = 24  # of a training scene: its number in the order of an epoch, while that is drawn


class MeasuredRun(Protocol):
    """What is measured: the parts of a trainer that exist before its first step."""

    config: Config
    source: SceneSource
    folder: Path | None
    device: torch.device
    model: torch.nn.Module
    optimizer: FusedAdamW
    loss: torch.nn.Module


class OutOfMemory(RuntimeError):
    """The batch does not fit into memory; the message says which would. Exit code 5."""

    exit_code = exit_codes.OUT_OF_MEMORY


def is_memory(error: BaseException) -> bool:
    """torch names it OutOfMemoryError on a GPU; its CPU allocator raises a plain RuntimeError."""
    return (
        isinstance(error, (MemoryError, OutOfMemory))
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in str(error)
    )


def refuse_too_large(run: MeasuredRun) -> None:
    """Raises OutOfMemory where what a step and the validation set hold at once is more than a CPU has free, naming the
    setting."""
    sizes = effective(run)
    at_once = max(sizes["training.batch_size"] * sizes["training.accumulate"], sizes["data.val_limit"] // 16)
    if run.device.type != "cpu" or (at_once <= SMALL and sizes["data.train_scenes"] <= SMALL_EPOCH):
        return  # a GPU says so itself
    parts, free = needed_bytes(run), free_memory()
    total = sum(parts.values()) + checkpoint_bytes(run)
    if total <= free:
        return
    setting = max(parts, key=parts.__getitem__)
    value = getattr(getattr(run.config, setting.split(".")[0]), setting.split(".")[1])
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


def effective(run: MeasuredRun) -> dict[str, int]:
    """Scenes that each setting can mean at most: no step has more than an epoch, no validation more than its
    split."""
    config, train = run.config, run.source.size("train")
    batch = min(config.training.batch_size, train)
    return {
        "training.batch_size": batch,
        "training.accumulate": min(math.ceil(train / batch), config.training.accumulate),
        "data.val_limit": min(config.data.val_limit, run.source.size("val")),
        "data.train_scenes": train,
    }


def needed_bytes(run: MeasuredRun) -> dict[str, float]:
    """Bytes by the setting that asks for them: activations and scenes of a micro-batch, scenes of the others, of
    validation, indices."""
    sizes = effective(run)
    scene, saved = bytes_per_scene(run)
    batch = sizes["training.batch_size"]
    held = 0 if run.source.name != "simulate" else scene  # scenes that were read are in memory already
    return {
        "training.batch_size": batch * (scene + saved),
        "training.accumulate": (sizes["training.accumulate"] - 1) * batch * held,
        "data.val_limit": sizes["data.val_limit"] * held,
        "data.train_scenes": INDEX_BYTES * sizes["data.train_scenes"],
    }


def checkpoint_bytes(run: MeasuredRun) -> int:
    """Of the copies that checkpoints are written from: weights and averages twice, moments once; nothing without a
    folder."""
    weights = sum(value.nbytes for value in run.model.state_dict().values())
    return 0 if run.folder is None else weights * (4 if run.optimizer.ema_decay is None else 6)


def bytes_per_scene(run: MeasuredRun) -> tuple[float, float]:
    """Of its arrays, and of what its forward pass keeps for the backward pass; by two small batches, which train
    nothing."""
    few, more = (min(size, run.source.size("train")) for size in (FEW, MORE))
    measured = [(size, *_measure(run, size)) for size in dict.fromkeys((few, more))]
    size, scenes, saved = measured[-1]
    if len(measured) == 1:
        return scenes / size, saved / size
    return scenes / size, max(0.0, (saved - measured[0][2]) / (size - measured[0][0]))


def _measure(run: MeasuredRun, size: int) -> tuple[int, int]:
    """Bytes of the scenes, and of the distinct tensors that a forward pass over them keeps."""
    scenes = run.source.batch("train", torch.arange(size, device=run.source.index_device))
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.random.fork_rng([]), saved_tensors_hooks(keep, lambda value: value):
        with autocast(run.device, run.config.training.precision):
            prediction = run.model(*network_inputs(scenes))
        loss = run.loss(prediction, scenes)[0]
    del loss
    own = {parameter.untyped_storage().data_ptr() for parameter in (*run.model.parameters(), *run.model.buffers())}
    return _bytes(scenes), sum(size for pointer, size in kept.items() if pointer not in own)


def _bytes(scenes: Scenes) -> int:
    values: list[Any] = [getattr(scenes, each.name) for each in fields(scenes) if each.name != "codes"]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def gigabytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _round(number: int) -> int:
    """Two significant digits, downwards."""
    scale = 10 ** max(0, len(str(number)) - 2)
    return number // scale * scale
