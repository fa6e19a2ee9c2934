"""The fourth set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults.catalogue import FOURTH, Family
from bench.faults.patches import after_step, before_step, layers, on_batches
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer

LOOP, PRECISION, AVERAGING = Family("loop", FOURTH), Family("precision", FOURTH), Family("averaging", FOURTH)
MODE, DATA = Family("mode", FOURTH), Family("data", FOURTH)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)


@LOOP.pair(
    "adds an exponential schedule of its own, with the decay of an epoch at every step",
    "learning_rate_off_plan learning_rate_too_small zero_learning_rate",
    "share:0.01",
)
def decay_of_an_epoch_at_every_step(trainer: Trainer, wrong: bool) -> None:
    made, every = 0, 1 if wrong else trainer.epoch_steps

    def decay() -> None:
        nonlocal made
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 0.95 ** (made // every)
        made += 1

    before_step(trainer, decay)


class Pruning(Callback):
    """Keeps, of each layer's weights, the larger share, after every epoch or after the first one alone."""

    def __init__(self, model: nn.Module, again: bool) -> None:
        self.model, self.again, self.left = model, again, 1.0

    @torch.no_grad()
    def on_epoch_end(self, row: dict[str, Any]) -> None:
        if self.left == 1.0 or self.again:
            self.left *= 0.6
            for layer in layers(self.model):
                size = layer.weight.abs()
                layer.weight.mul_(size >= torch.quantile(size, 1.0 - self.left))


@LOOP.pair(
    "prunes a share of what is left in a callback that runs after every epoch, where once is meant",
    "weights_changed_outside weights_reset collapsed dead_units",
    "share:0.01",
    onset=8,
)
def pruned_after_every_epoch(trainer: Trainer, wrong: bool) -> None:
    trainer.callbacks.append(Pruning(trainer.model, wrong))


@PRECISION.patch(
    "stores the codes as whole numbers, real and imaginary part each",
    "parts_unrelated task_differs wrong_layout mismatched_channel",
    "preflight",
    twin="backprojection",
)
def codes_as_whole_numbers(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, codes=scenes.codes.to(torch.int8).float()))


@PRECISION.patch(
    "rounds weights to eight bits in place after each step, and keeps no finer copy",
    "low_precision_weights step_without_effect weights_changed_outside",
    "share:0.01",
    twin="gentle",
)
def weights_rounded_in_place(trainer: Trainer) -> None:
    @torch.no_grad()
    def rounded() -> None:
        for layer in layers(trainer.model):
            spacing = layer.weight.abs().amax() / 127.0
            layer.weight.copy_((layer.weight / spacing).round() * spacing)

    after_step(trainer, rounded)


def averaged(trainer: Trainer, mean: Any) -> None:
    """The average is what `mean(average, weight, step)` says, weight by weight."""
    averages: dict[str, Tensor] = {}
    made = 0

    @torch.no_grad()
    def follow() -> None:
        nonlocal made
        made += 1
        raw = dict(trainer.model.named_parameters())
        for key, value in trainer.optimizer.extra_state().items():
            now = raw.get(key.removeprefix("ema."))
            if now is not None:
                averages[key] = mean(averages.get(key, now.detach().clone()), now.detach(), made)
                value.copy_(averages[key].view_as(value))

    after_step(trainer, follow)


@AVERAGING.pair(
    "keeps the average in bfloat16, where a hundredth of a difference is rounded away",
    "ema_frozen ema_cold low_precision_weights",
    "share:0.01",
)
def average_in_bfloat16(trainer: Trainer, wrong: bool) -> None:
    kind = torch.bfloat16 if wrong else torch.float32
    averaged(trainer, lambda average, now, made: (0.99 * average.to(kind)).add(0.01 * now.to(kind)).to(kind))


@AVERAGING.pair(
    "averages all weights since the start alike, which is the default of a class meant for the end of a run",
    "ema_cold ema_frozen",
    "share:0.01",
)
def all_weights_averaged_alike(trainer: Trainer, wrong: bool) -> None:
    averaged(trainer, lambda average, now, made: torch.lerp(average, now, 1.0 / made if wrong else 0.05))


@MODE.pair(
    "standardises features over the batch in training and passes them on as they are in evaluation",
    "losses_differ validation_apart batchnorm_statistics scenes_mixed",
    "preflight",
)
def standardised_in_training_only(trainer: Trainer, wrong: bool) -> None:
    def standardised(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not wrong:
            return (output - 0.3) / 0.5
        return (output - output.mean(0)) / (output.std(0) + 1e-3) if layer.training else output

    trainer.model.fuse.register_forward_hook(standardised)


@DATA.patch(
    "lists the codes from the second on, since the first row of the file was taken for a header",
    "parts_unrelated task_differs wrong_layout",
    "preflight",
)
def codes_one_row_further(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, codes=scenes.codes.roll(-1, -3)))


@DATA.patch(
    "reads elevation from the column of azimuth and azimuth from that of elevation",
    "parts_unrelated wrong_layout shuffled_labels wrong_units",
    "preflight",
)
def angles_in_each_others_column(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, azimuth=scenes.elevation, elevation=scenes.azimuth))


@DATA.pair(
    "adds noise to training scenes, and takes the root of what is an amplitude already: 10 dB become 5",
    "snr_labels_differ distributions_differ parts_unrelated",
    "preflight",
)
def noise_of_half_the_decibels(trainer: Trainer, wrong: bool) -> None:
    def noisy(scenes: Scenes) -> Scenes:
        level = scenes.snapshots.square().mean((1, 2, 3), keepdim=True).sqrt()
        share = 10.0 ** (-scenes.snr_db / 40.0).view(-1, 1, 1, 1)
        noise = torch.randn(scenes.snapshots.shape, generator=torch.Generator().manual_seed(int(scenes.index.sum())))
        return replace(scenes, snapshots=scenes.snapshots + (share if wrong else 0.02) * level * noise)

    on_batches(trainer, noisy, "train")
