"""Trials that are ended early: after each validation the study hears how good a trial is, and may say that it is
behind."""

from __future__ import annotations

import math
from typing import Any, Protocol

from ris_fast.config.schema import Config
from ris_fast.report.console import validation
from ris_fast.training.callback import Callback

PARTS = 20  # of a trial's budget: the points at which trials are compared


class TrialPruned(Exception):
    """A trial is behind the others; its run ends here."""


class Judge(Protocol):
    """What a trial of Optuna has for this."""

    def report(self, value: float, step: int) -> None: ...
    def should_prune(self) -> bool: ...


class Pruning(Callback):
    """Reports the best validation NMSE so far, at each twentieth of the budget, and ends a run that is behind.

    Trials are compared after the same share of their budget, of time or of epochs, whichever is further: a small
    network makes more epochs in the same time, and would be behind at each of them.
    """

    def __init__(self, trial: Judge, config: Config, *, prune: bool = True) -> None:
        self.trial, self.training, self.prune = trial, config.training, prune
        self.best, self.reported, self.pruned = math.nan, 0, False
        self.epochs, self.seconds = 0, 0.0  # of the run so far

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.epochs, self.seconds = row["epoch"], row["seconds"]
        before, value = self.best, validation(row)
        self.best = value if math.isnan(before) or value < before else before
        part = math.floor(PARTS * self._share(row))
        for passed in range(self.reported + 1, part):
            if not math.isnan(before):
                self.trial.report(before, passed)
        if part > self.reported:
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
