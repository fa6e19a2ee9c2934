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
from ris_fast.models.modes import eval_mode
from ris_fast.models.prediction import Prediction
from ris_fast.physics.matched_filter import shown_matched_filter, shrunk_nmse
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
    """NMSE of what the network's inputs say without it: of its own estimator, else of the matched filter; empty where
    they have neither.

    Args: constant: the mean covariance, towards which the matched filter is shrunk, (N, N, 2); static: one symbol a
        source and scene.
    """
    scores, name = [], "matched_filter"
    for scenes in batches:
        shown = network.inputs(*network_inputs(scenes))
        if hasattr(model, "classical"):
            name, factor = model.classical(shown)
            scores.append(scene_nmse(Prediction(factor), scenes).double())
        elif (factor := shown_matched_filter(shown, scenes.codes, static)) is not None:
            scores.append(shrunk_nmse(factor, scenes, constant)[0])
    return {name: torch.cat(scores).mean().item()} if scores else {}
