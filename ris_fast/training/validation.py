"""Validation on one fixed set of scenes, raw and averaged weights both, in evaluation mode and without gradients.

Legend: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.telemetry import prints, weight_norms


@dataclass(frozen=True)
class Score:
    """One set of weights on the validation scenes. `nmse` is the plain covariance NMSE, whatever the loss weights."""

    loss: float
    nmse: float
    median: float
    asleep: bool = True           # every module was in evaluation mode
    answers: str = ""             # hash of the factors: equal for equal answers, bit for bit
    weights: Tensor | None = None  # (T,) norms of the weights that were scored


def target_of(scenes: Scenes) -> dict[str, Tensor]:
    """The target as `cov_nmse` takes it: the factor where the scenes carry one, else the dense covariance."""
    return {"target_factor": scenes.factor} if scenes.factor is not None else {"target_cov": scenes.covariance}


def scene_nmse(prediction: Prediction, scenes: Scenes) -> Tensor:
    """Plain NMSE of each scene: (B,) float32."""
    return cov_nmse(prediction.factor.float(), **target_of(scenes), reduction="none")


@torch.no_grad()
def validate(model: nn.Module, predict: Callable[[Scenes], Prediction], loss: CovarianceLoss,
             batches: Iterable[Scenes]) -> Score:
    """Scores the model's present weights; its mode (train or eval) is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        losses, scores, sizes, answers, awake, weights = [], [], [], [], 0, weight_norms(model)
        for scenes in batches:
            prediction = predict(scenes)
            awake += sum(module.training for module in model.modules())
            answers.append(prints(prediction.factor).sum())
            losses.append(loss(prediction, scenes)[0])
            scores.append(scene_nmse(prediction, scenes))
            sizes.append(scenes.batch)
    finally:
        model.train(was_training)
    nmse = torch.cat(scores).double()
    share = torch.tensor(sizes, dtype=torch.float64, device=nmse.device) / nmse.numel()
    return Score((torch.stack(losses).double() * share).sum().item(), nmse.mean().item(), nmse.median().item(),
                 not awake, f"{sum(each.item() for each in answers) & (2**64 - 1):016x}", weights)
