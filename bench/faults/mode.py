"""Faults of the family "mode": training and evaluation mode mixed up, and too much dropout."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as fn

from bench.faults.catalogue import Family
from bench.faults.patches import on_output, wrap
from ris_fast.training.trainer import Trainer

FAMILY = Family("mode")

FAMILY.setting(
    "dropout_of_nine_tenths",
    "gave the keep probability where the drop probability is meant",
    "heavy_dropout",
    "preflight",
    {"model.options.dropout": 0.9},
    twin="dropout",
)


@FAMILY.patch(
    "called eval() for a sanity check and train() never again", "eval_mode_in_training", "steps:5", twin="dropout"
)
def left_in_eval(trainer: Trainer) -> None:
    trainer.model.eval()
    trainer.model.train = lambda mode=True: trainer.model


@FAMILY.patch(
    "calls train() once before the epochs; the first validation leaves the network in eval mode",
    "eval_mode_in_training",
    "steps:5",
    twin="dropout",
    onset=8,
)
def eval_after_first_validation(trainer: Trainer) -> None:
    def stay(close):
        def closed(*args):
            close(*args)
            nn.Module.eval(trainer.model)
            trainer.model.train = lambda mode=True: trainer.model

        return closed

    wrap(trainer, "_close_epoch", stay)


@FAMILY.patch("validates without eval()", "train_mode_in_validation", "share:0.01", twin="dropout")
def validated_in_train_mode(trainer: Trainer) -> None:
    trainer.model.eval = lambda: trainer.model


@FAMILY.patch(
    "put a dropout of 0.95 behind the fusion, through which everything passes",
    "heavy_dropout",
    "preflight",
    twin="dropout",
)
def dropout_in_the_bottleneck(trainer: Trainer) -> None:
    on_output(trainer.model.fuse, lambda x: fn.dropout(x, 0.95, trainer.model.training))
