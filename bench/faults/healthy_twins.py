"""The healthy configurations that faults are made in: small enough for a run of a second, and they do learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ris_fast.config.schema import Config, Data, Loss, Model, Optimizer, Report, Task, Training

EPOCH_STEPS = 8  # optimizer steps an epoch
EPOCHS = 500  # planned, of which the suite watches the first few: 1 % of the run is 40 steps, five reports


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with 'section.key' -> value on top; options of the network as 'model.options.key'."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if name.startswith("options."):
            name, value = "options", {**config.model.options, name.removeprefix("options."): value}
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def hybrid(**settings: Any) -> Config:
    """Every head of the network is used by a term of the loss; dropout off."""
    return changed(
        Config(
            task=Task(
                bs_antennas=8,
                ris_horizontal=2,
                ris_vertical=2,
                snapshots=8,
                max_sources=2,
                snr_min_db=10.0,
                power="equal",
            ),
            data=Data(train_scenes=256, val_scenes=64, test_scenes=64, val_limit=64),
            model=Model("hybrid", {"width": 32, "layers": 1, "heads": 2, "feedforward": 64, "grid": 5}),
            loss=Loss(orthogonality=1e-3, cross=1e-3, angle=0.02, range=0.02, chamfer=0.02, subspace=0.02, count=0.02),
            optimizer=Optimizer(backbone_lr=5e-3, head_lr=5e-3, warmup=0.0025, ema_decay=0.99),
            training=Training(epochs=EPOCHS, batch_size=32, compile=False, device="cpu"),
            report=Report(every_steps=2, plots=False),
        ),
        settings,
    )


def backprojection(**settings: Any) -> Config:
    """The default network, small."""
    return changed(
        hybrid(),
        {
            "task.ris_horizontal": 4,
            "task.ris_vertical": 4,
            "model.name": "backprojection",
            "model.options": {"width": 32, "depth": 1},
            "loss.angle": 0.0,
            "loss.range": 0.0,
            "loss.chamfer": 0.0,
            "loss.count": 0.0,
            **settings,
        },
    )


TWINS: dict[str, Callable[[], Config]] = {
    "hybrid": hybrid,
    "backprojection": backprojection,
    "dropout": lambda: hybrid(**{"model.options.dropout": 0.1}),
    "accumulate": lambda: hybrid(**{"training.batch_size": 8, "training.accumulate": 4}),
    "long_warmup": lambda: hybrid(**{"optimizer.warmup": 0.1}),
    "fixed": lambda: hybrid(**{"data.fixed": True}),
    "counting": lambda: hybrid(**{"loss.count": 0.3}),
    "gentle": lambda: hybrid(**{"optimizer.backbone_lr": 1e-4, "optimizer.head_lr": 1e-4}),
    "half": lambda: hybrid(**{"training.precision": "fp16"}),
    "path_loss": lambda: hybrid(**{"task.power": "path_loss"}),
    # four codes see a quarter of the array: H c_l no longer determines H
    "few_codes": lambda: hybrid(**{"task.ris_horizontal": 4, "task.ris_vertical": 4, "task.snapshots": 4}),
    # 36 elements and a factor of four columns: no constant of that rank is the mean covariance
    "wide": lambda: hybrid(
        **{"task.ris_horizontal": 6, "task.ris_vertical": 6, "training.batch_size": 64, "data.train_scenes": 512}
    ),
}
