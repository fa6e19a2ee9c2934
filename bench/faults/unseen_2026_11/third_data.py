"""The third set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.faults.catalogue import THIRD, Family
from bench.faults.patches import LABELS, after_step, model_with, on_batches, snapshot, wrap
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import network_inputs
from ris_fast.training.trainer import Trainer

LOOP, PRECISION, AVERAGING = Family("loop", THIRD), Family("precision", THIRD), Family("averaging", THIRD)
MODE, DATA = Family("mode", THIRD), Family("data", THIRD)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)


@LOOP.pair(
    "looks ahead: every fifth step it goes a share of the way from its slow weights, and takes a per cent for a half",
    "weights_reset weights_changed_outside",
    "share:0.01",
    onset=5,
)
def lookahead_goes_nowhere(trainer: Trainer, wrong: bool) -> None:
    slow, made = snapshot(trainer.model), 0

    @torch.no_grad()
    def look() -> None:
        nonlocal made
        made += 1
        if made % 5 == 0:
            for name, parameter in trainer.model.named_parameters():
                slow[name].lerp_(parameter, 0.005 if wrong else 0.5)
                parameter.copy_(slow[name])

    after_step(trainer, look)


@LOOP.pair(
    "searches for a learning rate with the network itself, and trains on from where the largest rate left it",
    "bad_initialisation saturated_output dead_units",
    "preflight",
)
def left_by_the_range_test(trainer: Trainer, wrong: bool) -> None:
    model = deepcopy(trainer.model)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for number in range(30):
        optimizer.param_groups[0]["lr"] = 1e-4 * 10.0 ** (number / 5.0)
        scenes = trainer.source.batch("train", 32 * number + torch.arange(32))
        optimizer.zero_grad()
        trainer.loss(model(*network_inputs(scenes)), scenes)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if wrong:
        trainer.model.load_state_dict(model.state_dict())


@PRECISION.patch(
    "numbers of scenes pass through bfloat16 on their way to the labels: above 256 several are one",
    "shuffled_labels parts_unrelated",
    "share:0.01",
    onset=8,
)
def scene_numbers_in_bfloat16(trainer: Trainer) -> None:
    def make(batch: Callable[..., Scenes]) -> Callable[..., Scenes]:
        def rounded(split: str, index: Tensor) -> Scenes:
            labels = batch(split, index.bfloat16().long())
            return replace(batch(split, index), **{name: getattr(labels, name) for name in LABELS})

        return rounded

    wrap(trainer.source, "batch", make)


@PRECISION.patch(
    "keeps the second moments in half precision, where squares of small gradients are zero",
    "learning_rate_too_large gradient_underflow nonfinite_step",
    "steps:5",
)
def second_moments_in_half(trainer: Trainer) -> None:
    @torch.no_grad()
    def stored() -> None:
        for state in trainer.optimizer.state.values():
            state["exp_avg_sq"].copy_(state["exp_avg_sq"].half())

    after_step(trainer, stored)


@AVERAGING.pair(
    "pairs weights and averages by their place in two lists, of which one has two layers the other way round",
    "ema_frozen",
    "share:0.01",
)
def averages_of_two_layers_swapped(trainer: Trainer, wrong: bool) -> None:
    layers = ["angle_factor", "range_factor"]
    pairs = dict(zip(layers, reversed(layers))) if wrong else {}
    averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def follow() -> None:
        raw = dict(trainer.model.named_parameters())
        for key, value in trainer.optimizer.extra_state().items():
            layer, _, rest = key.removeprefix("ema.").partition(".")
            now = raw.get(f"{pairs.get(layer, layer)}.{rest}")
            if now is not None:
                averages.setdefault(key, now.detach().clone()).lerp_(now.detach(), 0.03)
                value.copy_(averages[key].view_as(value))

    after_step(trainer, follow)


@MODE.pair(
    "augments all splits alike, so that each validation scene lies under a mask as well",
    "scenes_change train_mode_in_validation",
    "share:0.01",
    twin="few_codes",
)
def validation_augmented_too(trainer: Trainer, wrong: bool) -> None:
    def masked(scenes: Scenes) -> Scenes:
        kept = torch.rand(scenes.batch, 1, scenes.snapshots.shape[2], 1) < 0.5
        return replace(scenes, snapshots=scenes.snapshots * kept)

    on_batches(trainer, masked, None if wrong else "train")


@MODE.around(
    "adds in evaluation the answer to the mirrored scene, and does not mirror it back",
    "losses_differ validation_apart",
    "preflight",
    twin="backprojection",
)
def mirrored_answer_not_mirrored_back() -> Iterator[None]:
    def change(model: nn.Module) -> None:
        whole = type(model)

        def trunk(self: nn.Module, features: object) -> Prediction:
            prediction = whole.trunk(self, features)
            if self.training:
                return prediction
            return prediction._replace(factor=torch.cat((prediction.factor, prediction.factor.flip(1)), 2))

        model.__class__ = type(whole.__name__, (whole,), {"trunk": trunk})

    with model_with(change):
        yield


@DATA.pair(
    "turns the surface round as augmentation: channel and target, and not the codes",
    "parts_unrelated wrong_layout",
    "preflight",
    twin="few_codes",
)
def codes_not_turned_with_the_surface(trainer: Trainer, wrong: bool) -> None:
    def turned(scenes: Scenes) -> Scenes:
        own = scenes.with_own_codes()
        some = scenes.index % 2 == 0

        def half(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.where(some.view(-1, *[1] * (value.dim() - 1)), change(value), value)

        return replace(
            scenes,
            codes=scenes.codes if wrong else half(own.codes, lambda each: each.flip(2)),
            channel=half(scenes.channel, lambda each: each.flip(2)),
            factor=half(scenes.factor, lambda each: each.flip(1)),
            azimuth=half(scenes.azimuth, torch.neg),
            elevation=half(scenes.elevation, torch.neg),
        )

    on_batches(trainer, turned, "train")


DATA.setting(
    "scenes_of_a_smoke_test",
    "kept the number of training scenes of a smoke test",
    "overfitting validation_apart repeated_batch",
    "steps:240",
    {"data.train_scenes": 32},
    twin="fixed",
)


DATA.setting(
    "antennas_of_one_place",
    "draws a channel with a function of one's own, whose antennas all stand in one place: the channel has rank one",
    "inputs_withhold_answer",
    "preflight",
    {"task.channel": f"{Path(__file__).with_name('third_channel.py')}:one_place"},
    twin="few_codes",
)
