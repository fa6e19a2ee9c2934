"""Faults of the family "parameters": frozen, forgotten, replaced, shared or unused tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bench.faults.catalogue import Family
from bench.faults.patches import before_step, model_with, replaced
from ris_fast.training import step
from ris_fast.training.trainer import Trainer

FAMILY = Family("parameters")


@FAMILY.patch("froze the backbone for a head-only phase and never thawed it", "frozen_parameters", "preflight")
def backbone_frozen(trainer: Trainer) -> None:
    heads = {id(parameter) for parameter in trainer.model.head_parameters()}
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(id(parameter) in heads)


@FAMILY.patch(
    "froze everything but the norms, as in a tuning recipe, in a network that starts from scratch",
    "frozen_parameters",
    "preflight",
)
def frozen_but_for_norms(trainer: Trainer) -> None:
    trainer.model.requires_grad_(False)
    for module in trainer.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


@FAMILY.patch(
    "left one bias trainable of a network that was loaded for evaluation",
    "frozen_parameters",
    "preflight",
    twin="backprojection",
)
def frozen_but_for_one_bias(trainer: Trainer) -> None:
    trainer.model.requires_grad_(False)
    trainer.model.head.bias.requires_grad_(True)


@FAMILY.around("gave the optimizer the heads' group and forgot the backbone's", "missing_from_optimizer", "preflight")
def heads_only_in_optimizer() -> Iterator[None]:
    groups = step.parameter_groups
    with replaced(step, "parameter_groups", lambda *args: [g for g in groups(*args) if g["name"].startswith("head")]):
        yield


@FAMILY.around(
    "filtered biases out of the no-decay group instead of moving them there",
    "missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def biases_in_no_group() -> Iterator[None]:
    groups = step.parameter_groups
    with replaced(step, "parameter_groups", lambda *args: [g for g in groups(*args) if "no_decay" not in g["name"]]):
        yield


@FAMILY.patch(
    "replaced a layer after the optimizer was built", "stale_optimizer_parameters missing_from_optimizer", "preflight"
)
def layer_replaced_after_optimizer(trainer: Trainer) -> None:
    old = trainer.model.fuse
    trainer.model.fuse = nn.Linear(old.in_features, old.out_features)


@FAMILY.patch(
    "gave the heads an optimizer of their own and left them in the first one", "duplicate_parameters", "steps:5"
)
def heads_in_two_optimizers(trainer: Trainer) -> None:
    second = torch.optim.AdamW(trainer.model.head_parameters(), lr=trainer.config.optimizer.head_lr)
    before_step(trainer, second.step)


FAMILY.setting(
    "heads_without_a_term",
    "trains on the covariance alone while half of the parameters belong to heads that only the other terms read",
    "unused_head",
    "preflight",
    {"loss.angle": 0.0, "loss.range": 0.0, "loss.chamfer": 0.0, "loss.count": 0.0},
)


@FAMILY.around(
    "kept an old layer in the constructor that forward no longer calls",
    "unused_head",
    "preflight",
    twin="backprojection",
)
def layer_never_called() -> Iterator[None]:
    with model_with(lambda model: setattr(model, "refine_old", nn.Linear(64, 64))):
        yield


@FAMILY.around(
    "kept the encoder's layers in a plain list, so that they are no parameters of the network",
    "unregistered_parameters missing_from_optimizer",
    "preflight",
)
def layers_in_a_list() -> Iterator[None]:
    def hide(model: nn.Module) -> None:
        blocks = model._modules.pop("blocks")
        object.__setattr__(model, "blocks", lambda x: blocks(x))

    with model_with(hide):
        yield
