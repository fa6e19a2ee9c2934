"""The fifth set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults.catalogue import FIFTH, Family
from bench.faults.patches import LABELS, built_with, on_batches, wrap
from ris_fast.physics.real_complex import multiply
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import Group
from ris_fast.training.trainer import Trainer

LOOP, PRECISION, AVERAGING = Family("loop", FIFTH), Family("precision", FIFTH), Family("averaging", FIFTH)
MODE, DATA = Family("mode", FIFTH), Family("data", FIFTH)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)
CLIMB = 0.2  # length of the way to the sharpest point, over all weights


@LOOP.pair(
    "warms up over an epoch with step / warm_up and forgets the min(1, ...), so that the rate never stops growing",
    "learning_rate_off_plan learning_rate_too_large",
    "share:0.01",
    onset=8,
)
def warm_up_without_an_end(trainer: Trainer, wrong: bool) -> None:
    def schedule(planned: int) -> None:
        share = (trainer.optimizer.applied_steps() + 1) / trainer.epoch_steps
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (share if wrong else min(share, 1.0))

    trainer.step.schedule = schedule


@LOOP.pair(
    "climbs to the sharpest point near the weights before each gradient, as SAM does, and never comes back",
    "weights_changed_outside",
    "share:0.01",
)
def sharpness_never_climbed_down(trainer: Trainer, wrong: bool) -> None:
    parameters = [each for each in trainer.model.parameters() if each.requires_grad]

    def make(accumulate: Callable) -> Callable:
        def climbed(scenes: Scenes, share: float) -> Any:
            loss = trainer.loss(trainer.step.predict(scenes), scenes)[0]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            climb = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
            norm = torch.stack([each.norm() for each in climb]).norm().clamp_min(1e-12)
            with torch.no_grad():
                for parameter, each in zip(parameters, climb):
                    parameter.add_(CLIMB * each / norm)
            result = accumulate(scenes, share)
            with torch.no_grad():
                for parameter, each in zip(parameters, climb):
                    parameter.sub_((0.0 if wrong else CLIMB) * each / norm)
            return result

        return climbed

    wrap(trainer.step, "_accumulate", make)


@LOOP.patch(
    "reads scenes in the order of their recording, in which the source walks past the surface once an epoch",
    "distributions_differ part_not_learned",
    "share:0.01",
    twin="fixed",
)
def scenes_in_order_of_time(trainer: Trainer) -> None:
    def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
        def in_order() -> Iterator[Group]:
            shuffled = list(groups())
            numbers = torch.cat([part for group in shuffled for part in group])
            numbers = numbers[trainer.source.batch("train", numbers).azimuth[:, 0].argsort()]
            at = 0
            for group in shuffled:
                parts = numbers[at : (at := at + group.scenes)].split([len(part) for part in group])
                yield Group(parts, group.scenes, group.neighbour)

        return in_order

    wrap(trainer, "_index_groups", make)


@PRECISION.pair(
    "adds up the loss in units of received power, whose squares are smaller than Adam's epsilon",
    "epsilon_swallows_signal gradient_underflow learning_rate_too_small",
    "share:0.01",
)
def loss_in_squared_watts(trainer: Trainer, wrong: bool) -> None:
    unit = 1e-11 if wrong else 0.3
    wrap(
        trainer.loss,
        "forward",
        lambda forward: lambda *args: (lambda total, terms: (unit * total, terms))(*forward(*args)),
    )


@AVERAGING.pair(
    "averages parameters alone: the average is validated with the running statistics of the start",
    "batchnorm_statistics ema_frozen unsettled_buffers ema_cold",
    "share:0.01",
)
def average_with_the_first_statistics(trainer: Trainer, wrong: bool) -> None:
    norm = trainer.model.fuse.norm = nn.BatchNorm1d(trainer.model.fuse.in_features, affine=False)
    trainer.model.fuse.register_forward_pre_hook(lambda layer, inputs: (layer.norm(inputs[0]),))
    first = {name: value.clone() for name, value in norm.named_buffers()}

    def make(ema: Callable) -> Callable:
        @contextmanager
        def averaged() -> Iterator[None]:
            kept = {name: value.clone() for name, value in norm.named_buffers()}
            with ema():
                norm.load_state_dict(first if wrong else kept)
                yield
            norm.load_state_dict(kept)

        return averaged

    wrap(trainer.optimizer, "ema", make)


@MODE.pair(
    "moves to micro-batches of two scenes, and to more of them, with a batch norm in the network",
    "batchnorm_statistics losses_differ scenes_mixed validation_apart",
    "share:0.01",
    settings={"training.batch_size": 2, "training.accumulate": 16},
)
def batch_norm_over_two_scenes(trainer: Trainer, wrong: bool) -> None:
    trainer.model.fuse.norm = nn.BatchNorm1d(trainer.model.fuse.in_features, affine=False)
    trainer.model.fuse.register_forward_pre_hook(lambda layer, inputs: (layer.norm(inputs[0]),))


@DATA.patch(
    "lists label files in the order of their names, 0, 1, 10, 11, 2, and input files in that of their numbers",
    "shuffled_labels parts_unrelated",
    "preflight",
)
def label_files_in_order_of_names(trainer: Trainer) -> None:
    names = sorted(range(16), key=str)
    places = torch.tensor(names)

    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def paired(split: str, index: Tensor) -> Scenes:
            scenes, file = batch(split, index), index // 16
            if split != "train":  # four files, which both orders list alike
                return scenes
            labels = batch(split, index + 16 * (places[file % 16] - file % 16))
            return replace(scenes, **{name: getattr(labels, name) for name in LABELS})

        return paired

    wrap(trainer.source, "batch", make)


@DATA.patch(
    "makes labels with np.empty and fills in the sources that are there, so that the other places hold old ones",
    "parts_unrelated stale_cache shuffled_labels",
    "preflight",
)
def places_without_a_source_not_cleared(trainer: Trainer) -> None:
    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def filled(split: str, index: Tensor) -> Scenes:
            scenes, before = batch(split, index), batch(split, (index - 1).clamp_min(0))
            there = scenes.power > 0
            labels = {
                name: torch.where(there, getattr(scenes, name), getattr(before, name))
                for name in ("azimuth", "elevation", "range_m", "power")
            }
            return replace(scenes, factor=torch.where(there[:, None, :, None], scenes.factor, before.factor), **labels)

        return filled

    wrap(trainer.source, "batch", make)


@DATA.patch(
    "multiplies steering vectors with the power of their source where the amplitude is meant",
    "parts_unrelated target_scale_differs",
    "preflight",
    twin="backprojection",
)
def power_for_amplitude(trainer: Trainer) -> None:
    on_batches(trainer, lambda scenes: replace(scenes, factor=scenes.factor * scenes.power.sqrt()[:, None, :, None]))


def turned(snapshots: Tensor, angle: Tensor) -> Tensor:
    """Snapshots (B, L, M, 2) times a phase."""
    return multiply(snapshots, torch.stack((angle.cos(), angle.sin()), -1).expand_as(snapshots))


@DATA.pair(
    "turns the phase of training scenes, as augmentation, and draws one for each number instead of each scene",
    "parts_unrelated inputs_withhold_answer distributions_differ",
    "preflight",
    twin="backprojection",
)
def phase_for_each_number(trainer: Trainer, wrong: bool) -> None:
    def augmented(scenes: Scenes) -> Scenes:
        shape = scenes.snapshots.shape[:3] if wrong else (scenes.batch, 1, 1)
        generator = torch.Generator().manual_seed(int(scenes.index.sum()))
        return replace(scenes, snapshots=turned(scenes.snapshots, 6.2832 * torch.rand(shape, generator=generator)))

    on_batches(trainer, augmented, "train")


@DATA.pair(
    "cuts recordings into windows and parts the windows at random: each place is in training and in validation",
    "split_overlap",
    "preflight",
    twin="fixed",
)
def windows_of_a_recording_in_both_splits(trainer: Trainer, wrong: bool) -> None:
    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def windows(split: str, index: Tensor) -> Scenes:
            recordings = batch("train" if wrong else split, index % 128)
            generator = torch.Generator().manual_seed(int(index.sum()) + 100_000 * (split == "train"))
            angle = 6.2832 * torch.rand(len(index), 1, 1, generator=generator)
            level = 0.05 * recordings.snapshots.square().mean((1, 2, 3), keepdim=True).sqrt()
            noise = level * torch.randn(recordings.snapshots.shape, generator=generator)
            return replace(recordings, snapshots=turned(recordings.snapshots, angle) + noise, index=index)

        return windows

    wrap(trainer.source, "batch", make)


@DATA.around_pair(
    "trains on data of a surface with a quarter of a wavelength between elements, and keeps the default of a half",
    "task_differs parts_unrelated",
    "preflight",
    twin="few_codes",
)
def spacing_left_at_its_default(wrong: bool) -> Iterator[None]:
    quarter = {"spacing_wavelengths": 0.25}

    def measured(trainer: Trainer) -> None:
        trainer.source.task = trainer.source.task.changed(**quarter)

    with built_with({} if wrong else {f"task.{name}": value for name, value in quarter.items()}, after=measured):
        yield
