"""Which batch size fits: what to say when memory runs out, and `--batch-size auto`."""

from __future__ import annotations

import gc
from dataclasses import replace

from ris_fast.config.schema import Config


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
    import torch

    from ris_fast.training.batch_size import is_memory
    from ris_fast.training.trainer import Trainer

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        trainer = Trainer(
            replace(config, training=replace(config.training, compile=False))
        )  # needs more, and no compiler's time
        trainer.step([trainer.source.batch("train", torch.arange(config.training.batch_size))], 1)
        return True
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return False


def with_best_batch_size(config: Config) -> Config:
    """The settings with the batch size that suits this device and network, told on standard output."""
    from ris_fast.training.batch_size import UPDATES, choose_batch_size

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
