"""Each line of wrong use must be refused: `mypy` reports an ignore that hides no error. Nothing here is run."""

from __future__ import annotations

import torch
from torch import nn

import ris_fast
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
    build_model,
    cov_nmse,
    load,
    load_config,
    simulate,
    steering,
)
from ris_fast.health import watch
from ris_fast.models import Prediction
from ris_fast.physics.channel import sense
from ris_fast.physics.least_squares import least_squares_factor

config, model, angles = load_config(), nn.Linear(4, 1), torch.zeros(3)

load_config(presets="laptop")  # type: ignore[call-arg]
print(ris_fast.AdamW)  # type: ignore[attr-defined]
print(config.training.epoch)  # type: ignore[attr-defined]
simulate(config, 8, SceneGenerator())  # type: ignore[arg-type]
SceneGenerator(seed="0")  # type: ignore[arg-type]
Scenes(snapshots=angles)  # type: ignore[call-arg]
RISArray(wavelength="0.3")  # type: ignore[call-arg]
steering(RISArray(), 0.1, angles, angles)  # type: ignore[arg-type]
cov_nmse(angles, target=angles)  # type: ignore[arg-type]
cov_nmse(angles, angles)  # type: ignore[arg-type]
cov_nmse(angles, target_factor=[0.0])  # type: ignore[arg-type]
CovarianceLoss(config.task)  # type: ignore[arg-type]
build_model(model)  # type: ignore[arg-type]
FusedAdamW(model.parameters(), learning_rate=1e-3)  # type: ignore[call-arg]
FusedAdamW(0.1)  # type: ignore[arg-type]
sense(angles, angles)  # type: ignore[call-arg]
least_squares_factor(angles)  # type: ignore[arg-type]
Prediction(factors=angles)  # type: ignore[call-arg]
Tracker("tensorboard")  # type: ignore[call-arg]
Trainer("laptop")  # type: ignore[arg-type]
Trainer(config, model="net.py:Net")  # type: ignore[arg-type]
Trainer(config, loss=0.5)  # type: ignore[arg-type]
load("runs/mine", model="net.py:Net")  # type: ignore[arg-type]
Trainer(config, callbacks=[Callback]).fit()  # type: ignore[list-item]
Trainer(config).train()  # type: ignore[attr-defined]
load("runs/mine", devise="cpu")  # type: ignore[call-arg]
load("runs/mine").predict(angles)  # type: ignore[call-arg]
Predictor(model, config)  # type: ignore[arg-type]
watch(model)  # type: ignore[call-arg]
watch(model, torch.optim.SGD(model.parameters(), lr=0.1)).reports()  # type: ignore[attr-defined]
