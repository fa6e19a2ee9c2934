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
    gradients,
    on_batches,
    on_loss,
    wrap,
)
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
    "stores snapshots as small integers with one step for a whole file, below which weak scenes vanish",
    "inputs_withhold_answer snr_labels_differ parts_unrelated input_scale",
    "preflight",
    twin="path_loss",
)
def snapshots_in_few_bits(trainer: Trainer) -> None:
    largest = trainer.source.batch("train", torch.arange(64)).snapshots.abs().amax()
    step = largest / 3.0
    on_batches(trainer, lambda scenes: replace(scenes, snapshots=(scenes.snapshots / step).round() * step))


@PRECISION.patch(
    "compresses gradients to a few levels of the largest one, and drops what is lost",
    "gradient_underflow zeroed_gradients vanishing_gradient",
    "steps:5",
)
def gradients_in_three_levels(trainer: Trainer) -> None:
    @torch.no_grad()
    def compress() -> None:
        found = gradients(trainer)
        largest = torch.stack([grad.abs().amax() for grad in found]).amax().clamp_min(1e-30)
        for grad in found:
            grad.copy_((grad / largest).round() * largest)

    before_step(trainer, compress)


@AVERAGING.patch(
    "averages the backbone's group alone; the heads of the average are those of the start",
    "ema_frozen ema_cold",
    "share:0.01",
)
def average_without_the_heads(trainer: Trainer) -> None:
    heads = {id(parameter) for parameter in trainer.model.head_parameters()}
    first = {f"ema.{name}": p.detach().clone() for name, p in trainer.model.named_parameters() if id(p) in heads}

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


@MODE.pair(
    "draws a dropout mask in the constructor and keeps it, so that half of the features are never trained",
    "losses_differ validation_apart",
    "share:0.01",
)
def mask_drawn_once(trainer: Trainer, wrong: bool) -> None:
    width = trainer.model.fuse.out_features
    first = torch.rand(1, width) < 0.5

    def drop(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not module.training:
            return output
        return output * (first if wrong else torch.rand(output.shape) < 0.5) * 2.0

    trainer.model.fuse.register_forward_hook(drop)


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
