"""Trials that are ended early: after each validation the study hears how good a trial is, and may say that it is
behind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, Protocol

from ris_fast.config.schema import Config
from ris_fast.report.console import validation
from ris_fast.training.callback import Callback

PARTS = 100  # of a trial's budget: a trial is heard once in each at most, and compared by the percent


class TrialPruned(Exception):
    """A trial is behind the others; its run ends here."""


class Judge(Protocol):
    """What a trial of Optuna has for this."""

    def report(self, value: float, step: int) -> None: ...
    def should_prune(self) -> bool: ...


class Pruning(Callback):
    """Reports the best validation NMSE so far with the percent of the budget that is spent, and ends a run that is
    behind.

    The budget is of time or of epochs, whichever is spent further: a small network makes more epochs in the same time,
    and would be behind at each of them.
    """

    def __init__(self, trial: Judge, config: Config, *, prune: bool = True) -> None:
        self.trial, self.training, self.prune = trial, config.training, prune
        self.best, self.reported, self.pruned = math.nan, -1, False
        self.epochs, self.seconds = 0, 0.0  # of the run so far

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.epochs, self.seconds = row["epoch"], row["seconds"]
        value, part = validation(row), math.floor(PARTS * self._share(row))
        self.best = value if math.isnan(self.best) or value < self.best else self.best
        if part == self.reported:
            return
        self.trial.report(self.best, part)
        self.reported = part
        if self.prune and self.trial.should_prune():
            self.pruned = True
            raise TrialPruned(f"NMSE {self.best:.4g} after {part / PARTS:.0%} of the budget is behind the others'")

    def on_summary(self, summary: dict[str, Any]) -> None:
        if self.pruned:
            summary["verdict"] = "pruned"

    def _share(self, row: dict[str, Any]) -> float:
        seconds = row["seconds"] / self.training.max_seconds if self.training.max_seconds else 0.0
        return min(1.0, max(seconds, row["epoch"] / self.training.epochs))


def behind(trial: Mapping[int, float], others: Iterable[Mapping[int, float]], *, grace: int, fewest: int) -> bool:
    """Whether a trial's best is above the median of what the others had by the same part of their budget, or not a
    number.

    Args: trial, others: part of the budget -> NMSE; grace: part before which no trial is behind; fewest: others that
        must have been validated by then.
    """
    part = max(trial, default=-1)
    if part < grace:
        return False
    reached = [min(known) for each in others if (known := [value for at, value in each.items() if at <= part])]
    best = min(trial.values())
    return len(reached) >= fewest and (math.isnan(best) or best > median(reached))
