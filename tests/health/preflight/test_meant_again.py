"""More of what is meant and looks like a mistake, and of mistakes that had another's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.patches import on_answer, on_batches
from ris_fast.health.preflight import gradient, modes, scene_gradients, unread
from ris_fast.health.preflight.distributions import distributions
from ris_fast.health.preflight.own_terms import own_term
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from ris_fast.training.validation import scene_nmse
from tests.health.preflight.checking import causes, small
from tests.health.preflight.test_own_networks import WIDTH, Tokens, attended, of

SETTINGS: dict[str, Any] = {
    "task.bs_antennas": 4,
    "task.ris_horizontal": 6,
    "task.ris_vertical": 5,
    "task.snapshots": 8,
    "training.batch_size": 256,
}


def _inexact_labels(scenes: Scenes) -> Scenes:
    noise = torch.randn(scenes.batch, generator=torch.Generator().manual_seed(int(scenes.index.sum())))
    return replace(scenes, snr_db=scenes.snr_db + 1.5 * noise)


def _tenth_of_another(scenes: Scenes) -> Scenes:
    mixed = (scenes.index % 10 == 0).view(-1, 1, 1, 1)
    return replace(scenes, factor=torch.where(mixed, scenes.factor.roll(1, 0), scenes.factor))


@pytest.mark.parametrize(
    "change, named",
    [
        (_inexact_labels, []),
        (lambda scenes: replace(scenes, snr_db=scenes.snr_db + 6.0), ["snr_labels_differ"]),
        (_tenth_of_another, ["parts_unrelated"]),
    ],
    ids=["inexact labels", "6 dB too high", "other targets"],
)
def test_snr_labels_that_are_all_off_by_the_same_are_named_as_such(
    change: Callable[[Scenes], Scenes], named: list[str]
) -> None:
    trainer = Trainer(small("hybrid", **SETTINGS))
    on_batches(trainer, change)
    found = list(physics(PreflightContext(trainer)))
    assert [each.cause for each in found] == named
    assert all(each.certain for each in found)


def _bank(first: int, size: int, gain: float = 1.0, mean: float = 0.0) -> Callable[[Scenes], Scenes]:
    """Scenes with one of a few channels that were measured."""

    def change(scenes: Scenes) -> Scenes:
        channels = torch.randn(50, *scenes.channel.shape[1:], generator=torch.Generator().manual_seed(9))
        return replace(scenes, channel=gain * channels[first + scenes.index.cpu() % size] + mean)

    return change


@pytest.mark.parametrize(
    "channels, named",
    [
        (_bank(30, 10), []),
        (_bank(30, 3), []),
        (_bank(30, 10, gain=1.6), ["distributions_differ"]),
        (_bank(30, 10, mean=0.5), ["distributions_differ"]),
    ],
    ids=["ten others", "three others", "louder", "with a mean"],
)
def test_a_few_measured_channels_differ_between_splits(channels: Callable[[Scenes], Scenes], named: list[str]) -> None:
    trainer = Trainer(small("backprojection", **SETTINGS))
    on_batches(trainer, _bank(0, 30))
    on_batches(trainer, channels, "val")
    assert causes(distributions, trainer) == named


def _places_from_zero(net: Tokens, learned: bool) -> None:
    net.place = nn.Parameter(torch.zeros_like(net.place), requires_grad=learned)


@pytest.mark.parametrize(
    "learned, mix, named",
    [
        (True, lambda net, x: attended(net, x).mean(1), []),
        (False, lambda net, x: attended(net, x).mean(1), ["inputs_withhold_answer"]),
        (True, lambda net, x: attended(net, x - net.place).mean(1), ["inputs_withhold_answer"]),
    ],
    ids=["learned", "fixed", "taken out again"],
)
def test_an_embedding_of_places_may_start_at_zero(learned: bool, mix: Callable, named: list[str]) -> None:
    trainer = of(mix, lambda net: _places_from_zero(net, learned))
    assert causes(unread.CHECKS["the network knows which place is which"], trainer) == named


def _experts(net: Tokens, x: Tensor, told: slice) -> Tensor:
    x = x.mean(1)
    gates = net.linear(x)[:, :4].softmax(1)
    rows = torch.arange(len(x))
    gates = torch.where((rows < len(rows[told]))[:, None], gates, gates.detach())
    return x + sum(gates[:, k : k + 1] * layer(x).tanh() for k, layer in enumerate(net.deep[:4]))


@pytest.mark.parametrize("told, named", [(slice(None), []), (slice(0, 4), ["scenes_left_out"])], ids=["all", "four"])
def test_experts_may_start_as_copies(told: slice, named: list[str]) -> None:
    def start(net: Tokens) -> None:
        for layer in net.deep[1:4]:
            layer.load_state_dict(net.deep[0].state_dict())

    trainer = of(lambda net, x: _experts(net, x, told), start)
    assert causes(scene_gradients.SMALL_BATCH["every scene is learned from"], trainer) == named


@pytest.mark.parametrize(
    "drawn, named",
    [
        (lambda x: x.flip(1) if torch.rand(()) < 0.7 else x, []),
        (lambda x: x.flip(1) if torch.rand(()) < 0.7 else x[:1].expand_as(x), ["heavy_dropout"]),
        (lambda x: x + 3 * x.std() * torch.randn_like(x), ["heavy_dropout"]),
    ],
    ids=["a mirror image", "or of another scene", "noise"],
)
def test_a_choice_among_a_few_ways_to_answer_is_no_dropout(drawn: Callable, named: list[str]) -> None:
    trainer = Trainer(small("hybrid"))
    on_answer(trainer, lambda factor: drawn(factor) if trainer.model.training else factor)
    found = list(modes.randomness(PreflightContext(trainer)))
    assert [each.cause for each in found if each.cause == "heavy_dropout"] == named
    assert all("no layer is a dropout" in each.evidence for each in found if each.cause == "heavy_dropout")


@pytest.mark.parametrize("largest, share, named", [(True, 2, []), (False, 2, ["scenes_left_out"])])
def test_a_loss_of_hard_examples_alone_is_meant(largest: bool, share: int, named: list[str]) -> None:
    def mined(prediction: Prediction, scenes: Scenes) -> Tensor:
        values = scene_nmse(prediction, scenes)
        return values.topk(max(1, len(values) // share), largest=largest).values.mean()

    trainer = Trainer(small("backprojection", **{"loss.cov": 0.0, "loss.cov_pred": 0.0}), loss=mined)
    assert causes(scene_gradients.scenes_learned_from, trainer) == named


@pytest.mark.parametrize(
    "mix, named",
    [
        (lambda net, x: x + fn.linear(x, net.energy.weight), []),
        (lambda net, x: x + 0 * net.energy(x.detach()).detach(), ["unused_head"]),
    ],
    ids=["its constant", "all of it"],
)
def test_a_constant_that_a_derivative_leaves_out_is_no_head(mix: Callable, named: list[str]) -> None:
    def start(net: Tokens) -> None:
        net.energy = nn.Linear(WIDTH, 1)
        net.query, net.place = None, nn.Parameter(net.place.detach())
        net.attention = net.recurrent = net.linear = net.deep = None

    assert causes(gradient.CHECKS["every tensor gets a gradient"], of(mix, start)) == named


def _covariances_apart(prediction: Prediction, scenes: Scenes, transposed: bool, sign: float = 1.0) -> Tensor:
    found, true = (to_complex(each) for each in (prediction.factor, scenes.factor))
    found, true = (each / each.flatten(1).norm(dim=1).view(-1, 1, 1) for each in (found, true))
    wanted = true @ (true.mT if transposed else true.mH)
    return sign * (found @ found.mH - wanted).abs().square().sum((1, 2))


@pytest.mark.parametrize(
    "transposed, sign, named",
    [(False, 1.0, []), (True, 1.0, ["conjugation_error"]), (False, -1.0, ["loss_sign"])],
    ids=["right", "transposed", "negated"],
)
def test_a_transpose_in_an_own_term_is_no_sign(transposed: bool, sign: float, named: list[str]) -> None:
    term = partial(_covariances_apart, transposed=transposed, sign=sign)
    assert causes(own_term, Trainer(small("backprojection"), loss=term)) == named
