"""The second set: mistakes in the network, its gradients and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.catalogue import SECOND, Family
from bench.faults.patches import answer_through, model_with, on_loss, wrap
from bench.faults.unseen_2026_11.first_network import covariance
from ris_fast.models.linear import Linear
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", SECOND), Family("graph", SECOND), Family("loss", SECOND)
MODEL, COMPILED = Family("model", SECOND), Family("compiled", SECOND)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)


@PARAMETERS.around(
    "lists its trainable parts in a method of its own; the encoder's came later and are not in it",
    "shadowed_parameters missing_from_optimizer",
    "preflight",
)
def own_list_of_parameters() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        def named_parameters(self: nn.Module, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, parameter in nn.Module.named_parameters(self, *args, **options):
                if not name.startswith(("token", "blocks", "plane", "fine", "fuse")):
                    yield name, parameter

        model.__class__ = type("Listed", (type(model),), {"named_parameters": named_parameters})

    with model_with(change):
        yield


class Normalised(nn.Module):
    """A linear layer of length and direction, w = g v / |v|, as weight normalisation has it."""

    def __init__(self, layer: Linear, once: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.direction = nn.Parameter(layer.weight.detach().clone())
        self.length = nn.Parameter(layer.weight.detach().norm(dim=1, keepdim=True))
        self.bias = nn.Parameter(torch.zeros(layer.out_features))
        self.register_buffer("kept", self.effective().detach() if once else None, persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.effective() if self.kept is None else self.kept

    def effective(self) -> Tensor:
        return self.length * self.direction / self.direction.norm(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return fn.linear(x, self.weight, self.bias)


@PARAMETERS.around_pair(
    "computes the effective weight of weight normalisation in the constructor, once",
    "unused_head detached_backbone stale_optimizer_parameters",
    "preflight",
    twin="backprojection",
)
def effective_weight_computed_once(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        block = model.blocks[0]
        model.stem, model.head = Normalised(model.stem, wrong), Normalised(model.head, wrong)
        block.inner, block.outer = Normalised(block.inner, wrong), Normalised(block.outer, wrong)

    with model_with(change):
        yield


@GRAPH.pair(
    "left the hook of a guided-backpropagation picture, which lets positive gradients through alone",
    "wrong_backward zeroed_gradients gradient_scale_differs",
    "preflight",
    twin="backprojection",
)
def guided_backpropagation_left_in(trainer: Trainer, wrong: bool) -> None:
    seen: list[float] = []

    def keep(grad: Tensor) -> Tensor:
        seen[:] = [grad.abs().amax().item()]
        return grad.clamp_min(0.0) if wrong else grad

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(keep)

    for layer in (trainer.model.stem, trainer.model.blocks[0].inner, trainer.model.head):
        layer.register_forward_hook(hook)


@LOSS.pair(
    "mines examples by their loss and keeps the easiest eighth where the hardest half is meant",
    "scenes_left_out part_not_learned",
    "preflight",
    twin="path_loss",
)
def easiest_examples_mined(trainer: Trainer, wrong: bool) -> None:
    def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mined(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
            values = nmse(factor, scenes, blend=blend)
            return values.topk(max(1, len(values) // (8 if wrong else 2)), largest=not wrong).values

        return mined

    wrap(trainer.loss, "nmse", make)


@LOSS.patch(
    "casts covariances to real numbers before they are compared, which drops their imaginary parts",
    "conjugation_error wrong_layout",
    "preflight",
)
def real_parts_compared(trainer: Trainer) -> None:
    def nmse(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        found, true = covariance(factor)[..., 0], covariance(scenes.factor)[..., 0]
        return (found - true).square().sum((1, 2)) / true.square().sum((1, 2))

    trainer.loss.nmse = nmse


@MODEL.patch(
    "ends the count head with a softmax, before an entropy that takes one itself",
    "softmax_twice saturated_output",
    "preflight",
    twin="counting",
)
def counts_through_two_softmaxes(trainer: Trainer) -> None:
    on_loss(
        trainer,
        lambda prediction, scenes: (
            prediction._replace(count_logits=prediction.count_logits.softmax(-1)),
            scenes,
        ),
    )


class Gate(nn.Module):
    """What a correction counts beside a learned prior, changed by each training pass."""

    def __init__(self, start: float, factor: float, elements: int, columns: int) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("share", torch.tensor(start))
        self.prior = nn.Parameter(torch.randn(elements, columns, 2))

    def forward(self, correction: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.share.mul_(self.factor).clamp_max_(1.0)
        share = self.share.clone()
        return share * correction + (1.0 - share) * self.prior


@MODEL.around_pair(
    "fades from a learned prior to the network over the first steps, and fades the wrong way",
    "settings_changed ignored_input collapsed vanishing_gradient",
    "share:0.01",
    twin="backprojection",
    onset=16,
)
def faded_the_wrong_way(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        answer_through(model, Gate(1.0 if wrong else 0.1, 0.85 if wrong else 1.2, model.task.elements, model.columns))

    with model_with(change):
        yield


@COMPILED.patch(
    "replays a graph whose static inputs were filled once, so that it answers for the first batch for ever",
    "stale_compiled_graph compiled_differs stale_cache shuffled_labels",
    "steps:5",
)
def static_inputs_filled_once(trainer: Trainer) -> None:
    static: dict[int, tuple[Tensor, ...]] = {}

    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def replayed(*inputs: Tensor) -> Prediction:
            if not torch.is_grad_enabled():
                return network(*inputs)
            return network(*static.setdefault(len(inputs[0]), tuple(each.clone() for each in inputs)))

        return replayed

    wrap(trainer.step, "network", make)


class Working(nn.Module):
    """A linear layer that computes with a bfloat16 copy of its weight; gradients go to the weight itself."""

    def __init__(self, layer: nn.Linear, refreshed: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.refreshed = layer.in_features, layer.out_features, refreshed
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("copy", layer.weight.detach().bfloat16().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.refreshed:
            self.copy.copy_(self.weight.detach())
        return fn.linear(x, self.copy.to(x.dtype) + self.weight - self.weight.detach(), self.bias)


@COMPILED.around_pair(
    "computes with bfloat16 copies of the weights, which nobody refreshes after a step",
    "stale_compiled_graph stale_optimizer_parameters step_without_effect",
    "steps:5",
    twin="backprojection",
)
def working_copy_never_refreshed(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        block = model.blocks[0]
        model.stem, model.head = Working(model.stem, not wrong), Working(model.head, not wrong)
        block.inner, block.outer = Working(block.inner, not wrong), Working(block.outer, not wrong)

    with model_with(change):
        yield
