"""The eighth set: mistakes in measured data, in how they are looped over, averaged and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.faults.catalogue import EIGHTH, Family
from bench.faults.patches import before_step, built_with, on_batches, wrap
from bench.faults.unseen_2026_11.fifth_network import SCENES
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training.step import Group
from ris_fast.training.trainer import Trainer

LOOP, PRECISION, AVERAGING = Family("loop", EIGHTH), Family("precision", EIGHTH), Family("averaging", EIGHTH)
MODE, DATA = Family("mode", EIGHTH), Family("data", EIGHTH)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)


@LOOP.pair(
    "begins with sources in front of the surface and widens the field, by an epoch counter that is zero in each epoch",
    "distributions_differ part_not_learned validation_apart",
    "share:0.01",
    onset=16,
)
def curriculum_that_never_widens(trainer: Trainer, wrong: bool) -> None:
    pool = torch.arange(4096)
    farthest = trainer.source.batch("train", pool).azimuth.abs().amax(1)
    full = math.radians(trainer.config.task.azimuth_deg)

    def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
        def chosen() -> Iterator[Group]:
            epoch = 0 if wrong else trainer.state.epoch
            near = pool[farthest <= full * min(0.2 + 0.4 * epoch, 1.0)]
            for group in groups():
                yield Group([near[part % len(near)] for part in group], group.scenes, group.neighbour)

        return chosen

    wrap(trainer, "_index_groups", make)


@LOOP.around_pair(
    "draws the scenes of an epoch from many, with a generator that it seeds anew: they are the same few in each",
    "repeated_batch overfitting validation_apart",
    "share:0.01",
    onset=4,
)
def same_subset_in_every_epoch(wrong: bool) -> Iterator[None]:
    def draw(trainer: Trainer) -> None:
        def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
            def drawn() -> Iterator[Group]:
                generator = torch.Generator().manual_seed(7 + (0 if wrong else trainer.state.epoch))
                chosen = torch.randperm(20_000, generator=generator)[: trainer.source.size("train")]
                for group in groups():
                    yield Group([chosen[part % len(chosen)] for part in group], group.scenes, group.neighbour)

            return drawn

        wrap(trainer, "_index_groups", make)

    with built_with({"data.train_scenes": 64, "training.batch_size": 16}, after=draw):
        yield


@PRECISION.pair(
    "computes the phases of the target from distances in bfloat16, where 200 radians come in steps of one",
    "parts_unrelated target_scale_differs",
    "preflight",
    twin="backprojection",
)
def phases_of_metres_in_bfloat16(trainer: Trainer, wrong: bool) -> None:
    def computed(scenes: Scenes) -> Scenes:
        way = 2.0 * math.pi / trainer.config.task.wavelength_m * scenes.range_m[:, None]
        phase = torch.atan2(scenes.factor[..., 1], scenes.factor[..., 0]) + way
        phase = phase.bfloat16().float() if wrong else phase
        level = scenes.factor.square().sum(-1).sqrt()
        return replace(scenes, factor=torch.stack((level * phase.cos(), level * phase.sin()), -1))

    on_batches(trainer, computed)


@AVERAGING.pair(
    "raises the decay of the average to one along a cosine, as for a teacher, over an epoch where all are meant",
    "ema_frozen ema_cold",
    "share:0.01",
    onset=8,
)
def decay_of_one_after_an_epoch(trainer: Trainer, wrong: bool) -> None:
    trainer.optimizer.ema_warmup = False

    def follow() -> None:
        over = trainer.epoch_steps if wrong else trainer.plan.planned
        share = min(trainer.optimizer.attempted_steps() / over, 1.0)
        trainer.optimizer.ema_decay = 1.0 - 0.05 - 0.05 * math.cos(math.pi * share) - 1e-9

    before_step(trainer, follow)


@MODE.pair(
    "gives a batch norm the momentum of a recipe for a million steps: its statistics are those of the start for long",
    "batchnorm_statistics losses_differ validation_apart",
    "share:0.01",
)
def statistics_a_thousand_steps_behind(trainer: Trainer, wrong: bool) -> None:
    fuse = trainer.model.fuse
    fuse.norm = nn.BatchNorm1d(fuse.in_features, affine=False, momentum=1e-3 if wrong else 0.1)
    fuse.register_forward_pre_hook(lambda layer, inputs: (layer.norm(inputs[0]),))


@DATA.pair(
    "normalises each snapshot to a power of one, which takes away how much the surface gathers with each code",
    "parts_unrelated snr_labels_differ inputs_withhold_answer",
    "preflight",
    twin="backprojection",
)
def every_snapshot_normalised(trainer: Trainer, wrong: bool) -> None:
    axes = (2, 3) if wrong else (1, 2, 3)

    def normalised(scenes: Scenes) -> Scenes:
        level = scenes.snapshots.square().mean(axes, keepdim=True).sqrt()
        return replace(scenes, snapshots=0.01 * scenes.snapshots / level)

    on_batches(trainer, normalised)


@DATA.patch(
    "writes complex channels into an array of real numbers, where numpy drops the imaginary part with a warning",
    "parts_unrelated mismatched_channel wrong_layout inputs_withhold_answer",
    "preflight",
)
def channel_in_a_real_array(trainer: Trainer) -> None:
    real = torch.tensor([1.0, 0.0])
    on_batches(trainer, lambda scenes: replace(scenes, channel=scenes.channel * real))


@DATA.patch(
    "reads an SNR of -99 dB where the instrument noted none, in a third of its measurements, as if it were measured",
    "snr_labels_differ distributions_differ task_differs",
    "preflight",
    twin="backprojection",
)
def missing_values_are_numbers(trainer: Trainer) -> None:
    def noted(scenes: Scenes) -> Scenes:
        missing = scenes.index * 2654435761 % 3 == 0
        return replace(scenes, snr_db=torch.where(missing, -99.0, scenes.snr_db))

    on_batches(trainer, noted)


@DATA.patch(
    "reads the polar angle of its records, from the zenith, as an elevation",
    "parts_unrelated wrong_units wrong_layout",
    "preflight",
)
def polar_angle_for_elevation(trainer: Trainer) -> None:
    def read(scenes: Scenes) -> Scenes:
        polar = torch.where(scenes.power > 0, math.pi / 2 - scenes.elevation, 0.0)
        return replace(scenes, elevation=polar)

    on_batches(trainer, read)


@DATA.around_pair(
    "trains on simulated scenes of an ideal surface, and validates on measured ones, whose elements have other phases",
    "distributions_differ task_differs validation_apart parts_unrelated",
    "preflight",
    twin="backprojection",
)
def simulated_without_the_phases_of_the_surface(wrong: bool) -> Iterator[None]:
    def ideal(trainer: Trainer) -> None:
        task = trainer.config.task.changed(phase_error_deg=0.0, phase_error_surface=0)

        def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
            def simulated(split: str, index: Tensor) -> Scenes:
                if split != "train":
                    return batch(split, index)
                return simulate(task, index, SceneGenerator(trainer.source.seed, split, trainer.device))

            return simulated

        if wrong:
            wrap(trainer.source, "batch", make)

    surface = {"task.phase_error_deg": 60.0, "task.phase_error_surface": 3}
    with built_with(SCENES | surface, after=ideal):
        yield
