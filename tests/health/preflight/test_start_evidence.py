"""What holds at the start alone and what does not: gates that open, layers and losses that mix scenes up, gradients and
averages on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from bench.faults.patches import after_step, answer_through, before_step, gradients, on_batches, on_output, rebound
from ris_fast.health.preflight import gradient, inputs, network, scenes, truth
from ris_fast.health.preflight.one_step import one_step
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.physics.real_complex import conj, matmul
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small
from tests.health.preflight.test_scene_evidence import said

START = [
    inputs.CHECKS["answers depend on the scene, and on no other"],
    inputs.CHECKS["inputs can carry the answer"],
    network.CHECKS["answers are not at the ends of a range"],
    network.CHECKS["signals pass every layer"],
    gradient.CHECKS["every tensor gets a gradient"],
]


class FromZero(nn.Module):
    """A learned prior and what a network adds to it, through something that starts at zero or stays there."""

    def __init__(self, kind: str, elements: int, columns: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.kind = kind
        if kind != "no prior":
            self.prior = nn.Parameter(torch.randn(elements, columns, 2, generator=generator))
        if kind in ("last layer", "no prior"):
            self.last = nn.Parameter(torch.zeros(2, 2))
        elif kind != "shut":
            self.gate = nn.Parameter(torch.zeros(columns, 1) if kind == "LayerScale" else torch.zeros(()))

    def forward(self, factor: Tensor) -> Tensor:
        match self.kind:
            case "last layer":
                return self.prior + factor @ self.last
            case "shut":
                return self.prior + 0.0 * factor
            case "in a tanh":
                return self.prior + self.gate.tanh() * factor
            case "no prior":
                return factor @ self.last
        return self.prior + self.gate * factor


@pytest.mark.parametrize("kind", ["ReZero", "LayerScale", "last layer", "in a tanh", "no prior", "shut"])
def test_checks_of_the_start_allow_what_the_first_step_opens(kind: str) -> None:
    trainer = Trainer(small("backprojection"))
    answer_through(trainer.model, FromZero(kind, trainer.model.task.elements, trainer.model.columns))
    rebound(trainer)
    found = [cause for check in START for cause, _ in said(check, trainer)]
    stuck = {"shut": "ignored_input", "no prior": "zeroed_gradients"}  # F F^H has no slope at zero
    assert stuck[kind] in found if kind in stuck else found == []


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x: fn.layer_norm(x[..., None], (1,))[..., 0], ["dead_units"]),
        (lambda x: torch.softmax(x[..., None], -1)[..., 0], ["ignored_input"]),
        (lambda x: (x - 1e6).relu(), ["dead_units"]),
        (lambda x: fn.layer_norm(x, x.shape[-1:]), []),
        (lambda x: torch.softmax(x, -1), []),
        (torch.relu, []),
        (torch.sigmoid, []),
        (lambda x: x * (torch.arange(x.shape[-1]) % 2), []),
    ],
)
def test_reads_scenes_names_a_layer_that_says_the_same_of_all(change: Any, expected: list[str]) -> None:
    trainer = Trainer(small("hybrid"))
    on_output(trainer.model.fuse, change)
    assert [cause for cause, _ in said(START[0], trainer)] == expected


# ---- a loss that asks other scenes


def nmse_of(compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def covariance(factor: Tensor) -> Tensor:
        whole = matmul(factor, conj(factor).transpose(1, 2))
        return whole / whole[..., 0].diagonal(dim1=1, dim2=2).sum(-1)[:, None, None, None]

    return lambda factor, given, *, blend: compare(covariance(factor), covariance(given.factor))


def errors(found: Tensor, true: Tensor) -> Tensor:
    return (found - true).square().sum((-1, -2, -3))


def sizes(true: Tensor) -> Tensor:
    return true.square().sum((-1, -2, -3))


LOSSES = {
    "every scene": (lambda found, true: errors(found[:, None], true) / sizes(true), ["shapes_broadcast"]),
    "the next scene": (lambda found, true: errors(found, true.roll(1, 0)) / sizes(true), ["shapes_broadcast"]),
    "the mean scene": (lambda found, true: errors(found, true.mean(0)) / sizes(true), ["shapes_broadcast"]),
    "another scale": (lambda found, true: errors(found, 2 * true) / sizes(true), ["target_scale_differs"]),
    "over the batch's power": (lambda found, true: errors(found, true) / sizes(true).mean(), []),
    "scene by scene": (lambda found, true: errors(found, true) / sizes(true), []),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_truth_names_answers_compared_with_other_scenes(kind: str) -> None:
    trainer = Trainer(small("backprojection"))
    compare, expected = LOSSES[kind]
    trainer.loss.nmse = nmse_of(compare)
    assert [cause for cause, _ in said(truth.truth, trainer)] == expected


# ---- gradients and averages on their way


def rewritten(change: Callable[[list[Tensor]], None]) -> Trainer:
    trainer = Trainer(small("hybrid"))

    @torch.no_grad()
    def change_them() -> None:
        change(gradients(trainer))

    before_step(trainer, change_them)
    return trainer


def flat(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def on_all(found: list[Tensor]) -> None:
        whole = change(torch.cat([grad.flatten() for grad in found]))
        for grad, part in zip(found, whole.split([grad.numel() for grad in found])):
            grad.copy_(part.view_as(grad))

    return on_all


@pytest.mark.parametrize(
    "change, named",
    [
        (flat(lambda g: g.roll(7)), True),
        (flat(lambda g: g.flip(0)), True),
        (flat(torch.neg), True),
        (flat(lambda g: g * (1 - 2 * (torch.arange(len(g)) % 2))), True),
        (flat(lambda g: g.clamp(-1e-3, 1e-3)), False),
        (flat(lambda g: g + 0.3 * g.std() * torch.randn(g.shape, generator=torch.Generator().manual_seed(1))), False),
        (flat(lambda g: torch.where(g.abs() < g.abs().median(), 0.0, g)), False),
        (lambda found: [grad.sub_(grad.mean(-1, keepdim=True)) for grad in found if grad.dim() > 1], False),
        (lambda found: [grad.mul_(0.999) for grad in found], False),
    ],
)
def test_one_step_names_a_gradient_in_other_places(change: Callable[[list[Tensor]], None], named: bool) -> None:
    assert ("wrong_backward" in [cause for cause, _ in said(one_step, rewritten(change))]) == named


@pytest.mark.parametrize("part", ["head", "none"])
def test_several_steps_name_an_average_that_stays_in_part(part: str) -> None:
    trainer = Trainer(small("hybrid"))
    mine = {id(each) for each in trainer.model.head_parameters()} if part == "head" else set()
    first = {f"ema.{name}": p.detach().clone() for name, p in trainer.model.named_parameters() if id(p) in mine}

    @torch.no_grad()
    def put_back() -> None:
        for name, value in trainer.optimizer.extra_state().items():
            if name in first:
                value.copy_(first[name].view_as(value))

    after_step(trainer, put_back)
    assert [cause for cause, _ in said(several_steps, trainer)] == (["ema_frozen"] if part == "head" else [])


# ---- few values


def test_distinct_tells_rounded_scenes_from_empty_ones() -> None:
    def coarse(given: Scenes) -> Scenes:
        step = given.snapshots.abs().amax() / 3
        weak = torch.where(torch.arange(given.batch) % 2 == 0, 1e-3, 1.0).view(-1, 1, 1, 1)
        return replace(given, snapshots=(weak * given.snapshots / step).round() * step)

    def empty(given: Scenes) -> Scenes:
        return replace(given, snapshots=given.snapshots * (torch.arange(given.batch) % 2).view(-1, 1, 1, 1))

    for change, expected in ((coarse, "inputs_withhold_answer"), (empty, "empty_cache_slot")):
        trainer = Trainer(small("backprojection"))
        on_batches(trainer, change)
        assert {cause for cause, _ in said(scenes.distinct, trainer)} >= {expected}
