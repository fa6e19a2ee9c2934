"""What a network shows before the first step: what it can reach, its modes, its epsilons, and scenes that it mixes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.patches import before_step, gradients, on_answer, on_output, rebound, wrap
from ris_fast.health.preflight import overfit
from ris_fast.health.preflight.inputs import reads_scenes
from ris_fast.health.preflight.modes import randomness
from ris_fast.health.preflight.norms import between_layers, epsilons
from ris_fast.health.preflight.overfit import overfit_batch
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.reach import output_reach
from ris_fast.health.preflight.restore import preserve_state
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small
from tests.health.preflight.test_scene_evidence import said


def network(twin: str = "backprojection", **settings: Any) -> Trainer:
    return Trainer(small(twin, **settings))


def with_norm(norm: nn.Module) -> Trainer:
    trainer = network()
    trainer.model.norm = norm
    return trainer


# ---- what the output can reach
# ----------------------------------------------------------------------------------------


def complex_of(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda factor: torch.view_as_real(change(torch.view_as_complex(factor.contiguous())))


LIMITED = {
    "imaginary part of zero": lambda factor: factor * torch.tensor((1.0, 0.0)),
    "one phase": lambda factor: factor[..., :1].expand_as(factor),
    "never negative": fn.softplus,
    "real part never negative": lambda factor: torch.stack((factor[..., 0].relu(), factor[..., 1]), -1),
    "one element of zero": lambda factor: factor * (torch.arange(factor.shape[1]) > 0)[:, None, None],
}
FREE = {
    "phase fixed at an element": complex_of(lambda f: f * (f[:, :1] / f[:, :1].abs().clamp_min(1e-9)).conj()),
    "lower triangle": lambda factor: factor * torch.ones(factor.shape[1:3]).tril()[..., None],
    "amplitude and phase": complex_of(lambda f: torch.polar(f.real.exp(), f.imag)),
    "elements of one size": complex_of(lambda f: f / f.abs().clamp_min(1e-9)),
    "bounded": torch.tanh,
}


@pytest.mark.parametrize("change", [*LIMITED, *FREE])
def test_output_reach_tells_limits_from_freedom(change: str) -> None:
    trainer = network()
    on_answer(trainer, LIMITED.get(change) or FREE[change])
    assert said(output_reach, trainer) == ([("limited_output", True)] if change in LIMITED else [])


def test_output_reach_names_places_beyond_an_end() -> None:
    trainer = network("hybrid")
    assert said(output_reach, trainer) == []
    wrap(
        trainer.model,
        "trunk",
        lambda trunk: (
            lambda given: (lambda guess: guess._replace(range_m=2 * torch.sigmoid(guess.range_m)))(trunk(given))
        ),
    )
    rebound(trainer)
    assert said(output_reach, trainer) == [("limited_output", False)]


# ---- epsilons
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, expected",
    [
        (lambda: nn.LayerNorm(32, eps=1e5), [("epsilon_swallows_signal", True)]),
        (lambda: nn.BatchNorm1d(32, eps=1e5), [("epsilon_swallows_signal", True)]),
        (lambda: nn.RMSNorm(32, eps=1.0), [("epsilon_swallows_signal", False)]),
        (lambda: nn.LayerNorm(32, eps=1e-2), []),
        (lambda: nn.BatchNorm1d(32), []),
        (lambda: nn.RMSNorm(32), []),
        (lambda: nn.GroupNorm(4, 32), []),
        (nn.Identity, []),
    ],
)
def test_epsilons_are_held_to_what_they_are_added_to(norm: Any, expected: list) -> None:
    assert said(epsilons, with_norm(norm())) == expected


def test_epsilons_are_silent_about_a_layer_of_zeros() -> None:
    trainer = network()
    nn.init.zeros_(trainer.model.stem.weight)
    nn.init.zeros_(trainer.model.stem.bias)
    assert said(epsilons, trainer) == []


class Behind(nn.Module):
    """A layer behind a function that is no layer."""

    def __init__(self, change: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.change, self.layer = change, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.change(x))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x: x / (x.std(1, keepdim=True) + 1e4), [("epsilon_swallows_signal", False)]),
        (lambda x: x / (x.std(1, keepdim=True) + 1e-5), []),
        (lambda x: 1e-4 * x, []),
        (lambda x: 1e-4 * x.tanh(), []),
    ],
)
def test_between_layers_names_a_constant_that_no_module_has(change: Any, expected: list) -> None:
    trainer = network()
    trainer.model.head = Behind(change, trainer.model.head)
    assert said(between_layers, trainer) == expected


# ---- modes
# ------------------------------------------------------------------------------------------------------------


class Stuck(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> Stuck:
        return super().train(True)


class MonteCarlo(nn.Dropout):
    """Dropout that stays on, so that several answers tell how sure the network is."""

    def train(self, mode: bool = True) -> MonteCarlo:
        return super().train(True)


class Settled(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> Settled:
        return super().train(False)


def _remembers(trainer: Trainer) -> None:
    calls = iter(range(10**6))
    on_output(trainer.model.norm, lambda x: x + 0.1 * next(calls))


def _draws(draw: Callable[[Tensor], Tensor]) -> Callable[[Trainer], None]:
    return lambda trainer: on_output(trainer.model.norm, lambda x: x + draw(x))


def _doubles(trainer: Trainer) -> None:
    on_output(trainer.model.norm, lambda x: 2 * x if trainer.model.norm.training else x)


def _updates_in_evaluation(trainer: Trainer) -> None:
    trainer.model.norm.register_buffer("mean", torch.zeros(32))

    def follow(x: Tensor) -> Tensor:
        trainer.model.norm.mean.lerp_(x.detach().square().mean(0), 0.1)
        return x + trainer.model.norm.mean

    on_output(trainer.model.norm, follow)


@pytest.mark.parametrize(
    "change, cause, seen",
    [
        (_draws(lambda x: 0.3 * torch.randn_like(x)), "train_mode_in_validation", "beginning in 'norm'"),
        (
            _draws(lambda x: 0.3 * torch.from_numpy(np.random.standard_normal(x.shape)).float()),
            "train_mode_in_validation",
            "Python's and numpy's",
        ),
        (_remembers, "train_mode_in_validation", "a state that is kept"),
        (_updates_in_evaluation, "unsettled_buffers", "norm.mean"),
        (_doubles, "losses_differ", "'norm' by"),
    ],
    ids=["torch draws", "numpy draws", "remembers", "updates in evaluation", "a branch"],
)
def test_randomness_names_what_makes_answers_differ(change: Any, cause: str, seen: str) -> None:
    trainer = network()
    change(trainer)
    finding = next(iter(randomness(PreflightContext(trainer))))
    assert finding.cause == cause and seen in finding.evidence


@pytest.mark.parametrize(
    "norm, expected",
    [
        (lambda: Stuck(32), [("train_mode_in_validation", True)]),
        (lambda: MonteCarlo(0.2), [("train_mode_in_validation", False)]),
        (lambda: nn.BatchNorm1d(32, momentum=0.0), [("batchnorm_statistics", True)]),
        (lambda: Settled(32), [("eval_mode_in_training", False)]),  # frozen statistics may be meant
        (lambda: nn.BatchNorm1d(32), []),
        (lambda: nn.Sequential(nn.LayerNorm(32), nn.Dropout(0.2)), []),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)), []),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), []),
        (lambda: nn.RReLU(), []),
    ],
)
def test_randomness_looks_at_the_modules_that_change(norm: Any, expected: list) -> None:
    assert said(randomness, with_norm(norm())) == expected


# ---- scenes that are mixed
# --------------------------------------------------------------------------------------------


def _with_the_last(kept: list[Tensor], x: Tensor, training: bool) -> Tensor:
    """What is made of one batch is used for the next of its size."""
    if not kept or kept[0].shape != x.shape:
        kept[:] = [x.detach()]
    return kept[0] + 0.1 * x


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x, training: x - x.mean(0), [("scenes_mixed", True)]),
        (lambda x, training: x.T.reshape(x.shape), [("scenes_mixed", True)]),
        (lambda x, training: x - x.mean(0) if training else x, [("scenes_mixed", False)]),
        (lambda x, training: fn.dropout(x, 0.3, training), []),
        (lambda x, training: fn.dropout(x, 0.3, True), []),  # which has a name of its own
        (lambda x, training: fn.dropout(x - x.mean(0), 0.3, True), [("scenes_mixed", True)]),
        (lambda x, training: x - x[:1], [("scenes_mixed", True)]),
        (partial(_with_the_last, []), [("stale_cache", True)]),
        (lambda x, training: x - x.mean(1, keepdim=True), []),
    ],
    ids=[
        "mean of the batch",
        "reshape",
        "in training only",
        "dropout",
        "dropout in evaluation",
        "both",
        "the first",
        "kept",
        "mean of the scene",
    ],
)
def test_mixed_looks_at_both_modes(change: Any, expected: list) -> None:
    trainer = network()
    on_output(trainer.model.norm, lambda x: change(x, trainer.model.training))
    assert said(reads_scenes, trainer) == expected


@pytest.mark.parametrize(
    "norm, expected",
    [
        (lambda: nn.BatchNorm1d(32), []),
        (lambda: nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.1)), []),
        (lambda: Stuck(32), []),  # which has a name of its own
        (lambda: nn.BatchNorm1d(32, track_running_stats=False), [("scenes_mixed", False)]),
    ],
)
def test_mixed_allows_statistics_of_the_batch_in_training(norm: Any, expected: list) -> None:
    assert said(reads_scenes, with_norm(norm())) == expected


# ---- a few scenes
# -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that other work slows down makes as many steps as any other."""
    monkeypatch.setattr(overfit, "SECONDS", 600.0)
    monkeypatch.setattr(overfit, "LONGEST", 600.0)


def reasons(trainer: Trainer) -> list[tuple[str, bool]]:
    with preserve_state(trainer):
        return said(overfit_batch, trainer)


@pytest.mark.slow
@pytest.mark.usefixtures("in_time")
def test_overfit_batch_tells_a_wrong_step_from_a_slow_one() -> None:
    trainer = network()
    before_step(trainer, lambda: [part.neg_() for part in gradients(trainer)])
    assert reasons(trainer) == [("cannot_memorise", False)]
    for rate in (1e-6, 1e-4, 1.0):
        assert reasons(network(**{"optimizer.backbone_lr": rate, "optimizer.head_lr": rate})) == []


@pytest.mark.slow
@pytest.mark.usefixtures("in_time")
def test_overfit_batch_names_a_network_that_no_rate_teaches() -> None:
    trainer = network()
    on_answer(trainer, lambda factor: factor * torch.randn_like(factor).sign())
    (finding,) = overfit_batch(PreflightContext(trainer))
    assert finding.cause == "cannot_memorise" and not finding.certain and "takes off 0%" in finding.evidence


@pytest.mark.slow
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("weight, expected", [(1e4, [("dominating_term", False)]), (1e-4, [])])
def test_overfit_batch_names_a_penalty_that_holds_the_weights(weight: float, expected: list) -> None:
    trainer = network()
    first = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    plain = trainer.loss.forward

    def penalised(prediction: Any, scenes: Any) -> Any:
        total, terms = plain(prediction, scenes)
        gaps = [(now - then).square().sum() for now, then in zip(trainer.model.parameters(), first)]
        return total + weight * torch.stack(gaps).sum(), terms

    trainer.loss.forward = penalised
    assert reasons(trainer) == expected
