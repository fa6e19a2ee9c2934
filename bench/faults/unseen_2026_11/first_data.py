"""The first set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults.catalogue import FIRST, Family
from bench.faults.patches import (
    after_step,
    before_step,
    model_with,
    on_batches,
    on_loss,
    wrap,
)
from ris_fast.kernels.fused_step.layout import State
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer

LOOP = Family("loop", FIRST)
PRECISION = Family("precision", FIRST)
AVERAGING = Family("averaging", FIRST)
MODE = Family("mode", FIRST)
DATA = Family("data", FIRST)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)


class Plateau(Callback):
    """Lowers every rate tenfold when the validation has not improved for three epochs."""

    def __init__(self, better: Callable[[float, float], bool]) -> None:
        self.better, self.best, self.bad, self.scale = better, None, 0, 1.0

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        value = row["val_nmse_raw"]
        if self.best is None or self.better(value, self.best):
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad >= 3:
            self.scale, self.bad = 0.1 * self.scale, 0


@LOOP.pair(
    "lowers the rate on a plateau of the validation and looks for a maximum, as of an accuracy",
    "learning_rate_off_plan learning_rate_too_small settings_changed",
    "share:0.01",
    onset=32,
)
def plateau_of_the_wrong_sign(trainer: Trainer, wrong: bool) -> None:
    plateau = Plateau((lambda value, best: value > best) if wrong else (lambda value, best: value < best))
    trainer.callbacks.append(plateau)

    def make(schedule: Callable[[int], None]) -> Callable[[int], None]:
        def lowered(planned: int) -> None:
            schedule(planned)
            for group in trainer.optimizer.param_groups:
                group["lr"] *= plateau.scale

        return lowered

    wrap(trainer.step, "schedule", make)


@LOOP.pair(
    "skips batches whose loss is a spike, and a spike is whatever exceeds the lowest loss so far",
    "forwards_without_backward scenes_left_out batches_skipped vanishing_gradient",
    "share:0.01",
    onset=8,
)
def spike_guard_is_a_ratchet(trainer: Trainer, wrong: bool) -> None:
    lowest, step = float("inf"), trainer.step

    def accumulate(scenes: Scenes, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal lowest
        loss, terms = trainer.loss(step.predict(scenes), scenes)
        step.telemetry.weighted(share)
        if loss.item() <= (1.0 if wrong else 20.0) * lowest:
            lowest = min(lowest, loss.item())
            trainer.optimizer.scale(loss * share).backward()
        return loss.detach() * share, {name: value.detach() * share for name, value in terms.items()}

    step._accumulate = accumulate


@PRECISION.patch(
    "unscales the gradients by hand before a step that unscales them itself",
    "unscaled_twice gradient_underflow",
    "steps:5",
    twin="half",
)
def unscaled_by_hand_too(trainer: Trainer) -> None:
    @torch.no_grad()
    def unscale() -> None:
        scale = trainer.optimizer.buckets[0].state[State.SCALE].float()
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)

    before_step(trainer, unscale)


@PRECISION.patch(
    "keeps Adam's second moments in bfloat16, where a thousandth is never added",
    "low_precision_weights learning_rate_too_large nonfinite_step",
    "share:0.01",
)
def second_moments_in_bfloat16(trainer: Trainer) -> None:
    @torch.no_grad()
    def rounded() -> None:
        for state in trainer.optimizer.state.values():
            state["exp_avg_sq"].copy_(state["exp_avg_sq"].bfloat16())

    after_step(trainer, rounded)


@AVERAGING.patch(
    "averages what is called weight; biases and norms of the average are those of the start",
    "ema_frozen ema_cold",
    "share:0.01",
)
def average_of_matrices_alone(trainer: Trainer) -> None:
    first = {f"ema.{name}": p.detach().clone() for name, p in trainer.model.named_parameters() if p.ndim < 2}

    @torch.no_grad()
    def put_back() -> None:
        for name, value in trainer.optimizer.extra_state().items():
            if name in first:
                value.copy_(first[name].view_as(value))

    after_step(trainer, put_back)


@AVERAGING.patch(
    "loads the averaged weights into a copy of the network, and validates the network",
    "ema_equals_raw cached_validation",
    "share:0.01",
    twin="backprojection",
)
def average_loaded_into_a_copy(trainer: Trainer) -> None:
    shadow = deepcopy(trainer.model)

    @contextmanager
    def averaged() -> Iterator[None]:
        saved = trainer.optimizer.extra_state()
        for name, parameter in shadow.named_parameters():
            if f"ema.{name}" in saved:
                parameter.data.copy_(saved[f"ema.{name}"].view_as(parameter))
        yield

    trainer.optimizer.ema = averaged


class PathDropout(nn.Module):
    """Drops whole features of a batch in training; `keep` is what is left of them."""

    def __init__(self, keep: float, rescaled: bool) -> None:
        super().__init__()
        self.p, self.rescaled = 1.0 - keep, rescaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = (torch.rand(x.shape, device=x.device) >= self.p).to(x.dtype)
        return x * kept / (1.0 - self.p) if self.rescaled else x * kept


@MODE.around_pair(
    "drops features by hand in training and forgets to scale up what is left",
    "losses_differ validation_apart",
    "share:0.01",
    twin="backprojection",
)
def dropped_without_rescaling(wrong: bool) -> Iterator[None]:
    def change(model: nn.Module) -> None:
        model.norm = nn.Sequential(model.norm, PathDropout(0.4, rescaled=not wrong))

    with model_with(change):
        yield


@MODE.patch(
    "hands the network half of the true factor while it trains, as in teacher forcing, and never its own",
    "losses_differ validation_apart unused_head",
    "preflight",
)
def teacher_forced_to_the_end(trainer: Trainer) -> None:
    def forced(prediction: Prediction, scenes: Scenes) -> tuple[Prediction, Scenes]:
        if not torch.is_grad_enabled():
            return prediction, scenes
        own = prediction.factor[:, :, scenes.factor.shape[2] :]
        return prediction._replace(factor=torch.cat((scenes.factor, own), 2)), scenes

    on_loss(trainer, forced)


@DATA.patch(
    "mixes the snapshots of two scenes, as augmentation, and leaves channel and labels to the first",
    "parts_unrelated snr_labels_differ distributions_differ",
    "preflight",
    twin="backprojection",
)
def snapshots_mixed_labels_not(trainer: Trainer) -> None:
    on_batches(
        trainer,
        lambda scenes: replace(scenes, snapshots=0.5 * (scenes.snapshots + scenes.snapshots.roll(1, 0))),
        "train",
    )


@DATA.patch(
    "measures with new symbols in each snapshot and tells the network that they are those of the scene",
    "task_differs parts_unrelated snr_labels_differ",
    "preflight",
    twin="backprojection",
)
def symbols_of_each_snapshot(trainer: Trainer) -> None:
    trainer.source.task = trainer.source.task.changed(symbols="per_snapshot")
