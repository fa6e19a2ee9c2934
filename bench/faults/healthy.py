"""Healthy runs of many kinds, drawn from a seed: whatever is said about one of them is a false alarm."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.config.schema import Config
from ris_fast.data.write import write_shards

EPOCHS, EPOCH_STEPS = 10, 8
MOST_SCENES = 1024  # of one optimizer step, so that a run stays a matter of seconds
BATCHES = (16, 24, 32, 64, 128, 256, 512, 1024)


def healthy_config(number: int) -> Config:
    """Run `number`: network, batch, accumulation, precision, scenes and optimizer, all within what should work."""
    draw = random.Random(7919 * number + 1)
    batch = draw.choice(BATCHES)
    accumulate = draw.choice([n for n in (1, 1, 1, 2, 3, 4, 8) if n * batch <= MOST_SCENES])
    model = ("hybrid", "backprojection")[number % 2]
    rate = draw.choice((1e-3, 2e-3, 4e-3))
    scenes = EPOCH_STEPS * batch * accumulate - draw.choice((0, 0, 1, batch // 2))
    settings: dict[str, Any] = {
        "training.seed": number,
        "data.seed": number,
        "training.batch_size": batch,
        "training.accumulate": accumulate,
        "training.precision": draw.choice(("fp32", "bf16")),
        "training.epochs": EPOCHS,
        "data.train_scenes": scenes,
        "data.val_scenes": 128,
        "data.val_limit": 128,
        "data.fixed": draw.random() < 0.3,
        "optimizer.backbone_lr": rate,
        "optimizer.head_lr": rate * draw.choice((1.0, 2.0)),
        "optimizer.warmup": draw.choice((0.02, 0.1)),
        "optimizer.ema_decay": draw.choice((0.0, 0.9, 0.99, 0.999)),
        "optimizer.max_grad_norm": draw.choice((0.0, 0.5, 1.0, 10.0)),
        "optimizer.weight_decay": draw.choice((0.0, 1e-4, 1e-2)),
        "task.power": draw.choice(("equal", "path_loss")),
        "task.snr_min_db": draw.choice((-5.0, 0.0, 10.0)),
        "task.max_sources": draw.choice((1, 2, 3)),
        "report.every_steps": draw.choice((1, 2, 5)),
    }
    settings |= _network(model, draw)
    return changed(TWINS[model](), settings)


def _network(model: str, draw: random.Random) -> dict[str, Any]:
    if model == "backprojection":
        return {
            "model.options.width": draw.choice((16, 32, 64)),
            "model.options.depth": draw.choice((1, 2)),
            "task.ris_vertical": draw.choice((4, 6)),
        }
    return {
        "model.options.width": draw.choice((32, 64)),
        "model.options.dropout": draw.choice((0.0, 0.0, 0.1)),
        "model.options.layers": draw.choice((1, 2)),
        "task.ris_vertical": draw.choice((2, 4)),
    }


def from_shards(number: int) -> bool:
    """Every fourth pair of runs reads its scenes from files."""
    return number // 2 % 4 == 3


def with_shards(config: Config, folder: Path) -> Config:
    """The same run on scenes written to `folder` and read back."""
    data = config.data
    write_shards(config, folder, {"train": data.train_scenes, "val": data.val_scenes, "test": data.test_scenes})
    return changed(config, {"data.source": "shards", "data.path": str(folder)})
