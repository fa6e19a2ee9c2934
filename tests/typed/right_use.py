"""Every public name, used as it is meant; `mypy` must accept this file. Nothing here is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast import (
    Callback,
    CovarianceLoss,
    FusedAdamW,
    Predictor,
    RISArray,
    SceneGenerator,
    Scenes,
    Tracker,
    Trainer,
    __version__,
    build_model,
    cov_nmse,
    load,
    load_config,
    simulate,
    steering,
)
from ris_fast.config import Config, ConfigError
from ris_fast.health import Finding, watch
from ris_fast.inference.located import Located
from ris_fast.kernels.field.op import aperture_field
from ris_fast.models import Prediction
from ris_fast.physics.channel import backproject, effective_channel, sense
from ris_fast.physics.least_squares import least_squares_factor


def settings() -> Config:
    try:
        return load_config("run.toml", preset="laptop", overrides=["training.epochs=1"], flags={"training.seed": 1})
    except ConfigError as error:
        print(error.exit_code, __version__)
        return load_config(Path("run.toml"))


def scenes(config: Config) -> Scenes:
    by_number: Scenes = simulate(config.task, torch.arange(8), SceneGenerator(seed=0, split="train"))
    first_eight: Scenes = simulate(config.task, 8, SceneGenerator(seed=0, split="val", device="cpu"))
    snapshots: Tensor = by_number.snapshots
    channel: Tensor | None = by_number.channel
    assert channel is not None and snapshots.shape[0] == first_eight.batch
    return first_eight[:4].to("cpu")


def near_field(config: Config) -> Tensor:
    angles = torch.zeros(3)
    array: RISArray = RISArray.of(config.task)
    x, y = RISArray(horizontal=12, vertical=12, wavelength_m=0.3, spacing_m=0.15).positions()
    return steering(array, angles, angles, range_m=torch.ones(3)) + x.sum() + y.sum()


class OwnNetwork(nn.Module):
    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Prediction:
        matched: Tensor = backproject(channel, codes, snapshots).sum(1)
        field: Tensor = aperture_field(channel, codes, snapshots, snr_db, steps=6)
        left: Tensor = snapshots - sense(channel, codes, field[:, :, 0]) * effective_channel(channel, codes)
        return Prediction(field + matched[:, :, None] + left.sum())


def sampled(batch: Scenes) -> Tensor:
    return least_squares_factor(Scenes.concatenate([batch, batch[torch.arange(2)]]), steps=3)


def losses(config: Config, batch: Scenes, prediction: Prediction) -> Tensor:
    total: Tensor
    terms: dict[str, Tensor]
    total, terms = CovarianceLoss(config.loss, config.task)(prediction, batch)
    nmse: Tensor = cov_nmse(prediction.factor, target_factor=batch.factor, loading=0.1, reduction="none")
    return nmse.mean() + total + sum(terms.values())


def own_loop(config: Config) -> list[Finding]:
    model: nn.Module = build_model("backprojection", config.task)
    optimizer = FusedAdamW(model.named_parameters(), lr=1e-3, max_grad_norm=1.0, ema_decay=0.999)
    seen = watch(model, optimizer, frozen=["encoder."])
    optimizer.step()
    counters: dict[str, int] = optimizer.counters()
    with optimizer.ema():
        print(counters["applied"], optimizer.telemetry().tolist())
    return seen.report()


def found(config: Config, batch: Scenes) -> Located:
    mine = Predictor(nn.Linear(4, 1), config.task)
    assert batch.channel is not None
    located: Located = load("runs/mine", device="cpu").predict(batch.snapshots, batch.channel, batch.codes)
    print(located.azimuth_deg.shape, located.numpy()["range_m"], mine.task)
    return mine.predict(
        batch.snapshots.numpy(), batch.channel, batch.codes, batch.snr_db, count="aic", method="likelihood"
    )


class Losses(Callback):
    def on_log(self, row: dict[str, Any]) -> None:
        print(row["train_loss"])


def whole_run(config: Config) -> dict[str, Any]:
    tracker = Tracker("tensorboard", "runs/mine", config, report=print)
    Trainer(config, model=torch.nn.Linear(2, 2), loss=term).fit()
    load("runs/mine", model=torch.nn.Linear(2, 2))
    return Trainer(config, folder="runs/mine", callbacks=[Losses(), tracker], resume=False).fit()


def term(prediction: Prediction, scenes: Scenes) -> Tensor:
    return prediction.factor.square().mean()
