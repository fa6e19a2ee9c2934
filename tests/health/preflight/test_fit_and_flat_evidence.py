"""What a fit, a jump, a flat end or another unit explains: codes and antennas that are not those of the snapshots,
outputs without a derivative, averages that forget nothing, and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.faults.patches import after_step, on_answer, on_batches, on_output, wrap
from ris_fast.health.preflight.distributions import distributions
from ris_fast.health.preflight.gradient import connected, every_tensor
from ris_fast.health.preflight.kernels import loss_kernel
from ris_fast.health.preflight.labels import labels_of_targets
from ris_fast.health.preflight.one_step import one_step
from ris_fast.health.preflight.own_terms import own_term
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.rereads import scenes_again
from ris_fast.health.preflight.scene_parts import physics
from ris_fast.health.preflight.several_steps import several_steps
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import causes, small


def said(check: Any, trainer: Trainer) -> list[tuple[str, bool]]:
    context = PreflightContext(trainer)
    context.model.train()
    return [(finding.cause, finding.certain) for finding in check(context)]


def served(change: Callable[[Scenes], Scenes], split: str | None = None, twin: str = "backprojection") -> Trainer:
    trainer = Trainer(small(twin))
    on_batches(trainer, change, split)
    return trainer


def noisy(share: float, *, anew: bool = False) -> Callable[[Scenes], Scenes]:
    """Noise that is drawn for each batch, or anew in each reading, at this share of the signal's amplitude."""

    def change(scenes: Scenes) -> Scenes:
        size = share * scenes.snapshots.square().mean((1, 2, 3), keepdim=True).sqrt()
        seed = torch.randint(2**31, ()) if anew else scenes.index.sum()
        generator = torch.Generator().manual_seed(int(seed))
        return replace(
            scenes,
            snapshots=scenes.snapshots
            + size * torch.randn(size.shape[:1] + scenes.snapshots.shape[1:], generator=generator),
        )

    return change


# ---- scenes


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda s: replace(s, codes=s.codes * torch.tensor((1.0, 0.0))), [("parts_unrelated", True)]),
        (lambda s: replace(s, codes=s.codes.to(torch.int8).float()), [("parts_unrelated", True)]),
        (lambda s: replace(s, snapshots=s.snapshots[:, :, [3, 1, 0, 2, 5, 7, 6, 4]]), [("parts_unrelated", True)]),
        (noisy(0.7), [("snr_labels_differ", False)]),  # or the channel is an estimate
        (lambda s: replace(s, snapshots=3.0 * s.snapshots), []),
    ],
    ids=["real codes", "whole codes", "other antennas", "noise of one strength", "another unit"],
)
def test_codes_and_antennas_of_others_are_told_from_wrong_labels(
    change: Callable[[Scenes], Scenes], expected: list[tuple[str, bool]]
) -> None:
    assert said(physics, served(change)) == expected


def test_noise_that_augments_training_is_meant_and_in_validation_is_not() -> None:
    assert said(scenes_again, served(noisy(0.02), "train")) == []
    assert said(scenes_again, served(noisy(0.02), "val")) == []  # its batches are the same each time
    assert said(scenes_again, served(noisy(0.02, anew=True), "val")) == [("scenes_change", False)]


def test_labels_in_other_units_are_named() -> None:
    kilometres = served(lambda s: replace(s, range_m=s.range_m / 1000.0))
    assert causes(distributions, kilometres) == ["wrong_units"]
    decibels = served(lambda s: replace(s, power=torch.where(s.power > 0, -40.0, 0.0)))
    assert causes(labels_of_targets, decibels) == ["wrong_units"]


def test_a_term_that_reads_the_padding_of_labels_is_named() -> None:
    for masked, expected in ((False, ["target_scale_differs"]), (True, [])):
        trainer = Trainer(small("hybrid"))

        def term(prediction: Prediction, scenes: Scenes, masked: bool = masked) -> Tensor:
            error = (prediction.range_m - scenes.range_m).square()
            return 0.01 * (error * (scenes.power > 0) if masked else error).mean(1)

        trainer.loss.own, trainer.loss.own_name = term, "ranges"
        trainer.loss.weights["ranges"] = 1.0
        assert causes(own_term, trainer) == expected


# ---- gradients


def test_an_argmax_in_the_path_is_no_detach() -> None:
    trainer = Trainer(small("hybrid"))

    def choose(factor: Tensor) -> Tensor:
        best = factor.square().sum((1, 3)).argmax(1)
        return torch.eye(factor.shape[2])[best][:, None, :, None].expand_as(factor) * torch.ones_like(factor)

    on_answer(trainer, choose)
    assert said(connected, trainer) == [("non_differentiable", True)]


@pytest.mark.parametrize("temperature, expected", [(1e-6, [("saturated_output", False)]), (1.0, [])])
def test_a_gradient_that_a_softmax_at_its_end_stops_is_not_called_cleared(temperature: float, expected: list) -> None:
    trainer = Trainer(small("hybrid"))
    on_output(trainer.model.fuse, lambda value: torch.softmax(value / temperature, -1))
    assert said(every_tensor, trainer) == expected


def test_terms_whose_gradient_is_cut_are_named() -> None:
    trainer = Trainer(small("hybrid"))
    trainer.loss.own = lambda prediction, scenes: prediction.factor.detach().square().mean((1, 2, 3))
    trainer.loss.own_name = "size"
    trainer.loss.weights["size"] = 0.5
    assert said(connected, trainer) == [("detached_loss", False)]


# ---- the loss, the step and the average


def test_values_of_scenes_that_only_their_mean_has_right_are_no_mistake() -> None:
    trainer = Trainer(small("backprojection"))

    def make(nmse: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda factor, scenes, *, blend: (each := nmse(factor, scenes, blend=blend)).mean().expand_as(each)

    wrap(trainer.loss, "nmse", make)
    assert causes(loss_kernel, trainer) == []


def test_a_decay_beside_the_optimizer_is_named() -> None:
    trainer = Trainer(small("backprojection"))
    after_step(trainer, torch.no_grad()(lambda: [each.mul_(0.95) for each in trainer.model.parameters()]))
    assert said(one_step, trainer) == [("weight_decay_too_large", False)]


@pytest.mark.parametrize("forgets, expected", [(False, ["ema_cold"]), (True, [])])
def test_an_average_of_all_weights_alike_is_named(forgets: bool, expected: list[str]) -> None:
    trainer, made = Trainer(small("backprojection")), [0]

    @torch.no_grad()
    def follow() -> None:
        made[0] += 1
        share = 1.0 / made[0] if not forgets else max(1.0 / made[0], 0.02)  # which warms up as that mean
        for name, value in trainer.optimizer.extra_state().items():
            raw: nn.Module | Tensor | None = dict(trainer.model.named_parameters()).get(name.removeprefix("ema."))
            if raw is not None:
                kept[name] = torch.lerp(kept[name], raw.detach(), share) if name in kept else raw.detach().clone()
                value.copy_(kept[name].view_as(value))

    kept: dict[str, Tensor] = {}
    after_step(trainer, follow)
    assert causes(several_steps, trainer) == expected
