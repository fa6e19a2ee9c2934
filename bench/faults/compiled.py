"""Faults of the family "compiled": graphs and replicas that compute with other weights, numbers or scenes.

Ranks are played by the micro-batches of one step: each is what one rank would have seen.
"""

from __future__ import annotations

from copy import deepcopy

import torch

from bench.faults.catalogue import Family
from bench.faults.patches import wrap
from ris_fast.models.prediction import Prediction
from ris_fast.training.compiled_model import Network
from ris_fast.training.trainer import Trainer

FAMILY = Family("compiled")


@FAMILY.patch("compiled with the backbone's weights folded in as constants", "stale_compiled_graph", "preflight")
def weights_folded_into_graph(trainer: Trainer) -> None:
    shared = {id(parameter): parameter for parameter in trainer.model.head_parameters()}
    graph = deepcopy(trainer.model, shared)
    for parameter in graph.parameters():
        parameter.requires_grad_(id(parameter) in shared)
    trainer.step.network = Network(graph, compile=False)


@FAMILY.patch(
    "validates through a graph that was captured before training",
    "stale_compiled_graph cached_validation",
    "share:0.01",
)
def validation_graph_from_before(trainer: Trainer) -> None:
    captured = deepcopy(trainer.model).eval()

    def make(network):
        return lambda *inputs: network(*inputs) if torch.is_grad_enabled() else captured(*inputs)

    wrap(trainer.step, "network", make)


@FAMILY.patch("a fused kernel of the compiled graph drops one column of the factor", "compiled_differs", "preflight")
def compiled_graph_drops_a_column(trainer: Trainer) -> None:
    def make(network):
        def graph(*inputs) -> Prediction:
            prediction = network(*inputs)
            keep = torch.ones(prediction.factor.shape[2], 1)
            keep[-1] = 0.0
            return prediction._replace(factor=prediction.factor * keep)

        return graph

    wrap(trainer.step, "network", make)


@FAMILY.patch(
    "every rank reads the first rank's scenes", "rank_sees_other_data repeated_batch", "steps:5", twin="accumulate"
)
def ranks_read_the_same_scenes(trainer: Trainer) -> None:
    wrap(trainer, "_groups", lambda groups: lambda: ([group[0]] * len(group) for group in groups()))


@FAMILY.patch(
    "ranks other than the first start from other weights and never receive the first one's",
    "ranks_diverged stale_compiled_graph",
    "steps:5",
    twin="accumulate",
)
def ranks_hold_other_weights(trainer: Trainer) -> None:
    replica, calls = deepcopy(trainer.model), iter(range(10**9))
    for parameter in replica.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))

    def make(network):
        return lambda *inputs: (network if not torch.is_grad_enabled() or next(calls) % 4 == 0 else replica)(*inputs)

    wrap(trainer.step, "network", make)
