"""The fourth set: mistakes in the network, its gradients and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults.catalogue import FOURTH, Family
from bench.faults.patches import (
    before_step,
    layers,
    model_with,
    on_answer,
    rebound,
    replaced,
    wrap,
)
from ris_fast.models.hybrid_parts import AngleGrid
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training import step
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", FOURTH), Family("graph", FOURTH), Family("loss", FOURTH)
MODEL, COMPILED = Family("model", FOURTH), Family("compiled", FOURTH)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)


@PARAMETERS.around_pair(
    "lowers the rate layer by layer as in fine-tuning, though the network starts from scratch and the factor is large",
    "learning_rate_too_small",
    "share:0.01",
)
def rate_lowered_layer_by_layer(wrong: bool) -> Iterator[None]:
    share, groups_of = 0.5 if wrong else 0.98, step.parameter_groups

    def by_layer(model: nn.Module, config: Any) -> list[dict]:
        depth = {name: number for number, (name, _) in enumerate(reversed(list(model.named_children())))}
        apart = []
        for group in groups_of(model, config):
            for name, parameter in group["params"]:
                layer = name.partition(".")[0]
                rate = group["peak_lr"] * share ** depth.get(layer, 0)
                named = {"name": f"{group['name']}.{name}", "params": [(name, parameter)]}
                apart.append({**group, **named, "peak_lr": rate, "lr": rate})
        return apart

    with replaced(step, "parameter_groups", by_layer):
        yield


@PARAMETERS.around_pair(
    "makes a gain for each feature with torch.empty and never fills it",
    "bad_initialisation input_scale dead_units saturated_output",
    "preflight",
)
def gain_never_filled(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        gain = torch.ones(model.fuse.out_features)
        if wrong:  # what was left in memory: zeros, and some large numbers
            gain.zero_()[::8] = 3e4
        model.fuse.gain = nn.Parameter(gain)
        model.fuse.register_forward_hook(lambda layer, inputs, output: layer.gain * output)

    with model_with(change):
        yield


@GRAPH.pair(
    "reads the direction off the grid with an argmax where the soft one is meant",
    "non_differentiable unused_head vanishing_gradient",
    "preflight",
)
def direction_by_argmax(trainer: Trainer, wrong: bool) -> None:
    def forward(grid: AngleGrid, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        logits = grid.logits(x).view(x.shape[0], grid.sources, -1).float()
        soft = torch.softmax(logits / grid.temperature, -1) @ grid.points_G2
        angles = (grid.points_G2[logits.argmax(-1)] if wrong else soft) + offset.float() * grid.step
        return angles[..., 0], angles[..., 1]

    trainer.model.angle_grid.__class__ = type("AngleGrid", (AngleGrid,), {"forward": forward})


@GRAPH.patch(
    "detaches the columns of one head for a statistic, under the same name, and answers with them",
    "detached_backbone unused_head detached_loss",
    "preflight",
)
def columns_of_one_head_detached(trainer: Trainer) -> None:
    half = trainer.config.task.max_sources
    on_answer(trainer, lambda factor: torch.cat((factor[:, :, :half].detach(), factor[:, :, half:]), 2))


@LOSS.pair(
    "reduces the loss over the batch with max where the mean is meant, so that one scene of a batch is learned",
    "scenes_left_out",
    "preflight",
)
def largest_loss_of_the_batch(trainer: Trainer, wrong: bool) -> None:
    def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def reduced(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
            each = nmse(factor, scenes, blend=blend)
            return each.max().expand_as(each) if wrong else each.mean().expand_as(each)

        return reduced

    wrap(trainer.loss, "nmse", make)


@LOSS.pair(
    "returns a term's sum over scenes and sources where one number a scene is asked for",
    "dominating_term",
    "preflight",
)
def own_term_summed_over_scenes(trainer: Trainer, wrong: bool) -> None:
    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        nearest = (prediction.range_m[:, :, None] - scenes.range_m[:, None]).square().amin(1)
        error = nearest * (scenes.power > 0)
        return error.sum() if wrong else 1e-3 * error.mean(1)

    trainer.loss.own, trainer.loss.own_name = term, "range_error"  # as Trainer(config, loss=term) has it
    trainer.loss.weights["range_error"] = 1.0


@MODEL.pair(
    "ends the range head with a sigmoid, for labels that the original had scaled to one",
    "limited_output saturated_output wrong_units",
    "preflight",
)
def range_through_a_sigmoid(trainer: Trainer, wrong: bool) -> None:
    reach = 1.0 if wrong else 1.2 * trainer.config.task.range_max_m
    wrap(
        trainer.model,
        "trunk",
        lambda trunk: (
            lambda features: (
                lambda prediction: prediction._replace(range_m=reach * torch.sigmoid(prediction.range_m - 5.0) + 1e-3)
            )(trunk(features))
        ),
    )
    rebound(trainer)


@MODEL.around(
    "draws every weight uniformly from zero to one",
    "bad_initialisation saturated_output dead_units symmetric_init",
    "preflight",
)
def weights_from_zero_to_one() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        for layer in layers(model):
            nn.init.uniform_(layer.weight)

    with model_with(change):
        yield


@COMPILED.pair(
    "traces the network for validation while it is in training mode, so that the trace drops features",
    "train_mode_in_validation compiled_differs losses_differ",
    "share:0.01",
    twin="dropout",
)
def traced_in_training_mode(trainer: Trainer, wrong: bool) -> None:
    model = trainer.model
    model.fuse.register_forward_hook(lambda layer, inputs, output: nn.functional.dropout(output, 0.6, layer.training))

    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def called(*inputs: Tensor) -> Prediction:
            if torch.is_grad_enabled():
                return network(*inputs)
            mode = model.training
            model.train(wrong)
            answer = network(*inputs)
            model.train(mode)
            return answer

        return called

    wrap(trainer.step, "network", make)


@COMPILED.patch(
    "clears gradients to None after the step was captured, so that the graph goes on with those of the capture",
    "stale_compiled_graph wrong_backward step_without_effect weights_changed_outside",
    "steps:5",
    onset=1,
)
def gradients_of_the_capture(trainer: Trainer) -> None:
    captured: list[Tensor] = []

    @torch.no_grad()
    def replayed() -> None:
        now = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        captured[:] = captured or [grad.clone() for grad in now]
        for grad, kept in zip(now, captured):
            grad.copy_(kept)

    before_step(trainer, replayed)
