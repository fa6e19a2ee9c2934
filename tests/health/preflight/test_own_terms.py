"""Terms of the loss of one's own: with a memory, with weights of their own, with a wrong sign, in other units."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as fn

from bench.faults.patches import wrap
from ris_fast.health.preflight import own_terms, terms
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.reach import output_reach
from ris_fast.health.preflight.run import run_checks
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small


class Queue:
    """The answers of the last batch are negatives of the next one."""

    def __init__(self) -> None:
        self.kept: deque[torch.Tensor] = deque(maxlen=2)

    def __call__(self, prediction: Prediction, scenes: Scenes) -> torch.Tensor:
        answers, wanted = (fn.normalize(each.factor.square().sum((2, 3)), dim=1) for each in (prediction, scenes))
        logits = 10 * answers @ torch.cat((wanted, *self.kept)).T
        self.kept.append(answers.detach())
        return fn.cross_entropy(logits, torch.arange(len(answers)), reduction="none")


def correlation(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    found, wanted = (torch.view_as_complex(each.factor.contiguous()) for each in (prediction, scenes))
    sizes = [(each.mH @ each).abs().square().sum((1, 2)) for each in (found, wanted)]
    return 1 - (found.mH @ wanted).abs().square().sum((1, 2)) / (sizes[0] * sizes[1]).sqrt()


def by_its_mean(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    value = correlation(prediction, scenes)
    by_its_mean.mean = 0.9 * getattr(by_its_mean, "mean", value.mean().detach()) + 0.1 * value.mean().detach()
    return value / by_its_mean.mean


def by_its_own(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    value = correlation(prediction, scenes)
    return value / value.detach()


def size_stopped(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    size = prediction.factor.square().sum((1, 2, 3), keepdim=True)
    overlap = (1 - correlation(prediction, scenes)) * size.flatten()
    return 1 - overlap / size.detach().flatten()


@pytest.mark.parametrize(
    "term", [Queue(), by_its_mean, by_its_own, correlation], ids=["queue", "by its mean", "by its own", "correlation"]
)
def test_a_term_with_a_memory_or_a_weight_of_its_own_passes_and_begins_the_run_as_it_was(term: Any) -> None:
    trainer = Trainer(small("backprojection", **{"loss.own_weight": 0.1}), loss=term)
    results = run_checks(trainer)
    wrong = {"wrong_backward", "losses_differ", "dead_loss_term", "stale_cache", "shapes_broadcast"}
    assert not wrong & {each.cause for result in results for each in result.findings}
    assert not any(result.failed for result in results)
    assert not vars(term).get("kept") and "mean" not in vars(term)


def test_a_normaliser_that_is_detached_is_named() -> None:
    trainer = Trainer(small("backprojection", **{"loss.own_weight": 0.1}), loss=size_stopped)
    assert [each.cause for each in terms.each_term(PreflightContext(trainer))] == ["wrong_backward"]


@pytest.mark.parametrize("turned, named", [(lambda value: value, []), (lambda value: 1 - value, ["loss_sign"])])
def test_a_similarity_that_is_minimised_is_named_also_where_it_weighs_little(turned: Any, named: list[str]) -> None:
    term = lambda prediction, scenes: turned(correlation(prediction, scenes))  # noqa: E731
    term.__name__ = "similarity"
    trainer = Trainer(small("backprojection", **{"loss.own_weight": 0.02}), loss=term)
    assert [each.cause for each in own_terms.own_term(PreflightContext(trainer))] == named


def in_degrees(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    there = scenes.power > 0
    return (there * (prediction.azimuth - torch.rad2deg(scenes.azimuth)).square()).sum(1) / there.sum(1)


def with_padding(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    return (prediction.azimuth - scenes.azimuth).square().sum(1)


def to_the_middle(prediction: Prediction, scenes: Scenes) -> torch.Tensor:
    return prediction.azimuth.square().sum(1)


@pytest.mark.parametrize(
    "term, named", [(in_degrees, "wrong_units"), (with_padding, "target_scale_differs"), (to_the_middle, None)]
)
def test_a_term_of_places_is_named_by_its_unit_and_by_its_padding(term: Any, named: str | None) -> None:
    trainer = Trainer(small("hybrid", **{"loss.own_weight": 0.1, "loss.angle": 0.01}), loss=term)
    assert [each.cause for each in own_terms.own_term(PreflightContext(trainer))] == [named] * bool(named)


@pytest.mark.parametrize("limit, named", [(60.0, ["wrong_units"]), (math.pi, []), (math.pi / 3, [])])
def test_angles_that_are_held_at_many_turns_are_in_degrees(limit: float, named: list[str]) -> None:
    trainer = Trainer(small("hybrid", **{"loss.angle": 0.01}))
    held = lambda answer: answer._replace(azimuth=limit * torch.tanh(answer.azimuth))  # noqa: E731
    wrap(trainer.step, "predict", lambda predict: lambda scenes: held(predict(scenes)))
    assert [each.cause for each in output_reach(PreflightContext(trainer))] == named


def test_angles_that_nothing_holds_are_in_no_unit() -> None:
    """Large as they are behind inputs in a unit of their own."""
    trainer = Trainer(small("hybrid", **{"loss.angle": 0.01}))
    free = lambda answer: answer._replace(azimuth=1e4 * answer.azimuth.tan())  # noqa: E731
    wrap(trainer.step, "predict", lambda predict: lambda scenes: free(predict(scenes)))
    assert "wrong_units" not in [each.cause for each in output_reach(PreflightContext(trainer))]


def test_a_layer_that_a_term_shares_with_the_network_is_left_to_the_checks() -> None:
    trainer = Trainer(small("backprojection", **{"loss.own_weight": 0.1}), loss=correlation)
    layer = next(module for module in trainer.model.modules() if isinstance(module, nn.Linear))
    trainer.loss.own = lambda prediction, scenes: correlation(prediction, scenes) + 1e-3 * layer.weight.square().mean()
    found = [each.cause for result in run_checks(trainer) for each in result.findings]
    assert "weights_changed_outside" not in found
