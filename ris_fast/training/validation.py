"""Validation on one fixed set of scenes, raw and averaged weights both, in evaluation mode and without gradients.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.models.classical import Classical, classical_estimate
from ris_fast.models.modes import eval_mode
from ris_fast.models.prediction import Prediction
from ris_fast.physics.matched_filter import shrinkage, shrunk
from ris_fast.physics.scenes import Scenes
from ris_fast.training.compiled_model import Network
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.step import network_inputs
from ris_fast.training.telemetry.step_telemetry import row_hashes, weight_norms


@dataclass(frozen=True)
class Score:
    """One set of weights on the validation scenes. `nmse` is the plain covariance NMSE, whatever the loss weights."""

    loss: float
    nmse: float
    median: float
    in_eval_mode: bool = True  # every module was in evaluation mode
    prediction_hash: str = ""  # hash of the factors: equal for equal answers, bit for bit
    weights: Tensor | None = None  # (T,) norms of the weights that were scored


def target_of(scenes: Scenes) -> dict[str, Tensor]:
    """The target as `cov_nmse` takes it: the factor where the scenes carry one, else the dense covariance."""
    return {"target_factor": scenes.factor} if scenes.factor is not None else {"target_cov": scenes.covariance}


def scene_nmse(prediction: Prediction, scenes: Scenes) -> Tensor:
    """Plain NMSE of each scene: (B,) float32."""
    return cov_nmse(prediction.factor.float(), **target_of(scenes), reduction="none", validate=False)


class Measured(NamedTuple):
    """Scores on the device: loss (), NMSE (B,) float64, sum of the factors' hashes (), norms of the weights (T,)."""

    loss: Tensor
    nmse: Tensor
    prediction_hash: Tensor
    weights: Tensor
    modules_in_train_mode: int  # modules found in training mode


@torch.no_grad()
def measure(
    model: nn.Module, predict: Callable[[Scenes], Prediction], loss: CovarianceLoss, batches: Iterable[Scenes]
) -> Measured:
    """What `validate` scores, without a host read."""
    losses, scores, hashes, modules_in_train_mode, weights = [], [], [], 0, weight_norms(model)
    for scenes in batches:
        prediction = predict(scenes)
        modules_in_train_mode += _modules_in_train_mode(model)
        hashes.append(row_hashes(prediction.factor).sum())
        losses.append(loss(prediction, scenes)[0].double() * scenes.batch)
        scores.append(scene_nmse(prediction, scenes))
    nmse = torch.cat(scores).double()
    return Measured(
        torch.stack(losses).sum() / nmse.numel(), nmse, torch.stack(hashes).sum(), weights, modules_in_train_mode
    )


def _modules_in_train_mode(model: nn.Module) -> int:
    return sum(module.training for module in model.modules())


def validate(
    model: nn.Module,
    predict: Callable[[Scenes], Prediction],
    loss: CovarianceLoss,
    batches: Iterable[Scenes],
    run: Callable[[Callable[[], Measured]], Measured] = lambda work: work(),
) -> Score:
    """Scores the model's present weights; the mode of each of its modules is put back afterwards.

    `run`: calls the work, or stands in for it with a captured graph of the same.
    """
    with eval_mode(model):
        found = run(lambda: measure(model, predict, loss, batches))
        modules_in_train_mode = found.modules_in_train_mode + _modules_in_train_mode(model)
    return Score(
        found.loss.item(),
        found.nmse.mean().item(),
        found.nmse.median().item(),
        modules_in_train_mode == 0,
        f"{found.prediction_hash.item() & (2**64 - 1):016x}",
        found.weights.clone(),
    )


@torch.no_grad()
def classical_baseline(
    model: nn.Module, network: Network, batches: Iterable[Scenes], constant: Tensor, static: bool
) -> dict[str, float]:
    """Name and NMSE of what a classical estimator makes of the network's inputs; empty where there is none.

    Args: constant: the mean covariance, towards which an estimate of the field is shrunk, (N, N, 2); static: one symbol
        a source and scene.
    """
    parts, name = [], ""
    for scenes in batches:
        found = classical_estimate(model, network.inputs(*network_inputs(scenes)), scenes, static=static)
        if found is None:
            return {}
        name = found.name
        parts.append(estimate_parts(found, scenes, constant))
    return {name: estimate_nmse(torch.cat(parts)).mean().item()} if parts else {}


def estimate_parts(found: Classical, scenes: Scenes, constant: Tensor) -> Tensor:
    """What `estimate_nmse` needs of each scene: (B,) or, of a field, (B, 3) float64. Batches are concatenated."""
    if found.field:
        return shrinkage(found.factor, scenes, constant)
    return scene_nmse(Prediction(found.factor), scenes).double()


def estimate_nmse(parts: Tensor) -> Tensor:
    """NMSE of each scene, (B,) float64: of sources as they were found, of a field shrunk towards the constant answer as
    serves all these scenes best."""
    return shrunk(parts) if parts.dim() == 2 else parts
