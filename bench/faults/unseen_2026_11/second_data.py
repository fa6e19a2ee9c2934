"""The second set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.catalogue import SECOND, Family
from bench.faults.patches import after_step, on_batches, on_loss, wrap
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer

LOOP, PRECISION, AVERAGING = Family("loop", SECOND), Family("precision", SECOND), Family("averaging", SECOND)
MODE, DATA = Family("mode", SECOND), Family("data", SECOND)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)


@LOOP.patch(
    "keeps the scheduler inside the epoch, so that the warm-up starts again with each",
    "learning_rate_off_plan schedule_per_epoch warmup_too_long",
    "share:0.01",
    twin="long_warmup",
    onset=8,
)
def warm_up_in_every_epoch(trainer: Trainer) -> None:
    wrap(trainer.optimizer, "applied_steps", lambda applied: lambda: trainer.state.epoch_step)


class Freezing(Callback):
    """Freezes all but the heads after the first epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        heads = {id(parameter) for parameter in self.model.head_parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in heads)


@LOOP.patch(
    "freezes the backbone after the first epoch, where the recipe means the first phase",
    "frozen_parameters settings_changed",
    "share:0.01",
    onset=8,
)
def frozen_after_an_epoch(trainer: Trainer) -> None:
    trainer.callbacks.append(Freezing(trainer.model))


@PRECISION.patch(
    "divides the loss by its mean over the scenes of high SNR, of which some batches have none",
    "nonfinite_gradients",
    "share:0.01",
    twin="accumulate",
)
def mean_over_no_scenes(trainer: Trainer) -> None:
    def make(forward: Callable) -> Callable:
        def relative(prediction: Prediction, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
            total, terms = forward(prediction, scenes)
            values = trainer.loss.nmse(prediction.factor.float(), scenes, blend=False).detach()
            return total / values[scenes.snr_db > 19.0].mean(), terms

        return relative

    wrap(trainer.loss, "forward", make)


@PRECISION.patch(
    "scales each tensor's update by the norm of the tensor, the wrong way up, and biases start at zero",
    "nonfinite_step",
    "steps:5",
)
def trust_ratio_upside_down(trainer: Trainer) -> None:
    before = {}

    def make(take: Callable) -> Callable:
        @torch.no_grad()
        def scaled(*args: Any) -> Any:
            for name, parameter in trainer.model.named_parameters():
                before[name] = parameter.detach().clone()
            answer = take(*args)
            for name, parameter in trainer.model.named_parameters():
                update = parameter - before[name]
                parameter.copy_(before[name] + 0.3 * update / before[name].norm())
            return answer

        return scaled

    wrap(trainer.optimizer, "step", make)


@AVERAGING.pair(
    "starts the average at zero and forgets the correction for it",
    "ema_cold ema_frozen",
    "share:0.01",
)
def average_starts_at_zero(trainer: Trainer, wrong: bool) -> None:
    decay, sums, made = 0.98, {}, 0

    @torch.no_grad()
    def follow() -> None:
        nonlocal made
        made += 1
        raw = {f"ema.{name}": parameter for name, parameter in trainer.model.named_parameters()}
        for name, value in trainer.optimizer.extra_state().items():
            if name in raw:
                total = sums.setdefault(name, torch.zeros_like(raw[name]))
                total.mul_(decay).add_(raw[name], alpha=1.0 - decay)
                value.copy_((total if wrong else total / (1.0 - decay**made)).view_as(value))

    after_step(trainer, follow)


@MODE.pair(
    "overrides train() and forgets to pass it on, so that eval() does not reach the parts that drop features",
    "train_mode_in_validation shadowed_parameters",
    "share:0.01",
)
def eval_reaches_nobody(trainer: Trainer, wrong: bool) -> None:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        self.training = mode
        return self

    model = trainer.model
    model.fuse.register_forward_pre_hook(lambda module, inputs: (fn.dropout(inputs[0], 0.5, module.training),))
    if wrong:
        model.__class__ = type("Overridden", (type(model),), {"train": train})


@DATA.patch(
    "filters the training scenes for one source, for a first test, and keeps the filter",
    "distributions_differ part_not_learned",
    "preflight",
    twin="backprojection",
)
def scenes_of_one_source(trainer: Trainer) -> None:
    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def filtered(split: str, index: Tensor) -> Scenes:
            if split != "train":
                return batch(split, index)
            tries = index[:, None] * 8 + torch.arange(8)
            alone = batch(split, tries.flatten()).count.view_as(tries) == 1
            return replace(batch(split, tries.gather(1, alone.int().argmax(1)[:, None])[:, 0]), index=index)

        return filtered

    wrap(trainer.source, "batch", make)


@DATA.patch(
    "reads counts that start at zero, so that a scene has one source less than it was made with",
    "parts_unrelated shuffled_labels dead_loss_term constant_targets",
    "preflight",
    twin="counting",
)
def counts_start_at_zero(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, count=(scenes.count - 1).clamp_min(1)))


@DATA.patch(
    "whitens the target in place, in the loss: kept validation scenes are whitened again in every epoch",
    "scenes_altered losses_differ scenes_change",
    "preflight",
)
def target_changed_in_place(trainer: Trainer) -> None:
    def whitened(prediction: Prediction, scenes: Scenes) -> tuple[Prediction, Scenes]:
        scenes.factor.add_(0.05 * scenes.factor.roll(1, 1))
        return prediction, scenes

    on_loss(trainer, whitened)


@DATA.patch(
    "counts the elements of the surface by columns where the target counts them by rows",
    "wrong_layout task_differs parts_unrelated",
    "preflight",
    twin="backprojection",
)
def elements_counted_by_columns(trainer: Trainer) -> None:
    task = trainer.config.task
    order = torch.arange(task.elements).view(task.ris_vertical, task.ris_horizontal).T.flatten()
    on_batches(trainer, lambda scenes: replace(scenes, factor=scenes.factor[:, order]))


INPUTS = ("snapshots", "channel", "snr_db")


@DATA.patch(
    "keeps the inputs of a scene by its number, without its split: validation and training read each other's",
    "stale_cache shuffled_labels parts_unrelated",
    "preflight",
    twin="fixed",
)
def inputs_kept_by_number(trainer: Trainer) -> None:
    kept: dict[int, tuple[Tensor, ...]] = {}

    def cached(scenes: Scenes) -> Scenes:
        rows = [
            kept.setdefault(int(number), tuple(getattr(scenes, name)[i] for name in INPUTS))
            for i, number in enumerate(scenes.index)
        ]
        return replace(scenes, **{name: torch.stack(each) for name, each in zip(INPUTS, zip(*rows))})

    on_batches(trainer, cached)
