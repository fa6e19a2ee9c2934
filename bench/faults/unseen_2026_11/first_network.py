"""The first set: mistakes in the network, its gradients and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.catalogue import FIRST, Family
from bench.faults.patches import (
    Backward,
    after_step,
    answer_through,
    before_step,
    layers,
    model_with,
    on_answer,
    on_output,
    wrap,
)
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import conj, matmul
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

PARAMETERS = Family("parameters", FIRST)
GRAPH = Family("graph", FIRST)
LOSS = Family("loss", FIRST)
MODEL = Family("model", FIRST)
COMPILED = Family("compiled", FIRST)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)


class Gated(nn.Module):
    """A learned prior, and what a network adds to it through a gate that starts closed, as in ReZero."""

    def __init__(self, elements: int, columns: int, wrong: bool) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.randn(elements, columns, 2))
        self.gate = torch.zeros(1, requires_grad=True) if wrong else nn.Parameter(torch.zeros(1))

    def forward(self, factor: Tensor) -> Tensor:
        return self.prior + self.gate * factor


@PARAMETERS.around_pair(
    "adds the network to a learned prior through a gate that is a tensor and no Parameter, so that it stays shut",
    "unregistered_parameters ignored_input vanishing_gradient",
    "preflight",
    twin="backprojection",
)
def gate_is_a_plain_tensor(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        answer_through(model, Gated(model.task.elements, model.columns, wrong))

    with model_with(change):
        yield


@PARAMETERS.pair(
    "projects the rows of every layer onto a ball after each step, with the radius meant for one number",
    "weights_changed_outside weights_reset",
    "share:0.01",
)
def rows_in_a_small_ball(trainer: Trainer, wrong: bool) -> None:
    radius = 0.03 if wrong else 10.0

    @torch.no_grad()
    def project() -> None:
        for layer in layers(trainer.model):
            layer.weight.copy_(layer.weight.renorm(2, 0, radius))

    after_step(trainer, project)


@GRAPH.pair(
    "left a gradient reversal of a domain-adaptation experiment between backbone and heads",
    "wrong_backward gradient_scale_differs loss_sign",
    "preflight",
)
def gradient_reversed_on_the_way(trainer: Trainer, wrong: bool) -> None:
    rule = torch.neg if wrong else torch.clone
    trainer.model.fuse.register_forward_pre_hook(lambda module, inputs: (Backward.apply(inputs[0], rule),))


@GRAPH.patch(
    "sends gradients as one vector in the order of their names and takes it apart in the order of the layers",
    "wrong_backward gradient_scale_differs",
    "steps:5",
)
def gradients_taken_apart_in_another_order(trainer: Trainer) -> None:
    @torch.no_grad()
    def shuffled() -> None:
        named = [(name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for _, grad in sorted(named, key=lambda pair: pair[0])])
        for (_, grad), part in zip(named, flat.split([grad.numel() for _, grad in named])):
            grad.copy_(part.view_as(grad))

    before_step(trainer, shuffled)


def covariance(factor: Tensor) -> Tensor:
    """R = F F^H with trace N, written out: (B, N, N, 2)."""
    whole = matmul(factor, conj(factor).transpose(1, 2))
    trace = whole[..., 0].diagonal(dim1=1, dim2=2).sum(-1)
    return whole * (factor.shape[1] / trace.clamp_min(1e-12))[:, None, None, None]


@LOSS.patch(
    "keeps a dimension of size one in the prediction, so that each answer is compared with every scene of the batch",
    "shapes_broadcast scenes_mixed shuffled_labels",
    "preflight",
)
def every_answer_against_every_scene(trainer: Trainer) -> None:
    def nmse(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        found, true = covariance(factor), covariance(scenes.factor)
        return (found[:, None] - true).square().sum((-1, -2, -3)) / true.square().sum((-1, -2, -3))

    trainer.loss.nmse = nmse


@LOSS.patch(
    "left a consolidation term of continual learning in, which holds a new network at its random start",
    "dominating_term learning_rate_too_small",
    "share:0.01",
)
def consolidated_at_the_start(trainer: Trainer) -> None:
    first = [parameter.detach().clone() for parameter in trainer.model.parameters()]

    def make(forward: Callable) -> Callable:
        def held(prediction: Prediction, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
            total, terms = forward(prediction, scenes)
            gaps = [(now - then).square().sum() for now, then in zip(trainer.model.parameters(), first)]
            return total + 1e4 * torch.stack(gaps).sum(), terms

        return held

    wrap(trainer.loss, "forward", make)


@MODEL.patch(
    "normalises the fused features over an axis of length one, which leaves zeros",
    "ignored_input dead_units vanishing_gradient",
    "preflight",
)
def normalised_over_one_number(trainer: Trainer) -> None:
    on_output(trainer.model.fuse, lambda x: fn.layer_norm(x[..., None], (1,))[..., 0])


@MODEL.patch(
    "ends the network with the activation that all its layers have",
    "limited_output dead_units saturated_output",
    "preflight",
    twin="backprojection",
)
def answer_behind_a_relu(trainer: Trainer) -> None:
    on_answer(trainer, torch.relu)


@COMPILED.patch(
    "launches a kernel on blocks of 24 scenes and rounds their number down: the last scenes are never written",
    "compiled_differs kernel_differs scenes_left_out",
    "preflight",
)
def last_block_never_launched(trainer: Trainer) -> None:
    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def launched(*inputs: Tensor) -> Prediction:
            prediction = network(*inputs)
            scenes = len(prediction.factor)
            written = torch.arange(scenes) < (scenes // 24 * 24 or scenes)
            return prediction._replace(factor=prediction.factor * written[:, None, None, None])

        return launched

    wrap(trainer.step, "network", make)


@COMPILED.patch(
    "every rank updates its shard of each weight, and one of two shards is never gathered",
    "step_without_effect weights_reset ranks_diverged weights_changed_outside",
    "share:0.01",
)
def shards_not_gathered(trainer: Trainer) -> None:
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    @torch.no_grad()
    def lost() -> None:
        for name, parameter in trainer.model.named_parameters():
            half = parameter.numel() // 2
            parameter.view(-1)[half:].copy_(first[name].view(-1)[half:])

    after_step(trainer, lost)
