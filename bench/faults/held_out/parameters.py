"""Held-out faults of the family "parameters": layers that are frozen, forgotten, tied, copied or kept as buffers."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from torch import nn

from bench.faults.catalogue import Family
from bench.faults.patches import model_with, put, rebound, replaced
from ris_fast.training import step
from ris_fast.training.trainer import Trainer

FAMILY = Family("parameters")


@FAMILY.patch("left one layer frozen after an experiment", "frozen_parameters", "preflight")
def one_layer_frozen(trainer: Trainer) -> None:
    trainer.model.token_widen.requires_grad_(False)


@FAMILY.around(
    "sorts parameters into groups by substrings of their names; one layer matches none",
    "missing_from_optimizer",
    "preflight",
)
def group_filter_misses_a_layer() -> Iterator[None]:
    groups = step.parameter_groups

    def filtered(*args):
        found = groups(*args)
        for group in found:
            group["params"] = [(name, value) for name, value in group["params"] if not name.startswith("fine_path")]
        return found

    with replaced(step, "parameter_groups", filtered):
        yield


@FAMILY.around("assigned one factor head to both names", "tied_parameters", "preflight")
def factor_heads_tied() -> Iterator[None]:
    with model_with(lambda model: setattr(model, "range_factor", model.angle_factor)):
        yield


@FAMILY.patch(
    "copied the network after the optimizer was built and trains the copy",
    "stale_optimizer_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def network_copied(trainer: Trainer) -> None:
    put(trainer, "model", deepcopy(trainer.model))
    rebound(trainer)


@FAMILY.around(
    "made a layer's weight a buffer, so that it follows the network and is never trained",
    "frozen_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def weight_kept_as_buffer() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        layer = model.blocks[0].inner
        weight = layer._parameters.pop("weight")
        layer.register_buffer("weight", weight.detach().clone())

    with model_with(change):
        yield
