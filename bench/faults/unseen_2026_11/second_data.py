"""The second set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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


@LOOP.patch(
    "plans the schedule for the five epochs of the last experiment",
    "learning_rate_off_plan learning_rate_too_small settings_changed",
    "share:0.01",
)
def planned_for_five_epochs(trainer: Trainer) -> None:
    wrap(trainer.step, "schedule", lambda schedule: lambda planned: schedule(5 * trainer.epoch_steps))


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


@LOOP.patch(
    "adds noise to the weights after each step, to explore, and never anneals it",
    "weights_changed_outside learning_rate_too_large",
    "share:0.01",
)
def noise_added_to_the_weights(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def stir() -> None:
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))

    after_step(trainer, stir)


@PRECISION.patch(
    "means a term over the scenes of high SNR, of which some batches have none",
    "nonfinite_gradients",
    "share:0.01",
    twin="accumulate",
)
def mean_over_no_scenes(trainer: Trainer) -> None:
    def make(forward: Callable) -> Callable:
        def with_clear(prediction: Prediction, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
            total, terms = forward(prediction, scenes)
            values = trainer.loss.nmse(prediction.factor.float(), scenes, blend=False)
            return total + 0.1 * values[scenes.snr_db > 18.0].mean(), terms

        return with_clear

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
    twin="backprojection",
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


@AVERAGING.patch(
    "averages all weights since the first step with equal shares, the random ones included",
    "ema_cold",
    "share:0.01",
)
def average_of_all_that_was(trainer: Trainer) -> None:
    means = {f"ema.{name}": parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    made = 1

    @torch.no_grad()
    def follow() -> None:
        nonlocal made
        made += 1
        raw = {f"ema.{name}": parameter for name, parameter in trainer.model.named_parameters()}
        for name, value in trainer.optimizer.extra_state().items():
            if name in raw:
                means[name].lerp_(raw[name].detach(), 1.0 / made)
                value.copy_(means[name].view_as(value))

    after_step(trainer, follow)


@MODE.patch(
    "overrides train() and forgets to pass it on, so that eval() does not reach the dropout inside",
    "train_mode_in_validation shadowed_parameters",
    "share:0.01",
    twin="dropout_half",
)
def eval_reaches_nobody(trainer: Trainer) -> None:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        self.training = mode
        return self

    model = trainer.model
    model.__class__ = type("Overridden", (type(model),), {"train": train})


@MODE.patch(
    "skips the attention in evaluation, as a faster path for inference that was never checked",
    "losses_differ validation_apart",
    "share:0.01",
)
def faster_path_in_evaluation(trainer: Trainer) -> None:
    width = trainer.model.fuse.out_features

    def skip(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0]
        return (x if module.training else torch.cat((torch.zeros_like(x[..., :width]), x[..., width:]), -1),)

    trainer.model.fuse.register_forward_pre_hook(skip)


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
    "sorts the azimuths of a scene, and its elevations by themselves",
    "parts_unrelated shuffled_labels wrong_layout",
    "preflight",
)
def elevations_sorted_apart(trainer: Trainer) -> None:
    def apart(scenes: Scenes) -> Scenes:
        whole = (scenes.count == scenes.azimuth.shape[1])[:, None]
        azimuth = torch.where(whole, scenes.azimuth.sort(1).values, scenes.azimuth)
        elevation = torch.where(whole, scenes.elevation.sort(1).values, scenes.elevation)
        return replace(scenes, azimuth=azimuth, elevation=elevation)

    on_batches(trainer, apart)


@DATA.patch(
    "resets the generator for each validation scene, so that all are one scene",
    "repeated_batch distributions_differ constant_input constant_targets",
    "preflight",
)
def validation_of_one_scene(trainer: Trainer) -> None:
    wrap(
        trainer.source,
        "batch",
        lambda batch: lambda split, index: batch(split, torch.zeros_like(index) if split == "val" else index),
    )


@DATA.patch(
    "takes the number of a scene modulo the rows of one file, so that the same sixteen scenes come for ever",
    "repeated_batch overfitting",
    "share:0.01",
    twin="backprojection",
)
def sixteen_scenes_for_ever(trainer: Trainer) -> None:
    wrap(
        trainer.source,
        "batch",
        lambda batch: lambda split, index: batch(split, index % 16 if split == "train" else index),
    )


@DATA.patch(
    "writes the SNR as a ratio into a column that is read as decibels",
    "snr_labels_differ wrong_units",
    "preflight",
    twin="path_loss",
)
def snr_is_a_ratio(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, snr_db=10.0 ** (scenes.snr_db / 10.0)))


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
    "mirrors the antennas of half of the training scenes, as augmentation, and not their channel",
    "parts_unrelated mismatched_channel wrong_layout distributions_differ",
    "preflight",
    twin="backprojection",
)
def antennas_mirrored(trainer: Trainer) -> None:
    def mirrored(scenes: Scenes) -> Scenes:
        turned = (scenes.index % 2 == 0)[:, None, None, None]
        return replace(scenes, snapshots=torch.where(turned, scenes.snapshots.flip(2), scenes.snapshots))

    on_batches(trainer, mirrored, "train")


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
