"""Held-out faults of the family "loss": sums, scales, units, bounds and signs."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.faults.catalogue import Family
from bench.faults.patches import on_label_angles, wrap
from ris_fast.physics.real_complex import power
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

FAMILY = Family("loss")


@FAMILY.patch(
    "divides by the accumulation count only where a debug print stands: in the first micro-batch",
    "accumulation_not_divided",
    "steps:5",
    twin="accumulate",
)
def divided_only_first(trainer: Trainer) -> None:
    calls = iter(range(10**9))

    def accumulate(scenes: Scenes, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, raw = trainer.loss(trainer.step.predict(scenes), scenes)
        trainer.optimizer.scale(loss * (share if next(calls) % 4 == 0 else 1.0)).backward()
        return loss.detach() * share, {name: value.detach() * share for name, value in raw.items()}

    trainer.step._accumulate = accumulate


def gram_energy(a: Tensor, b: Tensor) -> Tensor:
    """|A^H B|_F^2 of real pairs: (B,)."""
    first, second = torch.view_as_complex(a.contiguous()), torch.view_as_complex(b.contiguous())
    return (first.mH @ second).abs().square().sum((1, 2))


@FAMILY.patch("normalises the target to trace 2 N and the prediction to trace N", "target_scale_differs", "preflight")
def target_of_twice_the_trace(trainer: Trainer) -> None:
    def nmse(factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        ours = factor * power(factor).sum((1, 2)).clamp_min(1e-12).rsqrt()[:, None, None, None]
        truth = scenes.factor * (2.0 / power(scenes.factor).sum((1, 2))).sqrt()[:, None, None, None]
        energy = gram_energy(truth, truth)
        return (gram_energy(ours, ours) - 2.0 * gram_energy(ours, truth) + energy) / energy

    trainer.loss.nmse = nmse


@FAMILY.patch("converts labels to radians that already are radians", "wrong_units", "preflight")
def degrees_converted_twice(trainer: Trainer) -> None:
    on_label_angles(trainer, torch.deg2rad)


@FAMILY.patch(
    "clamps the loss against outliers, below the value that training starts from", "clamped_loss", "preflight"
)
def loss_clamped(trainer: Trainer) -> None:
    wrap(
        trainer.loss,
        "forward",
        lambda forward: lambda *args: (lambda total, raw: (total.clamp(max=0.25), raw))(*forward(*args)),
    )


@FAMILY.patch(
    "negated the loss and told the optimizer to maximise, then took the minus sign away",
    "loss_sign",
    "share:0.01",
    twin="backprojection",
)
def optimizer_maximises(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["maximize"] = True
