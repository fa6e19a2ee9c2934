"""Faults of the family "precision": scales, formats, NaN and what hides it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import after_step, before_step, gradients, on_output, optimizer_with, wrap
from ris_fast.training.trainer import Trainer

FAMILY = Family("precision")

FAMILY.setting(
    "adam_epsilon_of_one",
    "copied an epsilon from another optimizer",
    "epsilon_swallows_signal",
    "share:0.01",
    {"optimizer.eps": 1.0},
)


@FAMILY.patch(
    "set a fixed loss scale that overflows every gradient",
    "scaler_skips_all",
    "steps:5",
    twin="half",
    around=lambda: optimizer_with(loss_scale=1e38),
)
def scale_overflows_always(trainer: Trainer) -> None:
    """The mistake is the option alone."""


def degenerate_alignment(factor: Tensor) -> Tensor:
    """A term through singular vectors of a matrix with equal singular values, whose derivative is 1/0."""
    gram = factor[..., 0] @ factor[..., 0].transpose(1, 2)
    left = torch.linalg.svd(torch.nn.functional.pad(gram, (0, 3, 0, 3)))[0]
    return left.diagonal(dim1=1, dim2=2).sum(-1).mean()


def add_term(trainer: Trainer, term) -> None:
    """Adds `term(factor)` to the total, outside the named terms."""
    wrap(
        trainer.loss,
        "forward",
        lambda forward: (
            lambda prediction, scenes: (lambda total, raw: (total + term(prediction.factor), raw))(
                *forward(prediction, scenes)
            )
        ),
    )


@FAMILY.patch(
    "a small term outside the table of weights has a NaN gradient in every step, and a sanitiser makes it zero",
    "sanitised_gradients",
    "steps:5",
)
def nan_term_under_sanitiser(trainer: Trainer) -> None:
    add_term(trainer, lambda factor: 0.002 * degenerate_alignment(factor))
    before_step(trainer, lambda: [grad.nan_to_num_(0.0, 0.0, 0.0) for grad in gradients(trainer)])


@FAMILY.patch("regularises with a norm of something that is exactly zero", "nonfinite_gradients", "preflight")
def norm_at_zero(trainer: Trainer) -> None:
    add_term(trainer, lambda factor: 1e-3 * (0.0 * factor).square().sum().sqrt())


@FAMILY.patch(
    "keeps unscaled features in half precision, where they become infinite", "fp16_overflow", "preflight", twin="half"
)
def features_overflow_half(trainer: Trainer) -> None:
    on_output(trainer.model.fuse, lambda x: (1e6 * x.float()).half().float() / 1e6)


@FAMILY.patch(
    "keeps the weights in bfloat16 and adds updates below their spacing",
    "low_precision_weights",
    "share:0.01",
    twin="gentle",
)
def weights_rounded_to_bf16(trainer: Trainer) -> None:
    @torch.no_grad()
    def rounded() -> None:
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.bfloat16())

    after_step(trainer, rounded)
