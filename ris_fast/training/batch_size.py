"""Which batch size fits: `--batch-size auto`, tried in under 20 seconds, and the advice after memory ran out."""

from __future__ import annotations

import gc
import resource
import time
from dataclasses import dataclass, replace

import torch

from ris_fast.config.schema import Config
from ris_fast.environment import free_memory
from ris_fast.training.footprint import is_memory
from ris_fast.training.ranks.group import ALONE
from ris_fast.training.trainer import Trainer

SIZES = tuple(2**power for power in range(5, 15))
SECONDS, SHARE = 18.0, 0.95  # a size within 5 % of the best rate counts as fast
SLOW = 3.0  # seconds of steps after which a size is judged by what it has done
MEMORY_SHARE = 0.8  # of what is free now
UPDATES = 1000  # a run must keep this many optimizer steps


@dataclass(frozen=True)
class Trial:
    """One size: scenes a second, or 0 where it does not fit; bytes that it needed (device, or growth of the
    process)."""

    batch_size: int
    scenes_per_s: float
    bytes: int


def with_best_batch_size(config: Config) -> Config:
    """The settings with the batch size that suits this device and network; says on standard output which, and why."""
    size, trials = choose_batch_size(config)
    rates = ", ".join(
        f"{trial.batch_size}: {trial.scenes_per_s:,.0f}" if trial.scenes_per_s else f"{trial.batch_size}: does not fit"
        for trial in trials
    )
    print(
        f"batch size {size}: of those that leave the run {UPDATES:,} updates, or the smallest, the largest that is as"
        f" fast as any (scenes/s: {rates})"
    )
    return replace(
        config,
        training=replace(config.training, batch_size=size),
        provenance={**config.provenance, "training.batch_size": "--batch-size auto"},
    )


def choose_batch_size(config: Config, seconds: float = SECONDS) -> tuple[int, list[Trial]]:
    """Tries powers of two from 32 up, eager, on the real network and scenes, and returns the choice and the trials.

    The largest size within 5 % of the best rate, of those that leave the run 1,000 updates. Compiled steps need no more
    memory than eager ones. On a CPU a size whose memory, extrapolated, would not leave a fifth of what is free is not
    tried.
    """
    trials: list[Trial] = []
    began = time.monotonic()
    for size in SIZES:
        if trials and (
            not _room(trials[-1], config) or time.monotonic() - began + 3.0 * _duration(trials[-1], size) > seconds
        ):
            break
        trials.append(try_size(config, size))
        if not trials[-1].scenes_per_s:
            break
    if not trials[0].scenes_per_s:
        return 1, trials
    return pick(config, trials), trials


def pick(config: Config, trials: list[Trial]) -> int:
    """The choice among trials, of which at least one fits."""
    fits = [trial for trial in trials if trial.scenes_per_s]
    allowed = [trial for trial in fits if _updates(config, trial) >= UPDATES] or fits[:1]
    best = max(trial.scenes_per_s for trial in allowed)
    return max(trial.batch_size for trial in allowed if trial.scenes_per_s >= SHARE * best)


def _updates(config: Config, trial: Trial) -> float:
    """Optimizer steps of the run with this size: by its epochs, or fewer where its time ends first."""
    training = config.training
    scenes = float(training.epochs * config.data.train_scenes)
    if training.max_seconds:
        scenes = min(scenes, training.max_seconds * trial.scenes_per_s)
    return scenes / (trial.batch_size * training.accumulate)


def try_size(config: Config, size: int) -> Trial:
    """Best rate of up to three steps of this size, scenes included."""
    _clean()
    before = _resident()
    try:
        data = replace(config.data, train_scenes=max(size, config.data.train_scenes))
        alone = replace(config, data=data, training=replace(config.training, batch_size=size, compile=False))
        trainer = Trainer(alone, ranks=ALONE)
        trainer.model.train()
        index = torch.arange(size, device=trainer.source.index_device) % trainer.source.size("train")
        times = [_timed(trainer, index)]
        while len(times) < 3 and sum(times) < SLOW:
            times.append(_timed(trainer, index))
        needed = (
            torch.cuda.max_memory_allocated(trainer.device)
            if trainer.device.type == "cuda"
            else max(0, _resident() - before)
        )
        return Trial(size, size / min(times), needed)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return Trial(size, 0.0, 0)


def advice(config: Config) -> str:
    """What to run instead: the largest halved micro-batch whose step goes through here, same scenes an update."""
    training = config.training
    size, parts = min(training.batch_size, config.data.train_scenes) // 2, 2  # no batch is larger than an epoch
    while size >= 1:
        smaller = replace(config, training=replace(training, batch_size=size, accumulate=parts * training.accumulate))
        if one_step_fits(smaller):
            return (
                f"--batch-size {size} --accumulate {smaller.training.accumulate} fits (tried just now) and makes "
                "updates of as many scenes."
            )
        size, parts = size // 2, 2 * parts
    return "Not even one scene fits. Use a smaller network, or a device with more memory."


def one_step_fits(config: Config) -> bool:
    """Whether one micro-batch goes forward, backward and through the optimizer in this machine's memory."""
    _clean()
    try:
        # Eager: it needs more memory than compiled, and no compiler's time.
        trainer = Trainer(replace(config, training=replace(config.training, compile=False)), ranks=ALONE)
        trainer.step([trainer.source.batch("train", torch.arange(config.training.batch_size))], 1)
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return False


def _timed(trainer: Trainer, index: torch.Tensor) -> float:
    begin = time.perf_counter()
    trainer.step([trainer.source.batch("train", index)], 10**6)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - begin


def _duration(trial: Trial, size: int) -> float:
    return size / max(trial.scenes_per_s, 1e-9)


def _room(trial: Trial, config: Config) -> bool:
    """Whether twice the memory of this trial is free on a CPU; a GPU is simply tried."""
    if config.training.device.startswith("cuda") or (config.training.device == "auto" and torch.cuda.is_available()):
        return True
    return 2 * trial.bytes < MEMORY_SHARE * free_memory()


def _resident() -> int:
    """The process's largest memory so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
