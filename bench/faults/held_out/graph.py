"""Held-out faults of the family "graph": gradients that are cut off, rebuilt, zeroed or rounded away."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import on_answer, wrap
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

FAMILY = Family("graph")


@FAMILY.patch("runs the encoder under no_grad, as in a recipe for a pretrained one", "detached_backbone", "preflight")
def no_grad_around_encoder(trainer: Trainer) -> None:
    def make(forward):
        def quiet(x: Tensor) -> Tensor:
            with torch.no_grad():
                return forward(x)

        return quiet

    wrap(trainer.model.blocks, "forward", make)


@FAMILY.patch(
    "computes the covariance term in numpy and adds a zero that carries a graph",
    "loss_rebuilt detached_loss",
    "preflight",
)
def covariance_term_in_numpy(trainer: Trainer) -> None:
    def make(nmse):
        def detour(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
            value = torch.from_numpy(nmse(factor.detach(), scenes, blend=blend).numpy().copy())
            return value + 0.0 * factor.sum((1, 2, 3))

        return detour

    wrap(trainer.loss, "nmse", make)


@FAMILY.patch(
    "left a debugging hook on a weight that multiplies its gradient by zero",
    "zeroed_gradients",
    "preflight",
    twin="backprojection",
)
def hook_zeroes_gradient(trainer: Trainer) -> None:
    trainer.model.stem.weight.register_hook(lambda grad: 0.0 * grad)


@FAMILY.patch("quantises the factor with round(), whose derivative is zero", "non_differentiable", "preflight")
def factor_rounded(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: torch.round(64.0 * factor) / 64.0)
