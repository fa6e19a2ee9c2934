"""A whole training measured: scenes a second as the loop counts them, time by phase, memory, growth, time to a
target."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ris_fast.benchmarks.train_step import PLANNED, trainer_of, utilisation
from ris_fast.config.schema import Config
from ris_fast.streams import stage
from ris_fast.timing import Stopwatch, alternate, synchronize, waited_ns
from ris_fast.training.callback import Callback
from ris_fast.training.step import autocast, network_inputs
from ris_fast.training.trainer import Trainer

PHASES = ("simulate", "features", "forward", "loss", "backward", "step")
TARGETS = (0.5, 0.35, 0.187, 0.03, 0.02)
ARRAYS = (8, 12, 16, 24, 32)


class Epochs(Callback):
    """Keeps every epoch's row."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.rows.append(dict(row))


def loop_rate(config: Config, batch_size: int, steps: int, *, compile: bool = False, epochs: int = 3) -> dict[str, Any]:
    """Scenes a second of the trainer's own loop, simulation and features included; validation and the first epoch are
    not.

    Returns also the peak memory in bytes: of the device on a GPU, of the whole process on a CPU.
    """
    data = replace(config.data, train_scenes=steps * batch_size, val_scenes=64, val_limit=64)
    training = replace(config.training, batch_size=batch_size, epochs=epochs, max_seconds=0.0, compile=compile)
    watch, waited = Epochs(), waited_ns()
    trainer = Trainer(replace(config, data=data, training=training), callbacks=[watch])
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    trainer.fit()
    rates = [row["scenes_per_s"] for row in watch.rows[1:]]
    return {
        "batch_size": batch_size,
        "scenes_per_s": max(rates),
        "all_scenes_per_s": rates,
        "compile": trainer.compile_note,
        "peak_memory_bytes": peak_memory(trainer.device),
        "waited_for_a_core_s": (waited_ns() - waited) * 1e-9,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU since the last reset; resident in the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_batch(config: Config, sizes: Sequence[int], scenes: int, *, compile: bool = False) -> list[dict[str, Any]]:
    """`loop_rate` for each batch size, until one does not fit into memory; `scenes` an epoch, at least two steps."""
    rows = []
    for size in sizes:
        stage(f"training with batches of {size:,}")
        try:
            rows.append(loop_rate(config, size, max(2, scenes // size), compile=compile))
        except (MemoryError, torch.OutOfMemoryError) as error:
            rows.append({"batch_size": size, "scenes_per_s": None, "error": type(error).__name__})
            break
    return rows


def phases(config: Config, batch_size: int, *, repetitions: int = 15) -> dict[str, Any]:
    """Median seconds of each phase of a step, kernel by kernel; the sum is more than a captured step takes."""
    trainer = trainer_of(config, batch_size, False)
    laps = [_one_pass(trainer, batch_size) for _ in range(repetitions + 2)][2:]
    middle = {name: sorted(lap[name] for lap in laps)[repetitions // 2] for name in PHASES}
    total = sum(middle.values())
    return {
        "batch_size": batch_size,
        "s": middle,
        "total_s": total,
        "share": {name: value / total for name, value in middle.items()},
    }


def _one_pass(trainer: Trainer, batch_size: int) -> dict[str, float]:
    device, precision = trainer.device, trainer.config.training.precision
    index = torch.arange(batch_size, device=trainer.source.index_device)
    trainer.model.train()
    synchronize(device)
    watch = Stopwatch(device)
    scenes = trainer.source.batch("train", index)
    watch.lap("simulate")
    with autocast(device, precision):
        features = trainer.model.features(*network_inputs(scenes))
        watch.lap("features")
        prediction = trainer.model.trunk(features)
    watch.lap("forward")
    trainer.optimizer.zero_grad(set_to_none=False)
    loss, _ = trainer.loss(prediction, scenes)
    watch.lap("loss")
    loss.backward()
    watch.lap("backward")
    trainer.optimizer.step()
    watch.lap("step")
    return watch.read()


def step_call(config: Config, batch_size: int) -> tuple[Callable[[], Any], Trainer]:
    """A step with the making of its scenes, kernel by kernel, its first and densely watched calls behind it."""
    trainer = trainer_of(config, batch_size, False)
    index = torch.arange(batch_size, device=trainer.source.index_device)
    trainer.model.train()
    call = lambda: trainer.step([trainer.source.batch("train", index)], PLANNED)  # noqa: E731
    for _ in range(9):
        call()
    return call, trainer


def efficiency(config: Config, batch_size: int) -> dict[str, Any]:
    """FLOP/s of a step with simulation and features, and its share of one large matrix product's."""
    call, trainer = step_call(config, batch_size)
    seconds = alternate({"step": call}, trainer.device, quiet=9, seconds=10.0)["step"]
    return {"batch_size": batch_size, "step": seconds, **utilisation(trainer, batch_size, seconds["s"])}


def growth(configs: Mapping[Any, Config], batch_size: int, seconds: float = 10.0) -> dict[str, Any]:
    """Seconds a scene for each configuration, alternating, and the exponent from the first to the last key."""
    calls, device = {}, None
    for key, config in configs.items():
        calls[str(key)], trainer = step_call(config, batch_size)
        device = trainer.device
    found = alternate(calls, device, quiet=5, seconds=seconds, warm=1)
    scene = {key: found[str(key)]["s"] / batch_size for key in configs}
    first, last = list(configs)[0], list(configs)[-1]
    power = math.log(scene[last] / scene[first]) / math.log(last / first)
    return {"batch_size": batch_size, "s_a_scene": scene, "exponent": power, "runs": found}


def with_array(config: Config, side: int) -> Config:
    return replace(config, task=replace(config.task, ris_horizontal=side, ris_vertical=side))


def with_depth(config: Config, depth: int) -> Config:
    """`backprojection` of this depth, narrow, so that tensors and not products are what grows."""
    return replace(config, model=replace(config.model, options={"depth": depth, "width": 64}))


def time_to_target(
    config: Config, max_seconds: float, every_steps: int = 5, targets: Sequence[float] = TARGETS
) -> dict[str, Any]:
    """Seconds of a run, validation included, until the validation NMSE is at or below each target; None if it never
    was.

    The schedule anneals towards `max_seconds`; validation on 1,000 scenes every `every_steps` steps.
    """
    size = config.training.batch_size
    data = replace(config.data, train_scenes=every_steps * size, val_scenes=1000, val_limit=1000)
    training = replace(config.training, epochs=100_000, max_seconds=max_seconds)
    watch = Epochs()
    trainer = Trainer(replace(config, data=data, training=training), callbacks=[watch])
    summary = trainer.fit()
    curve = [
        (row["seconds"], row["scenes_seen"], min(row["val_nmse_raw"], row["val_nmse_ema"] or math.inf))
        for row in watch.rows
    ]
    reached = {str(target): next((seconds for seconds, _, nmse in curve if nmse <= target), None) for target in targets}
    return {
        "preset": config.preset,
        "max_seconds": max_seconds,
        "seconds_to": reached,
        "best_val_nmse": summary["best_val_nmse"],
        "scenes_seen": summary["scenes_seen"],
        "scenes_per_s": summary["scenes_per_s"],
        "compile": trainer.compile_note,
        "curve": curve,
    }
