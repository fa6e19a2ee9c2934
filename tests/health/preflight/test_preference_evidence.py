"""Losses that do not prefer the truth, scenes from which something was taken, inputs that are read in part, averages
that keep nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.faults.patches import after_step, on_batches
from ris_fast.config.schema import Task
from ris_fast.health.preflight import preference
from ris_fast.health.preflight.dependent import removed
from ris_fast.health.preflight.inputs import information
from ris_fast.health.preflight.preference import own_term
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.health.preflight.truth import truth
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small

Term = Callable[[Prediction, Scenes], Tensor]


def covariance(factor: Tensor) -> Tensor:
    """R = F F^H of trace N, complex (B, N, N)."""
    made = to_complex(factor) @ to_complex(factor).mH
    trace = torch.diagonal(made.real, dim1=1, dim2=2).sum(1).clamp_min(1e-12)
    return made * (made.shape[1] / trace)[:, None, None]


def error(found: Tensor, true: Tensor) -> Tensor:
    return (found - true).abs().square().sum((1, 2)) / true.abs().square().sum((1, 2))


def likeness(prediction: Prediction, scenes: Scenes) -> Tensor:
    found, true = covariance(prediction.factor), covariance(scenes.factor)
    return (found.conj() * true).real.sum((1, 2)) / (
        found.abs().square().sum((1, 2)) * true.abs().square().sum((1, 2))
    ).sqrt()


def with_own(term: Term) -> Trainer:
    """A trainer whose only covariance term is one of the user's own."""
    settings = {f"loss.{name}": 0.0 for name in ("cov", "cov_pred", "orthogonality", "cross", "subspace")}

    def own(prediction: Prediction, scenes: Scenes) -> Tensor:
        return term(prediction, scenes)

    return Trainer(small("backprojection", **settings), loss=own)


@pytest.mark.parametrize(
    "term, cause",
    [
        (likeness, "loss_sign"),
        (lambda p, s: error(covariance(p.factor), covariance(s.factor).mT), "conjugation_error"),
        (lambda p, s: error(covariance(p.factor).abs(), covariance(s.factor).abs()), "conjugation_error"),
        (lambda p, s: error(covariance(p.factor), covariance(s.factor).roll(1, 0)), "shuffled_labels"),
        (lambda p, s: error(covariance(p.factor).mean(0)[None], covariance(s.factor).mean(0)[None])[0], "scenes_mixed"),
        (
            lambda p, s: torch.diagonal((covariance(p.factor) - covariance(s.factor)).abs(), dim1=1, dim2=2).sum(1),
            "dead_loss_term",
        ),
    ],
    ids=["similarity", "transposed", "magnitudes", "rolled", "mean first", "diagonal"],
)
def test_a_term_of_ones_own_that_does_not_prefer_the_truth_is_named(term: Term, cause: str) -> None:
    (finding,) = own_term(PreflightContext(with_own(term)))
    assert finding.cause == cause and not finding.certain


@pytest.mark.parametrize(
    "term",
    [
        lambda p, s: error(covariance(p.factor), covariance(s.factor)),
        lambda p, s: -likeness(p, s),
        lambda p, s: (error(covariance(p.factor), covariance(s.factor)) + 1e-6).log(),
        lambda p, s: 3 * error(covariance(p.factor), covariance(s.factor)) - 10,
        lambda p, s: torch.linalg.eigvalsh(covariance(p.factor) - covariance(s.factor)).abs().sum(1),
    ],
    ids=["nmse", "minus similarity", "logarithm", "shifted", "trace norm"],
)
def test_a_term_of_ones_own_that_prefers_the_truth_is_left_alone(term: Term) -> None:
    assert causes(own_term, with_own(term)) == []


@pytest.mark.parametrize(
    "nmse, cause",
    [
        (lambda f, s: error(to_complex(f) @ to_complex(f).mT, covariance(s.factor)), "conjugation_error"),
        (lambda f, s: error(covariance(f), covariance(s.factor)).clamp_min(0.4), "clamped_loss"),
        (lambda f, s: error(covariance((4 * f).round()), covariance(s.factor)), "non_differentiable"),
        (lambda f, s: error(100 * to_complex(f) @ to_complex(f).mH, covariance(s.factor)), "target_scale_differs"),
        (lambda f, s: error(covariance(f).mean(0)[None], covariance(s.factor).mean(0)[None]), "scenes_mixed"),
    ],
    ids=["transpose", "held above", "rounded", "not normalised", "mean first"],
)
def test_why_the_loss_misjudges_the_truth_is_told_by_what_changes_its_score(nmse: Any, cause: str) -> None:
    trainer = Trainer(small("backprojection"))
    trainer.loss.nmse = lambda factor, scenes, *, blend: nmse(factor, scenes).expand(scenes.batch)
    assert causes(truth, trainer)[0] == cause


def test_a_loading_that_outweighs_the_covariance_is_named_and_a_small_one_is_not() -> None:
    assert causes(preference.settings, Trainer(small("hybrid", **{"loss.loading": 1e4}))) == ["epsilon_swallows_signal"]
    assert causes(preference.settings, Trainer(small("hybrid", **{"loss.loading": 1e-2, "loss.beta": 0.2}))) == []


def projected(scenes: Scenes) -> Scenes:
    u, values, v = torch.linalg.svd(to_complex(scenes.snapshots), full_matrices=False)
    values[:, 4:] = 0
    return replace(scenes, snapshots=torch.view_as_real((u * values[:, None]) @ v))


@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda s: replace(s, snapshots=s.snapshots - s.snapshots.mean(1, keepdim=True)), "inputs_withhold_answer"),
        (lambda s: replace(s, snapshots=s.snapshots[:, torch.arange(8) // 2]), "inputs_withhold_answer"),
        (lambda s: replace(s, snapshots=s.snapshots * (torch.arange(8) < 6)[:, None]), "inputs_withhold_answer"),
        (projected, "inputs_withhold_answer"),
        (lambda s: replace(s, snapshots=s.snapshots * torch.tensor((1.0, 0.0))), "inputs_withhold_answer"),
        (lambda s: replace(s, channel=s.channel - s.channel.mean(2, keepdim=True)), "mismatched_channel"),
    ],
    ids=["mean", "repeated", "antennas of zeros", "projected", "real parts", "mean of the channel"],
)
def test_what_was_taken_out_of_all_scenes_is_seen_by_what_is_exactly_zero(change: Any, cause: str) -> None:
    trainer = Trainer(small("backprojection"))
    on_batches(trainer, change)
    (finding,) = removed(PreflightContext(trainer))
    assert finding.cause == cause and finding.certain


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, snapshots=s.snapshots.half().float()),
        lambda s: replace(s, snapshots=s.snapshots / s.snapshots.flatten(1).norm(dim=1).view(-1, 1, 1, 1)),
        lambda s: replace(s, snapshots=1e-6 * s.snapshots, channel=1e3 * s.channel),
    ],
    ids=["16 bits", "normalised", "other units"],
)
def test_scenes_of_which_nothing_is_missing_are_left_alone(change: Any) -> None:
    trainer = Trainer(small("backprojection"))
    on_batches(trainer, change)
    assert causes(removed, trainer) == []


class Mixing(nn.Module):
    """A perceptron on H^H y of some snapshots."""

    def __init__(self, task: Task, shown: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shown, self.shape = shown, (task.elements, 2 * task.max_sources, 2)
        inputs = torch.zeros(1, task.snapshots, task.elements)
        self.layer = nn.Linear(2 * shown(inputs).numel(), math.prod(self.shape))

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Tensor:
        field = torch.einsum("bmn,blm->bln", to_complex(channel).conj(), to_complex(snapshots))
        seen = torch.view_as_real(self.shown(field)).flatten(1)
        return self.layer(seen / seen.square().mean(1, keepdim=True).sqrt()).unflatten(1, self.shape)


@pytest.mark.parametrize(
    "shown, named",
    [
        (lambda field: field[:, :1], True),
        (lambda field: field.mean(1), True),
        (lambda field: field, False),
    ],
    ids=["the first snapshot", "their mean", "all"],
)
def test_a_network_that_reads_a_part_of_the_snapshots_is_named(shown: Any, named: bool) -> None:
    config = small("backprojection")
    trainer = Trainer(config, model=Mixing(config.task, shown))
    assert causes(information, trainer) == named * ["inputs_withhold_answer"]


class Blind(Mixing):
    """It is not shown the channel."""

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Tensor:
        known = torch.randn(channel.shape[1:], generator=torch.Generator().manual_seed(5))
        return super().forward(snapshots, known.to(channel).expand_as(channel), codes, snr_db)


@pytest.mark.parametrize("network, named", [(Mixing, False), (Blind, True)])
def test_one_channel_for_all_scenes_need_not_be_seen(network: type[Mixing], named: bool) -> None:
    config = small("backprojection")
    trainer = Trainer(config, model=network(config.task, lambda field: field))
    assert causes(information, trainer) == named * ["inputs_withhold_answer"]
    on_batches(trainer, lambda s: replace(s, channel=s.channel[:1].expand_as(s.channel)))
    assert causes(information, trainer) == []


def test_an_average_whose_decay_is_exchanged_is_nearly_the_raw_weights() -> None:
    trainer, kept = Trainer(small("hybrid")), {}

    @torch.no_grad()
    def follow() -> None:
        state = trainer.optimizer.extra_state()
        for name, parameter in trainer.model.named_parameters():
            before = kept.get(name, parameter.detach().clone())
            kept[name] = 1e-3 * before + (1 - 1e-3) * parameter.detach()
            state[f"ema.{name}"].copy_(kept[name].view_as(state[f"ema.{name}"]))

    after_step(trainer, follow)
    assert causes(several_steps, trainer) == ["ema_equals_raw"]
    assert causes(several_steps, Trainer(small("hybrid"))) == []
