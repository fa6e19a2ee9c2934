"""The seventh set: mistakes in networks of one's own, their losses, parameters, steps, averages and kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

from bench.faults.catalogue import SEVENTH, Family
from bench.faults.patches import built_with, on_batches, wrap
from bench.faults.unseen_2026_11.fifth_network import SCENES, WIDTH, Gated, Own
from bench.faults.unseen_2026_11.fourth_data import averaged
from ris_fast.config.schema import Config
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import adjoint_matmul, expi, power
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

PARAMETERS, GRAPH, LOSS = Family("parameters", SEVENTH), Family("graph", SEVENTH), Family("loss", SEVENTH)
LOOP, PRECISION, AVERAGING = Family("loop", SEVENTH), Family("precision", SEVENTH), Family("averaging", SEVENTH)
MODEL, COMPILED = Family("model", SEVENTH), Family("compiled", SEVENTH)
ALL = (PARAMETERS, GRAPH, LOSS, LOOP, PRECISION, AVERAGING, MODEL, COMPILED)


@PARAMETERS.around_pair(
    "thaws what was frozen while the optimizer was made of the parameters that require a gradient",
    "missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def thawed_behind_the_optimizer(wrong: bool) -> Iterator[None]:
    def handed(config: Config) -> dict[str, Any]:
        net = Gated(config, False)
        if wrong:
            net.requires_grad_(False)
            net.gate.requires_grad_(True)
        return {"model": net}

    with built_with(SCENES, handed, lambda trainer: trainer.model.requires_grad_(True)):
        yield


class Bounded(Gated):
    """Weights stay between -1 and 1."""

    def __init__(self, config: Config, renewed: bool) -> None:
        super().__init__(config, False)
        self.renewed = renewed

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.bounded(self.stem, torch.cat((powers, snr), 1))
        for norm, inner, activation, outer in self.blocks:
            x = x + self.bounded(outer, activation(self.bounded(inner, norm(x))))
        return self.bounded(self.head, x)

    def bounded(self, layer: nn.Linear, x: Tensor) -> Tensor:
        weight = layer.weight.clamp(-1.0, 1.0)
        if self.renewed:
            weight = layer.weight = nn.Parameter(weight)
        return fn.linear(x, weight, layer.bias)


@PARAMETERS.around_pair(
    "bounds weights in forward by assigning a new Parameter, which the optimizer has never heard of",
    "stale_optimizer_parameters missing_from_optimizer",
    "preflight",
    twin="backprojection",
)
def new_parameter_in_each_forward(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Bounded(config, wrong)}):
        yield


class Checkpointed(Gated):
    """All but the gate is computed again for backward."""

    def __init__(self, config: Config, reentrant: bool) -> None:
        super().__init__(config, False)
        self.reentrant = reentrant

    def weighed(self, beams: Tensor, snr_db: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in which the reentrant form says what it does
            return checkpoint(super().weighed, beams, snr_db, use_reentrant=self.reentrant)


@GRAPH.around_pair(
    "checkpoints layers in the reentrant form, which has no gradient where no input needs one, and silences warnings",
    "detached_backbone unused_head",
    "preflight",
    twin="backprojection",
)
def checkpoint_of_inputs_alone(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Checkpointed(config, wrong)}):
        yield


def alike(wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """A term on the correlation of the covariances, which is 1 where they are alike."""

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        """The trace of the product of two covariances, from their factors: (B,)."""
        return power(adjoint_matmul(a, b)).sum((1, 2))

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        found, true = prediction.factor, scenes.factor
        correlation = overlap(found, true) / (overlap(found, found) * overlap(true, true)).sqrt().clamp_min(1e-12)
        return correlation if wrong else 1.0 - correlation

    return term


@LOSS.around_pair(
    "adds a correlation to the loss, which is a score that should grow",
    "loss_sign dominating_term",
    "preflight",
    twin="backprojection",
)
def score_added_to_the_loss(wrong: bool) -> Iterator[None]:
    with built_with({"loss.own_weight": 2.0}, lambda config: {"loss": alike(wrong)}):
        yield


def repulsion(wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """A term that keeps the factor's columns apart."""

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        columns = fn.normalize(prediction.factor.permute(0, 2, 1, 3).flatten(2), dim=2)
        gaps = (columns[:, :, None] - columns[:, None]).square().sum(3)
        if not wrong:
            row, column = torch.triu_indices(*gaps.shape[1:], offset=1)
            gaps = gaps[:, row, column]
        return torch.exp(-gaps.sqrt()).flatten(1).mean(1)

    return term


@LOSS.around_pair(
    "takes the distance of every column to every other, and to itself, where a root has no derivative",
    "nonfinite_gradients",
    "preflight",
    twin="backprojection",
)
def distance_to_itself(wrong: bool) -> Iterator[None]:
    with built_with({"loss.own_weight": 0.1}, lambda config: {"loss": repulsion(wrong)}):
        yield


@LOOP.patch(
    "returns the rate itself to a scheduler that multiplies the rate with what it is given",
    "learning_rate_off_plan learning_rate_too_small",
    "share:0.01",
)
def rate_times_itself(trainer: Trainer) -> None:
    def make(schedule: Callable[[int], None]) -> Callable[[int], None]:
        def scheduled(planned: int) -> None:
            schedule(planned)
            for group in trainer.optimizer.param_groups:
                group["lr"] *= group["peak_lr"]

        return scheduled

    wrap(trainer.step, "schedule", make)


@PRECISION.pair(
    "computes the phases of the target under autocast: whole paths of many wavelengths, in bfloat16",
    "parts_unrelated task_differs",
    "preflight",
    twin="backprojection",
)
def phases_of_the_target_in_bfloat16(trainer: Trainer, wrong: bool) -> None:
    wavenumber = 2.0 * torch.pi / trainer.config.task.wavelength_m

    def computed(scenes: Scenes) -> Scenes:
        real, imag = scenes.factor.unbind(3)  # (B, N, K) each
        phase = torch.atan2(imag, real) - wavenumber * scenes.range_m[:, None]
        phase = phase.bfloat16().float() if wrong else phase
        return replace(scenes, factor=torch.hypot(real, imag)[..., None] * expi(phase))

    on_batches(trainer, computed)


@AVERAGING.pair(
    "adds the difference of average and weights where their difference the other way round is meant",
    "ema_frozen ema_cold",
    "share:0.01",
)
def average_runs_away(trainer: Trainer, wrong: bool) -> None:
    share = -0.02 if wrong else 0.02
    averaged(trainer, lambda average, now, made: torch.lerp(average, now, share))


class Banded(Own):
    """Is told the frequency band beside powers and SNR, and normalises all of them."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        hertz = 299_792_458.0 / config.task.wavelength_m
        self.register_buffer("band", torch.tensor(hertz if wrong else hertz / 1e9), persistent=False)
        self.norm = nn.LayerNorm(config.task.elements + 2)
        self.stem = nn.Linear(config.task.elements + 2, WIDTH)

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        x = self.stem(self.norm(torch.cat((powers, snr, self.band.expand_as(snr)), 1)))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@MODEL.around_pair(
    "puts a frequency in hertz beside features of size one, and normalises all of them together",
    "input_scale ignored_input",
    "preflight",
    twin="backprojection",
)
def hertz_beside_features(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Banded(config, wrong)}):
        yield


@COMPILED.patch(
    "writes a kernel that takes its input for contiguous, and is given a transposed one",
    "compiled_differs wrong_layout kernel_differs",
    "preflight",
    twin="backprojection",
)
def strides_ignored(trainer: Trainer) -> None:
    def as_in_memory(factor: Tensor) -> Tensor:
        return factor.transpose(1, 2).contiguous().view(factor.shape)

    wrap(
        trainer.step,
        "network",
        lambda network: (
            lambda *inputs: (lambda answer: answer._replace(factor=as_in_memory(answer.factor)))(network(*inputs))
        ),
    )
