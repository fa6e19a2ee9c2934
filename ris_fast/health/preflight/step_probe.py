"""One real optimizer step through the trainer's own objects, and what happened in it.

Legend: T tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.preflight.measures import total_norm
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.physics.scenes import Scenes
from ris_fast.training.telemetry.step_telemetry import StepTelemetry

FEW = 4  # scenes of a micro-batch


@dataclass
class StepTrace:
    """What one step did, measured between its parts. Lists are in the order of the model's parameters."""

    residual_grad_norm: float = math.nan  # gradient norm after the gradients were cleared
    raw: list[Tensor | None] = field(default_factory=list)
    given: list[Tensor | None] = field(default_factory=list)  # to the optimizer, whatever happened on the way
    scale: float = 1.0  # of the loss
    attempted: int = 0
    skipped: int = 0
    seen_norm: float = math.nan  # of the gradient that the optimizer measured
    rates: list[float] = field(default_factory=list)
    reached: bool = False  # the optimizer's own step was called


class StepProbe(StepTelemetry):
    """In place of telemetry, which then measures nothing: keeps the gradients themselves, where `gradients` are asked
    for."""

    def __init__(self, context: PreflightContext, gradients: bool) -> None:
        super().__init__(context.model, context.optimizer, 1)
        self.taken, self.gradients, self.enabled = StepTrace(), gradients, False

    def cleared(self) -> None:
        if self.gradients:
            self.taken.residual_grad_norm = total_norm([p.grad for p in self.model.parameters()])

    def shown(self, scenes: Scenes, factor: Tensor) -> None:
        """Nothing: the scenes are known."""

    def differentiated(self) -> None:
        if self.gradients:
            self.taken.raw = self.copies()

    def copies(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.detach().clone() for p in self.model.parameters()]


def take_step(
    context: PreflightContext, group: Sequence[Scenes], planned: int, seed: int = 0, *, gradients: bool = True
) -> StepTrace:
    """One optimizer step over `group`, and what happened in it."""
    kept, probe = context.step.telemetry, StepProbe(context, gradients)
    before = context.optimizer.counters()
    context.step.telemetry = probe
    torch.manual_seed(seed)
    context.model.train()

    def reached(*_: Any) -> None:
        """The rates of this update: a scheduler of the user's may set those of the next behind it."""
        probe.taken.reached, probe.taken.rates = True, [float(group["lr"]) for group in context.optimizer.param_groups]
        probe.taken.given = probe.copies() if gradients else []

    hook = context.optimizer.register_step_pre_hook(reached)
    try:
        context.step(group, planned)
    finally:
        hook.remove()
        context.step.telemetry = kept
    after, taken = context.optimizer.counters(), probe.taken
    taken.attempted, taken.skipped = after["attempted"] - before["attempted"], after["skipped"] - before["skipped"]
    taken.scale, taken.seen_norm = float(before.get("loss_scale") or 1.0), float(after["grad_norm"])
    return taken


def few_scenes(group: Sequence[Scenes]) -> list[Scenes]:
    """The same micro-batches with a few scenes each, where a step matters and not what it learns."""
    return [scenes[:FEW] for scenes in group]
