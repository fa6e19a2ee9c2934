"""Held-out faults of the family "compiled": graphs and replicas with other weights, modes or gradients."""

from __future__ import annotations

from copy import deepcopy

from bench.faults.catalogue import Family
from bench.faults.patches import put, rebound, wrap
from ris_fast.training.compiled_model import Network
from ris_fast.training.step import build_optimizer
from ris_fast.training.trainer import Trainer

FAMILY = Family("compiled")


@FAMILY.patch(
    "compiled the network, then built it anew and gave only the new one to the optimizer",
    "stale_compiled_graph",
    "preflight",
)
def compiled_before_weights_replaced(trainer: Trainer) -> None:
    network = trainer.step.network
    put(trainer, "model", deepcopy(trainer.model))
    put(trainer, "optimizer", build_optimizer(trainer.model, trainer.config))
    rebound(trainer)
    trainer.step.network = network


@FAMILY.patch(
    "forgot to add up the gradients of the ranks: only the first one's is applied",
    "rank_gradient_missing last_micro_batch_only",
    "steps:5",
    twin="accumulate",
)
def ranks_not_reduced(trainer: Trainer) -> None:
    calls = iter(range(10**9))

    def make(scale):
        return lambda loss: scale(loss) if next(calls) % 4 == 0 else 0.0 * scale(loss)

    wrap(trainer.optimizer, "scale", make)


@FAMILY.patch(
    "traced the network in eval mode, so that the graph has no dropout",
    "stale_compiled_graph eval_mode_in_training compiled_differs",
    "steps:5",
    twin="dropout",
)
def compiled_in_eval_mode(trainer: Trainer) -> None:
    shared = {id(parameter): parameter for parameter in trainer.model.parameters()}
    trainer.step.network = Network(deepcopy(trainer.model, shared).eval(), compile=False)
