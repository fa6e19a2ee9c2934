"""Held-out faults of the family "mode": dropout and normalisation in the wrong mode."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import functional as fn

from bench.faults.catalogue import Family
from bench.faults.patches import model_with, on_input, wrap
from ris_fast.training.trainer import Trainer

FAMILY = Family("mode")


@FAMILY.patch(
    "calls functional dropout without its training flag", "train_mode_in_validation", "preflight", twin="dropout"
)
def dropout_always_on(trainer: Trainer) -> None:
    for block in trainer.model.blocks:
        block._drop = lambda x: fn.dropout(x, 0.1)


@FAMILY.patch(
    "puts the encoder into eval mode after every train(), as in a recipe for a pretrained one",
    "eval_mode_in_training",
    "steps:5",
    twin="dropout",
)
def encoder_left_in_eval(trainer: Trainer) -> None:
    wrap(trainer.model, "train", lambda train: lambda mode=True: (train(mode), trainer.model.blocks.eval())[0])
    trainer.model.train()


@FAMILY.around(
    "added a batch norm with a momentum so small that validation uses its initial statistics",
    "batchnorm_statistics scenes_mixed",
    "share:0.01",
)
def running_statistics_never_updated() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        norm = nn.BatchNorm1d(model.fuse.in_features, momentum=1e-9, affine=False)
        model.add_module("norm", norm)
        on_input(model.fuse, lambda x: (norm(10.0 * x + 5.0),))

    with model_with(change):
        yield
