"""Validation on one fixed set of scenes, raw and averaged weights both, in evaluation mode and without gradients.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
from ris_fast.training.ranks.group import Ranks
from ris_fast.training.scene_scores import Division, scene_summary
from ris_fast.training.step import network_inputs
from ris_fast.training.telemetry.module_modes import ModuleModes
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
    scenes_hash: str = ""  # hash of the snapshots and targets
    in_training_mode: dict[str, Any] = field(default_factory=dict)  # modules that were, by name; empty where none was
    scenes: dict[str, Any] = field(default_factory=dict)  # what `scene_summary` says of them


def target_of(scenes: Scenes) -> dict[str, Tensor]:
    """The target as `cov_nmse` takes it: the factor where the scenes carry one, else the dense covariance."""
    return {"target_factor": scenes.factor} if scenes.factor is not None else {"target_cov": scenes.covariance}


def scene_nmse(prediction: Prediction, scenes: Scenes) -> Tensor:
    """Plain NMSE of each scene: (B,) float32."""
    return cov_nmse(prediction.factor.float(), **target_of(scenes), reduction="none", validate=False)


class Measured(NamedTuple):
    """Scores on the device: loss of each batch times its scenes (C,) float64, NMSE (B,) float64, sum of the factors'
    hashes (), norms of the weights (T,), sum of the hashes of snapshots and targets ()."""

    losses: Tensor
    nmse: Tensor
    prediction_hash: Tensor
    weights: Tensor
    modules_in_train_mode: int  # modules found in training mode
    scenes_hash: Tensor


@torch.no_grad()
def measure(
    model: nn.Module, predict: Callable[[Scenes], Prediction], loss: CovarianceLoss, batches: Iterable[Scenes]
) -> Measured:
    """What `validate` scores, without a host read."""
    losses, scores, hashes, modules_in_train_mode, weights = [], [], [], 0, weight_norms(model)
    given = []
    for scenes in batches:
        given.append(scenes_hash(scenes))
        prediction = predict(scenes)
        modules_in_train_mode += _modules_in_train_mode(model)
        hashes.append(row_hashes(prediction.factor).sum())
        losses.append(loss(prediction, scenes)[0].double() * scenes.batch)
        scores.append(scene_nmse(prediction, scenes))
    if not losses:  # a rank without scenes
        none = weights.new_zeros(0, dtype=torch.float64)
        return Measured(none, none, none.long().sum(), weights, 0, none.long().sum())
    nmse = torch.cat(scores).double()
    answers, shown = torch.stack(hashes).sum(), torch.stack(given).sum()
    return Measured(torch.stack(losses), nmse, answers, weights, modules_in_train_mode, shown)


def scenes_hash(scenes: Scenes) -> Tensor:
    """(): of the snapshots and, in another weight, of the targets."""
    target = scenes.factor if scenes.factor is not None else scenes.covariance[:, :1]  # of a dense one the first row
    return row_hashes(scenes.snapshots).sum() + 3 * row_hashes(target).sum()


class ValidationShare:
    """The part of the validation scenes that each rank scores: chunk c of them is rank (c mod size)'s.

    Args: scenes: of the whole set; chunk: scenes at a time, fewer where else a rank had none.
    """

    def __init__(self, ranks: Ranks, scenes: int, chunk: int) -> None:
        self.ranks, self.scenes, self.chunk = ranks, scenes, max(1, min(chunk, -(-scenes // ranks.size)))

    def chunks(self) -> list[Tensor]:
        """The numbers of the whole set's scenes."""
        return list(torch.arange(self.scenes).split(self.chunk))

    def own(self) -> list[Tensor]:
        return self.chunks()[self.ranks.rank :: self.ranks.size]

    def whole(self, found: Measured) -> Measured:
        """What one process would have measured with these chunks, bit for bit: every figure is put where it belongs,
        and the zeros of the other ranks are added."""
        if self.ranks.alone:
            return found
        table = found.nmse.new_zeros(len(self.chunks()), self.chunk + 1)  # NMSE of a chunk's scenes, then its loss
        rows = table[self.ranks.rank :: self.ranks.size]
        for row, loss, nmse in zip(rows, found.losses, found.nmse.split(self.chunk)):
            row[: len(nmse)], row[-1] = nmse, loss
        self.ranks.sum_(table)
        nmse = table[:, :-1].flatten()[: self.scenes]
        answers, shown = (self.ranks.sum_(each.clone()) for each in (found.prediction_hash, found.scenes_hash))
        return found._replace(losses=table[:, -1], nmse=nmse, prediction_hash=answers, scenes_hash=shown)


def _hexadecimal(value: Tensor) -> str:
    return f"{value.item() & (2**64 - 1):016x}"


def _modules_in_train_mode(model: nn.Module) -> int:
    return sum(module.training for module in model.modules())


def validate(
    model: nn.Module,
    predict: Callable[[Scenes], Prediction],
    loss: CovarianceLoss,
    batches: Iterable[Scenes],
    run: Callable[[Callable[[], Measured]], Measured] = lambda work: work(),
    share: ValidationShare | None = None,
    divisions: Mapping[str, Division] | None = None,
) -> Score:
    """Scores the model's present weights; the mode of each of its modules is put back afterwards.

    `run`: calls the work, or stands in for it with a captured graph of the same. `share`: where `batches` are a part of
    the set, and the other ranks score the rest. `divisions`: ways to divide the whole set, for the summary of its
    scenes.
    """
    with eval_mode(model):
        found = run(lambda: measure(model, predict, loss, batches))
        found = found if share is None else share.whole(found)
        modules_in_train_mode = found.modules_in_train_mode + _modules_in_train_mode(model)
        modes = ModuleModes.of(model, training=True) if modules_in_train_mode else None
    return Score(
        (found.losses.sum() / found.nmse.numel()).item(),
        found.nmse.mean().item(),
        found.nmse.median().item(),
        modules_in_train_mode == 0,
        _hexadecimal(found.prediction_hash),
        found.weights.clone(),
        _hexadecimal(found.scenes_hash),
        {} if modes is None else modes.to_json(),
        scene_summary(found.nmse.cpu(), divisions or {}),
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
