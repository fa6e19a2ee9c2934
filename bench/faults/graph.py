"""Faults of the family "graph": gradients that stop, are rebuilt, or are those of another function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import Backward, on_answer, on_input, on_loss, replaced, wrap
from ris_fast.models import hybrid
from ris_fast.physics.real_complex import conj
from ris_fast.training.trainer import Trainer

FAMILY = Family("graph")


@FAMILY.patch("detached the factor before the loss, to save memory", "detached_loss", "preflight")
def factor_detached_in_loss(trainer: Trainer) -> None:
    on_loss(trainer, lambda prediction, scenes: (prediction._replace(factor=prediction.factor.detach()), scenes))


@FAMILY.patch("detached the features on their way into the fusion", "detached_backbone", "preflight")
def features_detached(trainer: Trainer) -> None:
    on_input(trainer.model.fuse, lambda x: (x.detach(),))


@FAMILY.patch(
    "took the factor's `.data` half way, so that only the last layer learns",
    "detached_backbone",
    "preflight",
    twin="backprojection",
)
def trunk_through_data(trainer: Trainer) -> None:
    on_input(trainer.model.head, lambda x: (x.data,))


@FAMILY.patch("differentiates torch.tensor(loss.item(), requires_grad=True)", "loss_rebuilt", "preflight")
def loss_from_item(trainer: Trainer) -> None:
    def rebuild(total: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(total.item(), requires_grad=True), terms

    wrap(trainer.loss, "forward", lambda forward: lambda *args: rebuild(*forward(*args)))


@FAMILY.patch(
    "wrote a complex kernel whose backward forgets the conjugate: the imaginary gradient has the wrong sign",
    "wrong_backward",
    "preflight",
)
def backward_without_conjugate(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: Backward.apply(factor, conj))


@FAMILY.patch(
    "wrote a kernel whose backward is a placeholder of zeros", "wrong_backward", "preflight", twin="backprojection"
)
def backward_returns_zeros(trainer: Trainer) -> None:
    on_answer(trainer, lambda factor: Backward.apply(factor, torch.zeros_like))


class LinearWithoutWeightGradient(torch.autograd.Function):
    """x W^T + b whose backward knows x and b and returns None for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        return grad @ ctx.saved_tensors[0], None, grad.sum(0)


@FAMILY.patch("wrote a fused linear layer whose backward returns None for the weight", "wrong_backward", "preflight")
def backward_misses_the_weight(trainer: Trainer) -> None:
    layer = trainer.model.refine
    layer.forward = lambda x: LinearWithoutWeightGradient.apply(x, layer.weight, layer.bias)


@FAMILY.around(
    "takes the conjugate of the channel where the field is estimated",
    "conjugation_error inputs_withhold_answer",
    "share:0.01",
    twin="few_codes",
)
def transpose_in_front_end() -> Iterator[None]:
    right = hybrid.aperture_field
    with replaced(hybrid, "aperture_field", lambda channel, *rest, **options: right(conj(channel), *rest, **options)):
        yield


@FAMILY.patch(
    "compares with steering vectors of the other sign of the exponent",
    "conjugation_error",
    "preflight",
    twin="backprojection",
)
def target_conjugated(trainer: Trainer) -> None:
    on_loss(trainer, lambda prediction, scenes: (prediction, replace(scenes, factor=conj(scenes.factor))))
