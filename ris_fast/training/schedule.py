"""Learning rate as a pure function of applied optimizer steps, and the plan of how many there will be."""

from __future__ import annotations

import math
from dataclasses import dataclass


def learning_rate_factor(applied: int, planned: int, warmup: float, final: float) -> float:
    """Linear warm-up, then cosine: the share of the peak learning rate for the step after `applied` steps.

    Never zero: the first step has 1/warm-up steps of the peak. Beyond `planned` it stays at `final`.
    """
    warm = max(1, round(warmup * planned))
    if applied < warm:
        return (applied + 1) / warm
    progress = min(1.0, (applied - warm) / max(1, planned - warm))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def steps_in_epoch(scenes: int, batch_size: int, accumulate: int) -> int:
    """Optimizer steps that an epoch's data imply, ragged last group included."""
    return math.ceil(math.ceil(scenes / batch_size) / accumulate)


@dataclass
class Plan:
    """How many optimizer steps the run will make: by epochs, or fewer where time ends it first.

    With a time limit the step rate is measured as the run goes, so that the cosine ends when the time does.
    """

    epoch_steps: int
    max_seconds: float = 0.0
    planned: int = 0

    def __post_init__(self) -> None:
        self.planned = self.planned or self.epoch_steps

    def update(self, steps: int, seconds: float) -> int:
        """Re-plan after `steps` steps in `seconds` seconds of training and validation."""
        if self.max_seconds > 0 and steps > 0:
            affordable = round(steps * self.max_seconds / seconds)
            self.planned = max(steps, min(self.epoch_steps, affordable))
        return self.planned
