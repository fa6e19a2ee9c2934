"""Held-out faults of the family "model": initialisation, inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.faults.catalogue import Family
from bench.faults.patches import layers, model_with, on_answer, on_features
from ris_fast.physics.real_complex import power
from ris_fast.training.trainer import Trainer

FAMILY = Family("model")


@FAMILY.around("initialised every weight with the same constant", "symmetric_init", "preflight")
def constant_initialisation() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        for layer in layers(model):
            nn.init.constant_(layer.weight, 0.05)
            nn.init.zeros_(layer.bias)

    with model_with(change):
        yield


@FAMILY.patch("feeds the magnitude of the snapshots", "inputs_withhold_answer", "preflight", twin="few_codes")
def phase_thrown_away(trainer: Trainer) -> None:
    def magnitude(y: Tensor) -> Tensor:
        size = power(y).sqrt()
        return torch.stack((size, torch.zeros_like(size)), dim=-1)

    on_features(trainer, lambda features: lambda y, *rest: features(magnitude(y), *rest))


@FAMILY.patch("expands one column over the whole factor", "output_rank_too_low", "preflight", twin="backprojection")
def one_column_repeated(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: factor[:, :, :1].expand_as(factor))


@FAMILY.patch("clamps the factor to a range a thousand times too small", "saturated_output", "preflight")
def factor_clamped(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: factor.clamp(-1e-4, 1e-4))
