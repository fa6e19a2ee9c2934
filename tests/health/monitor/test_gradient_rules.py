"""Gradients by scene, micro-batch and step, and scenes as they are served: mistakes in short runs, each named from the
rows that they leave."""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.faults.healthy_twins import TWINS, changed
from bench.faults.patches import after_step, before_step, gradients, on_answer, on_loss, wrap
from ris_fast.health.finding import Finding, ranked
from ris_fast.health.monitor.gradient_rules import no_gradient_arrives
from ris_fast.health.monitor.history import RunHistory
from ris_fast.health.monitor.rules import replay
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback
from ris_fast.training.step import Group
from ris_fast.training.trainer import Trainer
from tests.health.monitor.test_rules import Recorder


def found(
    change: Function[[Trainer], Any], twin: str = "hybrid", *callbacks: Callback, **settings: Any
) -> list[Finding]:
    config = changed(TWINS[twin](), {"training.epochs": 3, "report.every_steps": 24, **settings})
    recorder = Recorder()
    trainer = Trainer(config, callbacks=[*callbacks, recorder])
    change(trainer)
    trainer.fit()
    return ranked(replay(recorder.run))


def every(n: int, start: int = 0) -> Function[[], bool]:
    """True at every n-th call from `start` on."""
    calls = iter(range(start + 1, 10**9))
    return lambda: (call := next(calls)) > 0 and call % n == 0


def cleared_now_and_then(trainer: Trainer) -> None:
    due = every(5, start=-8)  # behind the steps that are looked at closely
    before_step(trainer, lambda: [grad.zero_() for grad in gradients(trainer)] if due() else None)


def nudged_now_and_then(trainer: Trainer) -> None:
    due = every(11)
    weight = max(trainer.model.parameters(), key=Tensor.numel)
    wrap(
        trainer.optimizer,
        "zero_grad",
        lambda zero: lambda **options: (weight.data.mul_(1.2) if due() else None, zero(**options)),
    )


def first_scene_only(trainer: Trainer) -> None:
    def rest_detached(factor: Tensor) -> Tensor:
        return torch.cat([factor[:1], factor[1:].detach()])

    on_loss(trainer, lambda prediction, scenes: (prediction._replace(factor=rest_detached(prediction.factor)), scenes))


def second_half_of_the_terms(trainer: Trainer) -> None:
    calls = iter(range(10**9))

    def without_range(prediction: Prediction, scenes: Scenes) -> tuple[Prediction, Scenes]:
        odd = next(calls) % 2
        return (prediction._replace(range_m=prediction.range_m.detach()) if odd else prediction), scenes

    on_loss(trainer, without_range)


def rounded_after_each_step(trainer: Trainer) -> None:
    def rounded() -> None:
        for parameter in trainer.model.parameters():
            parameter.data.copy_(parameter.data.half().float())

    after_step(trainer, rounded)


def poisoned_by_epsilon(trainer: Trainer) -> None:
    weight = next(trainer.model.parameters())
    due = every(12)
    after_step(trainer, lambda: weight.data.view(-1)[0].fill_(torch.nan) if due() else None)


MISTAKES = {
    "zeroed_gradients": (cleared_now_and_then, "hybrid", True, "every 5 steps since step 13"),
    "weights_changed_outside": (nudged_now_and_then, "hybrid", True, "step 11"),
    "scenes_left_out": (first_scene_only, "hybrid", True, "31 of 32 scenes"),
    "micro_batches_differ": (second_half_of_the_terms, "accumulate", False, "of 4, the first range_head"),
    "low_precision_weights": (rounded_after_each_step, "hybrid", True, "float16"),
}


@pytest.mark.parametrize("cause", MISTAKES)
def test_gradient_rules_name_a_mistake_from_its_rows(cause: str) -> None:
    change, twin, certain, said = MISTAKES[cause]
    first = found(change, twin)[0]
    assert (first.cause, first.certain) == (cause, certain) and said in first.evidence


@pytest.mark.parametrize("earlier, cause", [(False, "forwards_without_backward"), (True, "detached_loss")])
def test_steps_without_backward_are_told_from_a_loss_without_one(earlier: bool, cause: str) -> None:
    steps = [
        {"event": "step", "step": number, "health": {"raw_norm": 0.0 if detached else 1.0, "output_detached": detached}}
        for number, detached in enumerate((earlier, True, True, True), 1)
    ]
    run = RunHistory(info={"settings": {"loss.cov": 1.0}}, steps=steps)
    assert [finding.cause for finding in no_gradient_arrives(run)] == [cause]


def test_weights_changed_outside_is_not_certain_where_a_callback_may_mean_it() -> None:
    class Constraint(Callback):
        def on_step_end(self) -> None:
            weight.data.mul_(0.8)

    def remember(trainer: Trainer) -> None:
        nonlocal weight
        weight = max(trainer.model.parameters(), key=Tensor.numel)

    weight = torch.zeros(1)
    first = found(remember, "hybrid", Constraint())[0]
    assert (first.cause, first.certain) == ("weights_changed_outside", False) and "Constraint" in first.evidence


@pytest.mark.parametrize("share, silent", [(1e-3, True), (0.05, False)])
def test_a_small_decay_of_ones_own_is_no_change_from_outside(share: float, silent: bool) -> None:
    def decayed(trainer: Trainer) -> None:
        matrices = [each for each in trainer.model.parameters() if each.dim() > 1]
        after_step(trainer, lambda: [each.data.mul_(1 - share) for each in matrices])

    assert ("weights_changed_outside" in {each.cause for each in found(decayed)}) != silent


@pytest.mark.parametrize("new, silent", [(1, True), (0, False)])
def test_a_curriculum_may_serve_scenes_again_but_not_all_of_them(new: int, silent: bool) -> None:
    """Of three batches `new` are of the epoch, the others are the first epoch's again."""

    def chosen(trainer: Trainer) -> None:
        def make(groups: Function) -> Function:
            def of_the_first_epoch() -> Iterator[Group]:
                for place, group in enumerate(groups()):
                    again = place % 3 >= new
                    numbers = [part % trainer.source.size("train") if again else part for part in group]
                    yield Group(numbers, group.scenes, group.neighbour)

            return of_the_first_epoch

        wrap(trainer, "_index_groups", make)

    said = [each for each in found(chosen, "hybrid", **{"data.fixed": False}) if each.cause == "repeated_batch"]
    assert not any(each.certain for each in said) and (said == []) == silent


def served_again(trainer: Trainer) -> None:
    """Every fourth batch is the one before, among steps that no report looks at closely."""
    due, kept = every(4, start=-10), {}

    def make(batch: Function) -> Function:
        def read(split: str, index: Tensor) -> Scenes:
            if split == "train" and not (due() and len(index) in kept):
                kept[len(index)] = batch(split, index)
            return kept[len(index)] if split == "train" else batch(split, index)

        return read

    wrap(trainer.source, "batch", make)


def new_noise_at_every_reading(trainer: Trainer) -> None:
    def noisy(batch: Function) -> Function:
        def read(split: str, index: Tensor) -> Scenes:
            scenes = batch(split, index)
            return replace(scenes, snapshots=scenes.snapshots + 0.01 * torch.randn_like(scenes.snapshots))

        return read

    wrap(trainer.source, "batch", noisy)


def validated_on_training_scenes(trainer: Trainer) -> None:
    wrap(trainer.source, "batch", lambda batch: lambda split, index: batch("train", index))


def shuffled_in_place(trainer: Trainer) -> None:
    def score(given: Function) -> Function:
        def scored(averaged: bool = False) -> Any:
            trainer.validation[0].snapshots[0].mul_(1.01)
            return given(averaged)

        return scored

    wrap(trainer, "_score", score)


SERVED = {
    "repeated_batch": (served_again, {}),
    "scenes_change": (new_noise_at_every_reading, {"data.fixed": True}),
    "split_overlap": (validated_on_training_scenes, {"data.fixed": True}),
    "scenes_altered": (shuffled_in_place, {}),
}


@pytest.mark.parametrize("cause", SERVED)
def test_scene_rules_name_a_mistake_from_its_rows(cause: str) -> None:
    change, settings = SERVED[cause]
    assert found(change, "hybrid", **settings)[0].cause == cause


def test_scene_rules_are_silent_about_scenes_that_are_fixed_or_fresh() -> None:
    for fixed in (True, False):
        assert found(lambda trainer: None, "hybrid", **{"data.fixed": fixed}) == []


def zero_for_odd_scenes(trainer: Trainer) -> None:
    def odd_are_zero(factor: Tensor) -> Tensor:
        keep = (torch.arange(len(factor)) % 2 == 0).float()
        return factor * (keep if not torch.is_grad_enabled() else torch.ones_like(keep))[:, None, None, None]

    on_answer(trainer, odd_are_zero)


def test_part_not_learned_says_what_tells_the_scenes_apart() -> None:
    first = next(
        each
        for each in found(zero_for_odd_scenes, "hybrid", **{"training.epochs": 8})
        if each.cause == "part_not_learned"
    )
    assert "exactly 1" in first.evidence and "index mod 2: of 'odd' 100%" in first.evidence
