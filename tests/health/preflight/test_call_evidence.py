"""What stays from one call to the next: in the network, the loss and the gradient; and what the loss does not hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.faults.patches import after_step, before_step, gradients, model_with, on_answer, on_loss, wrap
from ris_fast.health.preflight.calls import inputs_kept, same_network
from ris_fast.health.preflight.derivative import unfollowed
from ris_fast.health.preflight.drift import changes_by_itself
from ris_fast.health.preflight.loss import keeps_nothing
from ris_fast.health.preflight.one_step import one_step
from ris_fast.health.preflight.own_terms import own_term
from ris_fast.health.preflight.parameters import unregistered
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.reach import output_reach
from ris_fast.health.preflight.scene_gradients import scenes_learned_from
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.health.preflight.truth import truth
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small


def trainer_of(twin: str = "backprojection", **settings: Any) -> Trainer:
    return Trainer(small(twin, **settings))


def test_a_loss_that_writes_into_its_scenes_is_named() -> None:
    trainer = trainer_of()

    def changed(prediction: Prediction, scenes: Scenes) -> tuple[Prediction, Scenes]:
        scenes.factor.mul_(1.1)
        return prediction, scenes

    on_loss(trainer, changed)
    assert causes(inputs_kept, trainer) == ["scenes_altered"]


@pytest.mark.parametrize("first", [False, True], ids=["of the batch before", "of the first batch"])
def test_a_loss_that_keeps_targets_is_named(first: bool) -> None:
    trainer, kept = trainer_of(), dict[int, Tensor]()

    def stale(prediction: Prediction, scenes: Scenes) -> tuple[Prediction, Scenes]:
        old = kept.setdefault(scenes.batch, scenes.factor)
        if not first:
            kept[scenes.batch] = scenes.factor
        return prediction, replace(scenes, factor=old)

    on_loss(trainer, stale)
    assert causes(keeps_nothing, trainer) == ["stale_cache"]


def test_a_loss_that_follows_its_own_size_keeps_nothing() -> None:
    trainer, size = trainer_of(), [1.0]

    def make(forward: Callable) -> Callable:
        def relative(prediction: Prediction, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
            total, terms = forward(prediction, scenes)
            size[0] = 0.5 * size[0] + 0.5 * float(total.detach())
            return total / size[0], terms

        return relative

    wrap(trainer.loss, "forward", make)
    assert causes(keeps_nothing, trainer) == []


def test_static_inputs_that_are_filled_once_are_named() -> None:
    trainer, static = trainer_of(), dict[int, tuple[Tensor, ...]]()

    def make(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
        return lambda *inputs: network(*static.setdefault(len(inputs[0]), inputs))

    wrap(trainer.step, "network", make)
    assert causes(same_network, trainer) == ["stale_cache"]


class Copied(nn.Module):
    """A linear layer that computes with a copy of its weight, whose gradient goes to the weight itself."""

    def __init__(self, layer: nn.Linear, fresh: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.fresh = layer.in_features, layer.out_features, fresh
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("copy", layer.weight.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        copy = self.weight.detach() if self.fresh else self.copy
        return nn.functional.linear(x, copy + self.weight - self.weight.detach(), self.bias)


@pytest.mark.parametrize("fresh", [True, False])
def test_weights_whose_copy_is_never_refreshed_are_named(fresh: bool) -> None:
    with model_with(lambda model: setattr(model, "head", Copied(model.head, fresh))):
        trainer = trainer_of()
    assert unfollowed(PreflightContext(trainer)) == ([] if fresh else ["head.weight"])


@pytest.mark.parametrize("rate, cause", [(0.8, ["ignored_input"]), (1.0, [])])
def test_a_network_that_fades_by_being_called_is_named(rate: float, cause: list[str]) -> None:
    trainer, prior, share = trainer_of(), torch.randn(16, 4, 2), [1.0]

    def faded(factor: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            share[0] *= rate
        return share[0] * factor + (1 - share[0]) * prior[:, : factor.shape[2]]

    on_answer(trainer, faded)
    assert causes(changes_by_itself, trainer) == cause


def late(trainer: Trainer) -> None:
    kept: list[Tensor] = []

    def change() -> None:
        now = [each.clone() for each in gradients(trainer)]
        for grad, old in zip(gradients(trainer), kept or now):
            grad.copy_(old)
        kept[:] = now

    before_step(trainer, change)


def added(trainer: Trainer) -> None:
    sums: list[Tensor] = []

    def change() -> None:
        sums[:] = [a + b for a, b in zip(sums or [0.0] * len(gradients(trainer)), gradients(trainer))]
        for grad, total in zip(gradients(trainer), sums):
            grad.copy_(total)

    before_step(trainer, change)


def noisy(trainer: Trainer) -> None:
    before_step(trainer, lambda: [grad.add_(20 * grad.norm() * torch.randn_like(grad)) for grad in gradients(trainer)])


@pytest.mark.parametrize(
    "change, cause",
    [(late, "wrong_backward"), (added, "gradients_never_cleared"), (noisy, "wrong_backward")],
    ids=["of the step before", "of all steps", "drowned in noise"],
)
def test_gradients_that_are_not_those_of_their_step_are_named(change: Callable[[Trainer], None], cause: str) -> None:
    trainer = trainer_of()
    change(trainer)
    assert causes(one_step, trainer) == [cause]


def test_weights_that_are_rounded_to_a_few_levels_are_named() -> None:
    trainer = trainer_of()

    @torch.no_grad()
    def rounded() -> None:
        for parameter in trainer.model.parameters():
            spacing = parameter.abs().max().clamp_min(1e-9) / 127
            parameter.copy_((parameter / spacing).round() * spacing)

    after_step(trainer, rounded)
    assert causes(one_step, trainer) == ["low_precision_weights"]


@pytest.mark.parametrize("corrected, cause", [(True, []), (False, ["ema_cold"])])
def test_an_average_that_starts_at_zero_is_divided_by_its_weight(corrected: bool, cause: list[str]) -> None:
    trainer, sums, made = trainer_of(), dict[str, Tensor](), [0]

    @torch.no_grad()
    def follow() -> None:
        made[0] += 1
        raw = {f"ema.{name}": parameter for name, parameter in trainer.model.named_parameters()}
        for name, value in trainer.optimizer.extra_state().items():
            if name in raw:
                total = sums.setdefault(name, torch.zeros_like(raw[name])).mul_(0.98).add_(raw[name], alpha=0.02)
                value.copy_((total / (1 - 0.98 ** made[0]) if corrected else total).view_as(value))

    after_step(trainer, follow)
    assert causes(several_steps, trainer) == cause


@pytest.mark.parametrize(
    "heard, cause",
    [
        (lambda matrix: matrix.real.to(matrix.dtype), "conjugation_error"),
        (lambda matrix: matrix.abs().to(matrix.dtype), "conjugation_error"),
    ],
    ids=["real parts", "magnitudes"],
)
def test_wrong_answers_that_score_as_the_truth_are_named(heard: Callable[[Tensor], Tensor], cause: str) -> None:
    trainer = trainer_of()

    def nmse(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        found, true = (torch.view_as_complex(each.contiguous()) for each in (factor, scenes.factor))
        found, true = (heard(each @ each.mH) for each in (found, true))
        found, true = (each / each.abs().sum((1, 2), keepdim=True).clamp_min(1e-30) for each in (found, true))
        return (found - true).abs().square().sum((1, 2)) / true.abs().square().sum((1, 2))

    trainer.loss.nmse = nmse
    assert causes(truth, trainer) == [cause]


@pytest.mark.parametrize("where", ["network", "loss"])
def test_a_softmax_before_the_entropy_of_the_count_is_named(where: str) -> None:
    def squashed(prediction: Prediction) -> Prediction:
        return prediction._replace(count_logits=prediction.count_logits.softmax(-1))

    if where == "loss":
        trainer = trainer_of("counting")
        on_loss(trainer, lambda prediction, scenes: (squashed(prediction), scenes))
        assert causes(truth, trainer) == ["softmax_twice"]
    else:
        with model_with(lambda model: wrap(model, "trunk", lambda trunk: lambda features: squashed(trunk(features)))):
            trainer = trainer_of("counting")
        assert causes(output_reach, trainer) == ["softmax_twice"]


@pytest.mark.parametrize("easiest, cause", [(True, [("scenes_left_out", True)]), (False, [])])
def test_a_loss_that_keeps_the_easiest_scenes_is_named_and_one_that_keeps_the_hardest_is_not(
    easiest: bool, cause: list[tuple[str, bool]]
) -> None:
    trainer = trainer_of()

    def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mined(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
            values = nmse(factor, scenes, blend=blend)
            return values.topk(max(1, len(values) // 4), largest=not easiest).values

        return mined

    wrap(trainer.loss, "nmse", make)
    found = scenes_learned_from(PreflightContext(trainer))
    assert [(finding.cause, finding.certain) for finding in found] == cause


def test_a_list_of_parameters_that_leaves_some_out_is_named() -> None:
    def change(model: nn.Module) -> None:
        def named_parameters(self: nn.Module, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
            yield from (p for p in nn.Module.named_parameters(self, *args, **options) if p[0].startswith("head"))

        model.__class__ = type("Listed", (type(model),), {"named_parameters": named_parameters})

    with model_with(change):
        trainer = trainer_of()
    assert causes(unregistered, trainer) == ["shadowed_parameters"]


@pytest.mark.parametrize(
    "sign, weight, cause", [(1.0, 10.0, ["loss_sign"]), (1.0, 1e-3, ["loss_sign"]), (-1.0, 10.0, [])]
)
def test_an_own_term_that_grows_towards_the_truth_is_named_at_any_weight(
    sign: float, weight: float, cause: list[str]
) -> None:
    def similarity(prediction: Prediction, scenes: Scenes) -> Tensor:
        found, true = (each.flatten(1) for each in (prediction.factor[:, :, : scenes.factor.shape[2]], scenes.factor))
        return sign * (found * true).sum(1) / (found.norm(dim=1) * true.norm(dim=1))

    trainer = Trainer(small("backprojection", **{"loss.own_weight": weight}), loss=similarity)
    assert causes(own_term, trainer) == cause
