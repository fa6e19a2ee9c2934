"""Schedulers of the watched optimizers, found among the objects of the process."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

SETTLED = 4  # steps after which all that the loop uses is there
SHARE = 0.002  # of the loop's time that a search may take where nothing speaks of a scheduler
LENGTHS = ("total_steps", "T_max", "total_iters", "T_0")


@dataclass(frozen=True)
class SchedulerRecord:
    """Args: kind: its class; optimizer: which of the watched ones it is of, None for one that was not given and that
    holds tensors of theirs; advanced: how often; length: steps that it is planned for, 0 where it does not say; mode,
    patience, factor, least: of one that waits for a score, the least number of advances between two of its cuts, what a
    cut multiplies the first group's rate by, and the rate below which none goes."""

    kind: str
    optimizer: int | None
    advanced: int
    length: int
    mode: str = ""
    patience: int | None = None
    factor: float = 1.0
    least: float = 0.0


class Schedulers:
    """Those of the optimizers, or of others with tensors of theirs, that are there when the watch begins, and later."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.found: list[Any] = []
        self.later = False  # whether it was searched after the loop had begun
        began = perf_counter()
        self.search()
        self.began = perf_counter()
        self.search_s = self.began - began

    def search(self) -> None:
        known = {id(each) for each in self.found}
        kinds = _kinds(LRScheduler)
        some = [each for each in gc.get_objects() if type(each) in kinds and id(each) not in known]
        self.found += [
            each for each in some if hasattr(each, "optimizer") and _record(each, self.optimizers) is not None
        ]

    def look(self, steps: int) -> None:
        """After a step: finds those that were made after the watch began. A search walks all objects of the process
        and so is made once, at once where torch has wrapped a `step` for a scheduler. ReduceLROnPlateau wraps none."""
        if self.later or steps < SETTLED:
            return
        if any(hasattr(each.step, "_wrapped_by_lr_sched") for each in self.optimizers) or (
            self.search_s < SHARE * (perf_counter() - self.began)
        ):
            self.later = True
            self.search()

    def records(self) -> list[SchedulerRecord]:
        """Those that are not part of another."""
        self.search()
        inner = {id(part) for each in self.found for part in getattr(each, "_schedulers", ())}
        records = [_record(each, self.optimizers) for each in self.found if id(each) not in inner]
        return [each for each in records if each is not None]


def loss_scales() -> list[float]:
    """Of the torch.amp.GradScalers that have scaled a loss. Reads the device."""
    kinds = _kinds(GradScaler)
    scalers = [each for each in gc.get_objects() if type(each) in kinds and hasattr(each, "_enabled")]
    scales = [getattr(each, "_scale", None) for each in scalers if each._enabled]
    return [float(each) for each in scales if each is not None]


def _kinds(kind: type) -> set[type]:
    """A class and all that derive from it: a look at a class is much faster than `isinstance`."""
    return {kind}.union(*map(_kinds, kind.__subclasses__()))


def _record(scheduler: Any, optimizers: Sequence[Optimizer]) -> SchedulerRecord | None:
    number = next((n for n, each in enumerate(optimizers) if _is_of(scheduler.optimizer, each)), None)
    own = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    shared = any(id(p) in own for group in scheduler.optimizer.param_groups for p in group["params"])
    if number is None and not shared:
        return None
    lengths = [getattr(scheduler, name, None) for name in LENGTHS]
    length = next((each for each in lengths if isinstance(each, int)), 0)
    waits = isinstance(scheduler, ReduceLROnPlateau)
    return SchedulerRecord(
        type(scheduler).__name__,
        number,
        int(scheduler.last_epoch),
        length,
        scheduler.mode if waits else "",
        int(scheduler.patience + scheduler.cooldown) + 1 if waits else None,
        float(scheduler.factor) if waits else 1.0,
        float(next(iter(scheduler.min_lrs), 0.0)) if waits else 0.0,
    )


def _is_of(one: Optimizer, other: Optimizer) -> bool:
    """Whether they are one, or one wraps the other."""
    return one is other or one.param_groups is other.param_groups
