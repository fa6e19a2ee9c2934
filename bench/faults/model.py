"""Faults of the family "model": outputs that saturate or die, inputs that are ignored or withhold the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from bench.faults.catalogue import Family
from bench.faults.patches import layers, model_with, on_answer, on_factor, on_features, wrap
from ris_fast.models.hybrid import HybridFeatures
from ris_fast.training.trainer import Trainer

FAMILY = Family("model")

FAMILY.setting(
    "channel_only_as_products",
    "shows the network H c_l instead of H, as the original did",
    "inputs_withhold_answer",
    "preflight",
    {"model.options.inputs": "effective_channel"},
    twin="few_codes",
)


@FAMILY.patch("bounds the factor with a tanh at a hundred times its scale", "saturated_output", "preflight")
def tanh_at_full_deflection(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: torch.tanh(1e3 * factor))


@FAMILY.patch("initialised a bias at -50, in front of an activation that is zero there", "dead_units", "preflight")
def activation_dead_from_the_start(trainer: Trainer) -> None:
    trainer.model.fuse.bias.data.fill_(-50.0)


@FAMILY.patch("a mask of the wrong dtype multiplies every normalised input by zero", "ignored_input", "preflight")
def inputs_masked_out(trainer: Trainer) -> None:
    on_features(trainer, lambda features: lambda *inputs: HybridFeatures(*(0.0 * x for x in features(*inputs))))


def zero_pair(inputs: int, outputs: int) -> nn.Sequential:
    pair = nn.Sequential(nn.Linear(inputs, 8, bias=False), nn.Linear(8, outputs, bias=False))
    for layer in pair:
        nn.init.zeros_(layer.weight)
    return pair


@FAMILY.around(
    "made the factor heads low-rank products and initialised both factors at zero", "zero_product_init", "preflight"
)
def both_factors_zero() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        for name in ("angle_factor", "range_factor"):
            old = getattr(model, name)
            setattr(model, name, zero_pair(old.in_features, old.out_features))

    with model_with(change):
        yield


@FAMILY.around("passed the fan-in where the standard deviation belongs", "bad_initialisation", "preflight")
def initial_weights_explode() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        for layer in layers(model):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel())

    with model_with(change):
        yield


@FAMILY.around(
    "answers with a learned prior; the correction that reads the scene is multiplied by zero",
    "ignored_input",
    "preflight",
    twin="backprojection",
)
def prior_without_correction() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        model.prior = nn.Parameter(torch.randn(model.task.elements, model.columns, 2))
        on_factor(model, lambda factor: model.prior + 0.0 * factor)

    with model_with(change):
        yield


@FAMILY.around(
    "reads the example that the network was exported with; only the moduli of its beams are those of the scene",
    "stalled_above_inputs",
    "steps:240",
    twin="wide",
)
def paths_read_an_example() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        example: list[HybridFeatures] = []

        def first(fused: Callable) -> Callable:
            def of_the_example(features: HybridFeatures) -> torch.Tensor:
                example[:] = example or [HybridFeatures(*(each[:1].clone() for each in features))]
                return fused(example[0]).expand(len(features.re), -1)

            return of_the_example

        def moduli(factor: Callable) -> Callable:
            def without_phases(x: torch.Tensor, features: HybridFeatures) -> torch.Tensor:
                size = (features.re.square() + features.im.square()).sqrt()
                return factor(x, features._replace(re=size, im=torch.zeros_like(size)))

            return without_phases

        wrap(model, "_fused", first)
        wrap(model, "_factor", moduli)

    with model_with(change):
        yield
