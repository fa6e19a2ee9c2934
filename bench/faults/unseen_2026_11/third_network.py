"""The third set: mistakes in the network, its gradients and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults.catalogue import THIRD, Family
from bench.faults.patches import after_step, model_with, on_input, on_output, rebound, wrap
from ris_fast.models.linear import Linear
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", THIRD), Family("graph", THIRD), Family("loss", THIRD)
MODEL, COMPILED = Family("model", THIRD), Family("compiled", THIRD)
ALL = (PARAMETERS, GRAPH, LOSS, MODEL, COMPILED)


@PARAMETERS.pair(
    "clamps the learned scale of the logits after each step, to the bounds that a temperature has, its reciprocal",
    "weights_changed_outside limited_output",
    "share:0.01",
    twin="counting",
)
def scale_clamped_as_a_temperature(trainer: Trainer, wrong: bool) -> None:
    scale = trainer.model.count_head.scale
    low, high = (0.0, 0.001) if wrong else (0.01, 100.0)
    after_step(trainer, lambda: scale.data.clamp_(low, high))


class Between(nn.Module):
    """One more linear layer, in the constructor or, as in a script, where it is used."""

    def __init__(self, width: int, wrong: bool) -> None:
        super().__init__()
        self.width, self.layer = width, None if wrong else Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer or nn.Linear(self.width, self.width))(x)


@PARAMETERS.around_pair(
    "makes a layer inside forward, so that each call has a new one with random weights",
    "unregistered_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def layer_made_in_each_forward(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        model.norm = nn.Sequential(model.norm, Between(model.head.in_features, wrong))

    with model_with(change):
        yield


@GRAPH.pair(
    "quantises features with a straight-through estimator and forgets its detach: x + (q - x) has derivative zero",
    "non_differentiable vanishing_gradient detached_backbone",
    "preflight",
)
def straight_through_without_detach(trainer: Trainer, wrong: bool) -> None:
    def quantised(x: Tensor) -> Tensor:
        step = (8.0 * x).round() / 8.0 - x
        return x + (step if wrong else step.detach())

    on_output(trainer.model.fuse, quantised)


@GRAPH.pair(
    "keeps the auxiliary heads' gradient from the backbone, and detaches the features of the wrong heads",
    "detached_backbone gradient_scale_differs",
    "preflight",
)
def main_heads_detached(trainer: Trainer, wrong: bool) -> None:
    model, width = trainer.model, trainer.model.fuse.out_features
    for layer in (model.angle_factor, model.range_factor) if wrong else (model.refine,):
        on_input(layer, lambda x: (torch.cat((x[:, :width].detach(), x[:, width:]), 1),))


@LOSS.pair(
    "weighs scenes by their standardised SNR, which is negative for half of them",
    "loss_sign part_not_learned",
    "preflight",
)
def standardised_weights(trainer: Trainer, wrong: bool) -> None:
    def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def weighed(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
            snr = scenes.snr_db  # uniform from 10 to 20 dB: of mean 15 and standard deviation 2.9
            return ((snr - 15.0) / 2.9 if wrong else snr / 15.0) * nmse(factor, scenes, blend=blend)

        return weighed

    wrap(trainer.loss, "nmse", make)


class Annealed(Callback):
    """Lowers the weight of some terms after each epoch."""

    changes = ("loss",)

    def __init__(self, weights: dict[str, float], names: tuple[str, ...]) -> None:
        self.weights, self.names = weights, names

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.weights.update({name: 0.1 * self.weights[name] for name in self.names})


@LOSS.pair(
    "anneals the auxiliary terms from epoch to epoch, and names the covariance terms",
    "zero_loss_weight dominating_term settings_changed",
    "share:0.01",
    onset=8,
)
def covariance_annealed(trainer: Trainer, wrong: bool) -> None:
    names = ("cov", "cov_pred") if wrong else ("angle", "range", "chamfer", "count")
    trainer.callbacks.append(Annealed(trainer.loss.weights, names))


LOSS.setting(
    "loading_in_units_of_power",
    "took the diagonal loading over from a program whose covariances are in units of received power",
    "epsilon_swallows_signal dead_loss_term",
    "preflight",
    {"loss.loading": 3e4},
)


@MODEL.pair(
    "answers with a cosine of the azimuth and takes the arc cosine, which has no sign",
    "limited_output",
    "preflight",
)
def azimuth_through_arc_cosine(trainer: Trainer, wrong: bool) -> None:
    def answered(prediction: Prediction) -> Prediction:
        cos, sin = prediction.azimuth.cos(), prediction.azimuth.sin()
        return prediction._replace(azimuth=cos.clamp(-1.0 + 1e-6, 1.0 - 1e-6).acos() if wrong else sin.atan2(cos))

    wrap(trainer.model, "trunk", lambda trunk: lambda features: answered(trunk(features)))
    rebound(trainer)


@COMPILED.patch(
    "captures the optimizer's step with the learning rate of the first step as a constant in the graph",
    "learning_rate_off_plan learning_rate_too_small",
    "share:0.01",
    twin="long_warmup",
    onset=1,
)
def rate_captured_as_a_constant(trainer: Trainer) -> None:
    captured: list[float] = []

    def make(take: Callable) -> Callable:
        def replayed(*args: Any) -> Any:
            groups = trainer.optimizer.param_groups
            planned = [group["lr"] for group in groups]
            captured[:] = captured or planned
            for group, rate in zip(groups, captured):
                group["lr"] = rate
            answer = take(*args)
            for group, rate in zip(groups, planned):
                group["lr"] = rate
            return answer

        return replayed

    wrap(trainer.optimizer, "step", make)


@COMPILED.patch(
    "validates with a copy of the network that was exported for inference before training",
    "stale_compiled_graph cached_validation",
    "share:0.01",
)
def validated_with_an_export(trainer: Trainer) -> None:
    exported = deepcopy(trainer.model)
    wrap(
        trainer.step,
        "network",
        lambda network: lambda *inputs: network(*inputs) if torch.is_grad_enabled() else exported(*inputs),
    )
