"""One optimizer step of the same network on the same scenes: ours, compiled and eager, against the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ris_fast.benchmarks.peers.eager import EagerLoop, with_dense_target
from ris_fast.benchmarks.peers.original import OriginalLoop
from ris_fast.config.schema import Config
from ris_fast.physics.scenes import Scenes
from ris_fast.streams import stage
from ris_fast.timing import Found, Stopped, alternate, once, times_slower
from ris_fast.training.capture import CapturedStep
from ris_fast.training.mfu import peak_matmul_rate, step_flops
from ris_fast.training.trainer import Trainer

OURS, EAGER, COMPILED, ORIGINAL = "ours", "eager loop", "eager loop, compiled", "original's step"
PLANNED = 10**6  # length of the schedule: the learning rate stands still while steps are measured


def trainer_of(config: Config, batch_size: int, compile: bool) -> Trainer:
    """A trainer without a folder; its telemetry is read as seldom as in a run."""
    training = replace(config.training, batch_size=batch_size, compile=compile)
    return Trainer(replace(config, training=training))


class ReadyScenes:
    """A source whose every batch is one that lies ready, so that a step is measured without the making of its
    scenes."""

    def __init__(self, source: Any, scenes: Scenes) -> None:
        self.source, self.scenes = source, scenes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batch(self, split: str, index: Tensor) -> Scenes:
        return self.scenes


def our_step(trainer: Trainer, scenes: Scenes) -> Callable[[], Any]:
    """The trainer's own step, a captured one on a GPU, with the first, densely watched steps already behind it."""
    trainer.model.train()
    call = lambda: trainer.step([scenes], PLANNED)  # noqa: E731
    if trainer.device.type == "cuda":
        captured, index = (
            CapturedStep(trainer.step, ReadyScenes(trainer.source, scenes), trainer.config),
            [scenes.index],
        )
        call = lambda: captured(index, PLANNED)  # noqa: E731
    for _ in range(12):
        call()
    return call


def contestants(
    config: Config, batch_size: int, *, compile: bool = True
) -> tuple[dict[str, Callable[[], Any]], dict[str, float], Trainer]:
    """Name -> step; seconds that compiling took; our eager trainer, for phases and counts.

    Peers get the dense target ready made. The original's step serves the network `hybrid` only.
    """
    trainer = trainer_of(config, batch_size, False)
    device, config = trainer.device, replace(config, training=trainer.config.training)  # with the precision chosen
    scenes = trainer.source.batch("train", torch.arange(batch_size))
    dense = with_dense_target(scenes)
    calls: dict[str, Callable[[], Any]] = {f"{OURS}, eager": our_step(trainer, scenes)}
    eager = EagerLoop(config, device)
    calls[EAGER] = lambda: eager.step(dense)
    if config.model.name == "hybrid":
        original = OriginalLoop(config, device)
        calls[ORIGINAL] = lambda: original.step(dense)
    seconds: dict[str, float] = {}
    if compile:
        ours, theirs = trainer_of(config, batch_size, True), EagerLoop(config, device, compile=True)
        first = {f"{OURS}, compiled": lambda: ours.step([scenes], PLANNED), COMPILED: lambda: theirs.step(dense)}
        for name, call in first.items():
            stage(f"compiling {name}, a minute or two")
            seconds[name] = once(call, device).host
        calls |= {f"{OURS}, compiled": our_step(ours, scenes), COMPILED: first[COMPILED]}
    return calls, seconds, trainer


def compare_steps(
    config: Config, batch_size: int, *, compile: bool = True, quiet: int = 7, seconds: float = 60.0
) -> dict[str, Any]:
    """Times of every contestant, alternating; how many times slower than our best each is; MFU.

    Raises Stopped at Ctrl-C, with the same of the rounds that were whole.
    """
    stage("building the contestants")
    calls, compile_s, trainer = contestants(config, batch_size, compile=compile)
    try:
        found = alternate(calls, trainer.device, quiet=quiet, seconds=seconds)
    except Stopped as stop:
        raise Stopped(stop.found and _compared(stop.found, config, batch_size, compile_s, trainer)) from None
    return _compared(found, config, batch_size, compile_s, trainer)


def _compared(
    found: Found, config: Config, batch_size: int, compile_s: dict[str, float], trainer: Trainer
) -> dict[str, Any]:
    ours = min(each["s"] for name, each in found.items() if name.startswith(OURS))
    return {
        "preset": config.preset,
        "model": config.model.name,
        "parameters": trainer.parameters,
        "batch_size": batch_size,
        "precision": trainer.config.training.precision,
        "compile_and_first_step_s": compile_s,
        "variants": found,
        "times_slower_than_ours": times_slower(found, ours),
        "scenes_per_s": {name: batch_size / each["s"] for name, each in found.items()},
        **utilisation(trainer, batch_size, ours),
    }


def utilisation(trainer: Trainer, batch_size: int, seconds: float) -> dict[str, float]:
    """FLOPs of a step that takes `seconds`, their rate, the rate of one large matrix product, and the share of it."""
    scenes = trainer.source.batch("val", torch.arange(min(batch_size, 8)))
    flops = round(step_flops(trainer.config, scenes) * batch_size)
    peak = peak_matmul_rate(trainer.device, trainer.config.training.precision)
    return {
        "flops_a_step": flops,
        "flop_per_s": flops / seconds,
        "peak_matmul_flop_per_s": peak,
        "mfu": flops / seconds / peak,
    }
