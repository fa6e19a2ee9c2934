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
    """Run `number`: network, batch, precision, scenes, loss and optimizer, all within what should work."""
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
    if number // 2 % 3:  # the other third is as plain as it was
        settings |= _unusual(model, random.Random(104_729 * number + 3))
    if settings.get("task.symbols") == "per_snapshot":  # a field for each snapshot takes its time
        settings |= {"training.batch_size": 32, "training.accumulate": min(accumulate, 2), "data.train_scenes": 500}
    if from_npz(number):
        settings |= {"task.power": "path_loss"}  # as those files are written
    return changed(TWINS[model](), settings)


def _unusual(model: str, draw: random.Random) -> dict[str, Any]:
    """Settings that are rare and right; each is drawn in some of the runs."""
    truths = {
        "loss.cov": (1.0, 0.2, 5.0),
        "loss.cov_pred": (0.0, 0.5),
        "loss.subspace": (0.0, 0.3),
        "loss.contrast": (0.1,),
        "loss.orthogonality": (0.0, 1e-2),
        "loss.cross": (0.0, 1e-2),
        "loss.beta": (0.2,),
        "loss.loading": (1e-2,),
        "loss.shrink": (0.1,),
    }
    heads = {"loss.angle": (0.5,), "loss.range": (0.2,), "loss.chamfer": (0.5,), "loss.count": (0.2,)}
    rest = {
        "task.wavefront": ("spherical",),
        "task.symbols": ("per_snapshot",),
        "task.snr_max_db": (30.0,),
        "task.bs_antennas": (4, 16),
        "task.snapshots": (12, 16),
        "task.code_bits": (1, 2, 6),
        "task.phase_error_deg": (5.0,),
        "task.channel_snr_db": (25.0,),
        "task.spacing_wavelengths": (0.25,),
        "optimizer.beta1": (0.8, 0.95),
        "optimizer.beta2": (0.95, 0.99),
        "optimizer.eps": (1e-6,),
        "optimizer.warmup": (0.0, 0.3),
        "optimizer.final_lr": (0.0, 0.5, 1.0),
        "training.patience": (3,),
        "data.val_scenes": (50, 500),
        "data.val_limit": (40, 500),
    }
    own = {
        "backprojection": {"model.options.atoms": (4, 8), "model.options.depth": (3,)},
        "hybrid": {"model.options.heads": (1, 4), "model.options.feedforward": (32,), "model.options.grid": (9,)},
    }
    table = truths | (heads if model == "hybrid" else {}) | rest | own[model]
    return {key: draw.choice(values) for key, values in table.items() if draw.random() < 0.2}


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


def from_npz(number: int) -> bool:
    """Every eighth pair reads files of the original pipeline's format."""
    return number // 2 % 8 == 1


def with_files(number: int, config: Config, folder: Path) -> Config:
    """Run `number` on scenes in files, where it reads any."""
    if from_shards(number):
        return with_shards(config, folder)
    return with_npz(config, folder) if from_npz(number) else config


def with_npz(config: Config, folder: Path) -> Config:
    """The run on scenes of the same kind, written to `folder` from the original's formulas."""
    from tests.data.make_npz import write_folders

    data, write = config.data, write_folders
    write(folder, train=data.train_scenes, val=data.val_scenes, test=8, task=config.task, seed=data.seed)
    return changed(config, {"data.source": "npz", "data.path": str(folder)})


def with_shards(config: Config, folder: Path) -> Config:
    """The same run on scenes written to `folder` and read back."""
    data = config.data
    write_shards(config, folder, {"train": data.train_scenes, "val": data.val_scenes, "test": data.test_scenes})
    return changed(config, {"data.source": "shards", "data.path": str(folder)})
