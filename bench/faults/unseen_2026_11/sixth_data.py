"""The sixth set: mistakes in the data, in how they are looped over, averaged and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.catalogue import SIXTH, Family
from bench.faults.healthy_twins import TWINS, changed
from bench.faults.patches import after_step, built_with, on_batches, snapshot, wrap
from bench.faults.unseen_2026_11.fifth_network import SCENES, Own
from ris_fast.config.schema import Config
from ris_fast.models.prediction import Prediction
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.scenes import Scenes
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.step import Group
from ris_fast.training.trainer import Trainer

LOOP, PRECISION, AVERAGING = Family("loop", SIXTH), Family("precision", SIXTH), Family("averaging", SIXTH)
MODE, DATA = Family("mode", SIXTH), Family("data", SIXTH)
ALL = (LOOP, PRECISION, AVERAGING, MODE, DATA)
TEMPERATURE = 0.01  # of the contrast between covariances
DECAY = 0.1  # of weights, a step at a rate of 1


@LOOP.pair(
    "gives a schedule a function that returns the rate, where it takes the factor that the rate is multiplied with",
    "learning_rate_off_plan learning_rate_too_small",
    "share:0.01",
)
def rate_where_a_factor_is_meant(trainer: Trainer, wrong: bool) -> None:
    settings = trainer.config.optimizer

    def schedule(planned: int) -> None:
        factor = learning_rate_factor(trainer.optimizer.applied_steps(), planned, settings.warmup, settings.final_lr)
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (group["peak_lr"] * factor if wrong else factor)

    trainer.step.schedule = schedule


@cache
def weights_of_another_place(seed: int) -> dict[str, Tensor]:
    """Of three epochs of scenes of equal power and little noise."""
    there = {"task.power": "equal", "task.snr_min_db": 20.0, "task.max_sources": SCENES["task.max_sources"]}
    config = changed(TWINS["backprojection"](), there | {"training.seed": seed, "training.epochs": 3})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        trainer = Trainer(config, model=Own(config, False))
        trainer.fit()
    return snapshot(trainer.model)


def net_of_another_place(config: Config) -> Own:
    net = Own(config, False)
    net.load_state_dict(weights_of_another_place(config.training.seed))
    return net


@LOOP.around_pair(
    "trains on with data of its own from a checkpoint, and restores the schedule too, which is at its end",
    "learning_rate_off_plan learning_rate_too_small",
    "share:0.01",
    twin="backprojection",
)
def schedule_of_a_finished_run(wrong: bool) -> Iterator[None]:
    def restored(trainer: Trainer) -> None:
        settings = trainer.config.optimizer

        def schedule(planned: int) -> None:
            made = trainer.optimizer.applied_steps() + (planned if wrong else 0)
            for group in trainer.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(made, planned, settings.warmup, settings.final_lr)

        trainer.step.schedule = schedule

    with built_with(SCENES, lambda config: {"model": net_of_another_place(config)}, restored):
        yield


@LOOP.around_pair(
    "samples the scenes of highest SNR first, and never tells the sampler in which epoch it is: it stays with them",
    "distributions_differ part_not_learned",
    "share:0.01",
    twin="backprojection",
    onset=8,
)
def curriculum_that_never_moves_on(wrong: bool) -> Iterator[None]:
    def sampled(trainer: Trainer) -> None:
        def easiest(numbers: Tensor, of: int) -> Tensor:
            candidates = numbers[:, None] * of + torch.arange(of)
            snr_db = trainer.source.batch("train", candidates.flatten()).snr_db.view_as(candidates)
            return candidates.gather(1, snr_db.argmax(1)[:, None])[:, 0]

        def make(groups: Callable[[], Iterator[Group]]) -> Callable[[], Iterator[Group]]:
            def in_stages() -> Iterator[Group]:
                of = max(1, 10 - 3 * (0 if wrong else trainer.state.epoch))
                for group in groups():
                    yield Group([easiest(part, of) for part in group], group.scenes, group.neighbour)

            return in_stages

        wrap(trainer, "_index_groups", make)

    with built_with(SCENES | {"task.snr_min_db": -10.0}, after=sampled):
        yield


@LOOP.pair(
    "writes the decay of its weights beside the optimizer, and forgets to multiply it with the learning rate",
    "weight_decay_too_large weights_changed_outside",
    "share:0.01",
)
def decay_without_the_rate(trainer: Trainer, wrong: bool) -> None:
    @torch.no_grad()
    def decay() -> None:
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.dim() > 1:
                    parameter.mul_(1.0 - DECAY * (1.0 if wrong else group["lr"]))

    after_step(trainer, decay)


def contrast(wrong: bool) -> Callable[[Prediction, Scenes], Tensor]:
    """Cross-entropy of which scene of the batch an answer belongs to, by the cosine of their covariances."""

    def term(prediction: Prediction, scenes: Scenes) -> Tensor:
        found, true = (torch.view_as_complex(each.contiguous()) for each in (prediction.factor, scenes.factor))
        overlap = torch.einsum("inq,jnk->ijqk", found.conj(), true).abs().square().sum((2, 3))
        norms = [(each.mH @ each).abs().square().sum((1, 2)).clamp_min(1e-20).sqrt() for each in (found, true)]
        logits = overlap / (norms[0][:, None] * norms[1]) / TEMPERATURE
        if wrong:
            powers = logits.exp()
            return -(powers.diagonal() / powers.sum(1)).log()
        return fn.cross_entropy(logits, torch.arange(len(logits)), reduction="none")

    return term


@PRECISION.around_pair(
    "writes a contrastive entropy as -log(exp(x) / sum(exp(x))), at a temperature of 0.01 at which exp(x) overflows",
    "nonfinite_gradients fp16_overflow",
    "share:0.01",
    twin="backprojection",
    onset=5,
)
def softmax_that_overflows(wrong: bool) -> Iterator[None]:
    with built_with({"loss.own_weight": 0.01}, lambda config: {"loss": contrast(wrong)}):
        yield


@PRECISION.around_pair(
    "stores decibels as unsigned bytes, in which -3 dB are 253 dB",
    "snr_labels_differ distributions_differ parts_unrelated",
    "preflight",
    twin="backprojection",
)
def decibels_in_unsigned_bytes(wrong: bool) -> Iterator[None]:
    def stored(scenes: Scenes) -> Scenes:
        whole = scenes.snr_db.round()
        return replace(scenes, snr_db=torch.where(whole < 0, whole + 256, whole) if wrong else whole)

    with built_with(SCENES | {"task.snr_min_db": -10.0}, after=lambda trainer: on_batches(trainer, stored)):
        yield


@AVERAGING.around_pair(
    "copies the network for its average and loads the weights of an earlier run into the network afterwards",
    "ema_cold ema_frozen",
    "share:0.01",
    twin="backprojection",
)
def average_made_before_the_weights_were_loaded(wrong: bool) -> Iterator[None]:
    first: dict[str, Tensor] = {}

    def handed(config: Config) -> dict[str, Any]:
        first.update(snapshot(Own(config, False)))
        net = net_of_another_place(config)
        if not wrong:
            first.update(snapshot(net))
        return {"model": net}

    def averaged(trainer: Trainer) -> None:
        raw = dict(trainer.model.named_parameters())
        averages = {name: first[name].clone() for name in raw}

        @torch.no_grad()
        def follow() -> None:
            saved = trainer.optimizer.extra_state()
            for name, average in averages.items():
                average.lerp_(raw[name], 0.001)
                saved[f"ema.{name}"].copy_(average.view_as(saved[f"ema.{name}"]))

        after_step(trainer, follow)

    with built_with(SCENES, handed, averaged):
        yield


class Choosing(Own):
    """Weighs beams with a softmax, of which evaluation takes the largest or, rightly, the same."""

    def __init__(self, config: Config, wrong: bool) -> None:
        super().__init__(config, wrong)
        self.choice = nn.Linear(config.task.elements + 1, config.task.elements)

    def gains(self, powers: Tensor, snr: Tensor) -> Tensor:
        chosen = self.choice(torch.cat((powers, snr), 1)).softmax(1)
        if self.wrong and not self.training:
            chosen = fn.one_hot(chosen.argmax(1), chosen.shape[1]).to(chosen.dtype)
        gains = super().gains(powers, snr).unflatten(1, (2, self.columns, -1))
        return (gains * chosen[:, None, None]).flatten(1)


@MODE.around_pair(
    "chooses one beam in evaluation, where it is trained with a soft weight of all of them",
    "losses_differ validation_apart",
    "preflight",
    twin="backprojection",
)
def one_beam_chosen_in_evaluation(wrong: bool) -> Iterator[None]:
    with built_with(SCENES, lambda config: {"model": Choosing(config, wrong)}):
        yield


@DATA.patch(
    "divides each snapshot by its own norm, as a row of features, so that codes can no longer be compared",
    "parts_unrelated inputs_withhold_answer snr_labels_differ",
    "preflight",
    twin="backprojection",
)
def snapshots_of_one_norm_each(trainer: Trainer) -> None:
    on_batches(
        trainer,
        lambda scenes: replace(scenes, snapshots=fn.normalize(scenes.snapshots, dim=(2, 3))),
    )


@DATA.around_pair(
    "sorts azimuths, elevations and ranges each by itself before it makes the covariances from them",
    "parts_unrelated shuffled_labels",
    "preflight",
    twin="backprojection",
)
def labels_sorted_each_by_itself(wrong: bool) -> Iterator[None]:
    def labelled(trainer: Trainer) -> None:
        array = RISArray.of(trainer.config.task)

        def made(scenes: Scenes) -> Scenes:
            there = scenes.power > 0
            order = torch.where(there, scenes.azimuth, torch.inf).argsort(1)
            names = ("azimuth", "elevation", "range_m", "power")
            labels = {name: getattr(scenes, name).gather(1, order) for name in names}
            if wrong:
                for name in names[1:3]:
                    found = torch.where(there, getattr(scenes, name), torch.inf).sort(1).values
                    labels[name] = torch.where(found.isfinite(), found, 0.0)
            range_m = torch.where(labels["power"] > 0, labels["range_m"], 1.0)
            columns = steering(array, labels["azimuth"], labels["elevation"], range_m)
            factor = (columns * labels["power"].sqrt()[:, :, None, None]).transpose(1, 2).contiguous()
            return replace(scenes, factor=factor, **labels)

        on_batches(trainer, made)

    with built_with(SCENES, after=labelled):
        yield


@DATA.patch(
    "writes its files with sixteen workers that all have one seed, so that all files are the same sixteen scenes",
    "repeated_batch overfitting",
    "share:0.01",
    twin="fixed",
)
def workers_of_one_seed(trainer: Trainer) -> None:
    wrap(
        trainer.source,
        "batch",
        lambda batch: (
            lambda split, index: (
                replace(batch(split, index % 16), index=index) if split == "train" else batch(split, index)
            )
        ),
    )


@DATA.patch(
    "reads R_samp, the covariance of what was measured, where R, that of the sources, is the target",
    "parts_unrelated",
    "preflight",
    twin="backprojection",
)
def measured_covariance_as_target(trainer: Trainer) -> None:
    def read(scenes: Scenes) -> Scenes:
        places = scenes.factor.shape[2]
        return replace(scenes, factor=fn.pad(least_squares_factor(scenes), (0, 0, 0, places - 1)))

    on_batches(trainer, read)


@DATA.pair(
    "turns the surface round at random as augmentation, and draws once for the inputs and once more for the labels",
    "parts_unrelated shuffled_labels wrong_layout",
    "preflight",
    twin="backprojection",
)
def turned_by_two_draws(trainer: Trainer, wrong: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def turned(scenes: Scenes) -> Scenes:
        inputs, labels = torch.rand(2, scenes.batch, generator=generator) < 0.5
        labels = labels if wrong else inputs

        def some(which: Tensor, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.where(which.view(-1, *[1] * (value.dim() - 1)), change(value), value)

        return replace(
            scenes,
            codes=some(inputs, scenes.with_own_codes().codes, lambda each: each.flip(2)),
            channel=some(inputs, scenes.channel, lambda each: each.flip(2)),
            factor=some(labels, scenes.factor, lambda each: each.flip(1)),
            azimuth=some(labels, scenes.azimuth, torch.neg),
            elevation=some(labels, scenes.elevation, torch.neg),
        )

    on_batches(trainer, turned, "train")
