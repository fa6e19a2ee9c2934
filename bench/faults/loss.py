"""Faults of the family "loss": weights, accumulation, targets and units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import on_label_angles, on_loss, replaced, wrap
from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.physics.scenes import Scenes
from ris_fast.training import loss_terms as terms
from ris_fast.training.trainer import Trainer

FAMILY = Family("loss")

FAMILY.setting(
    "main_weight_zero",
    "set the covariance weight to zero in a sweep; the small unblended term remains",
    "zero_loss_weight",
    "preflight",
    {"loss.cov": 0.0},
)

FAMILY.setting(
    "auxiliary_term_dominates",
    "gave the range term a weight that drowns the covariance",
    "dominating_term",
    "preflight",
    {"loss.range": 1e4},
)


@FAMILY.patch(
    "a curriculum's table lacks the covariance terms, so their weights become zero", "zero_loss_weight", "preflight"
)
def curriculum_without_covariance(trainer: Trainer) -> None:
    trainer.loss.weights.update(cov=0.0, cov_pred=0.0)


@FAMILY.patch(
    "sums micro-batches without dividing by their number", "accumulation_not_divided", "steps:5", twin="accumulate"
)
def accumulation_undivided(trainer: Trainer) -> None:
    def accumulate(scenes: Scenes, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, raw = trainer.loss(trainer.step.predict(scenes), scenes)
        trainer.optimizer.scale(loss).backward()
        return loss.detach() * share, {name: value.detach() * share for name, value in raw.items()}

    trainer.step._accumulate = accumulate


@FAMILY.patch(
    "clears the gradients before every micro-batch instead of every step",
    "last_micro_batch_only",
    "steps:5",
    twin="accumulate",
)
def cleared_per_micro_batch(trainer: Trainer) -> None:
    def make(accumulate):
        return lambda scenes, share: (trainer.optimizer.zero_grad(), accumulate(scenes, share))[1]

    wrap(trainer.step, "_accumulate", make)


@FAMILY.patch("loads the diagonal of the prediction and not of the target", "target_scale_differs", "preflight")
def loading_on_one_side(trainer: Trainer) -> None:
    def nmse(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        return cov_nmse(factor, target_factor=scenes.factor, loading=1.0, loading_side="prediction", reduction="none")

    trainer.loss.nmse = nmse


@FAMILY.patch("reads angles in degrees from the labels and compares them with radians", "wrong_units", "preflight")
def labels_in_degrees(trainer: Trainer) -> None:
    on_label_angles(trainer, torch.rad2deg)


@FAMILY.patch("minimises a similarity", "loss_sign", "preflight", twin="backprojection")
def similarity_minimised(trainer: Trainer) -> None:
    wrap(trainer.loss, "nmse", lambda nmse: lambda *args, **options: 1.0 - nmse(*args, **options))


@FAMILY.around("a term raises a shape error inside a bare except and is zero ever since", "dead_loss_term", "preflight")
def term_swallowed_by_except() -> Iterator[None]:
    with replaced(terms, "chamfer", lambda gaps, active: torch.zeros(gaps.shape[0])):
        yield


@FAMILY.patch("labels carry millimetres where the network answers in metres", "wrong_units", "preflight")
def ranges_in_millimetres(trainer: Trainer) -> None:
    on_loss(trainer, lambda prediction, scenes: (prediction, replace(scenes, range_m=1e3 * scenes.range_m)))
