"""What a run tells of itself: the numbers of its steps, brought to the host without waiting, and what must hold of
them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.schedule import Plan, learning_rate_factor
from ris_fast.training.state import Meter, RunState, RunStopped
from ris_fast.training.step import Step
from ris_fast.training.telemetry.async_copy import Clock, DeviceTimestamp, HostCopy
from ris_fast.training.telemetry.step_telemetry import StepSample


class Observer(Protocol):
    """Told about a run. Every argument is one mapping of plain numbers and texts, and further mappings."""

    def start(self, info: Mapping[str, Any]) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...

    def epoch(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Silent:
    """The observer that does nothing."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Nothing."""

    step = epoch = finish = start


@dataclass(frozen=True)
class Ordered:
    """A report whose numbers are on their way to the host: what the host knew when it was ordered, and what it waits
    for."""

    where: dict[str, Any]
    planned: int  # length of the schedule that its last step used
    window: Meter
    scenes: int  # of the epoch, until then
    sample: StepSample | None
    copies: HostCopy
    moment: DeviceTimestamp


class Reporting:
    """The part of a trainer that counts, reports and stops. The trainer makes what is named here."""

    config: Config
    device: torch.device
    observer: Observer
    loss: CovarianceLoss
    optimizer: FusedAdamW
    step: Step
    state: RunState
    plan: Plan
    clock: Clock
    started: float  # time.monotonic() when training would have begun without interruption
    epoch_steps: int

    def __init__(self) -> None:
        self.counters = dict.fromkeys(("attempted", "applied", "clipped", "skipped"), 0)
        self.skipping = self.planned = 0  # steps skipped in a row, as reports saw it; length of the schedule
        self.ordered: Ordered | None = None

    def _check_steps(self, made: int, before: dict[str, int]) -> None:
        """Attempted steps must be what the data imply, and most of them must have been applied."""
        self._read_counters()
        attempted = self.counters["attempted"] - before["attempted"]
        if self.state.epoch_step >= self.epoch_steps or not self._time_over():
            expected = self.epoch_steps - (self.state.epoch_step - made)
            if attempted != expected:
                raise RunStopped(
                    f"Epoch {self.state.epoch + 1} made {attempted} optimizer steps; its scenes, batch size "
                    f"and accumulation imply {expected}. The loop does not step once a group; the run ends.",
                    "steps_differ_from_data",
                )
        applied = self.counters["applied"] - before["applied"]
        if applied < self.config.health.min_applied * attempted:
            raise RunStopped(
                f"Only {applied} of {attempted} optimizer steps of epoch {self.state.epoch + 1} were applied; "
                f"the others had a non-finite gradient, first in '{self.counters.get('first_bad_tensor')}'.",
                "steps_skipped",
            )

    def _order_report(self, window: Meter, scenes: int) -> None:
        """A report of the window, `scenes` into the epoch; from a GPU it is delivered at the next one, so that nobody
        waits."""
        self._deliver_report()
        sample = self.step.telemetry.sample()
        tensors = {"counters": self.optimizer.counter_states(), "sums": window.sums} | (
            sample.tensors if sample else {}
        )
        self.ordered = Ordered(
            self._where(), self.planned, replace(window), scenes, sample, HostCopy(tensors), self.clock.record()
        )
        if self.device.type == "cpu":
            self._deliver_report()

    def _deliver_report(self) -> None:
        if self.ordered is None:
            return
        report, self.ordered, previous = self.ordered, None, dict(self.counters)
        copies, window, sample = report.copies.result(), report.window, report.sample
        self._read_counters(copies["counters"])
        window.read(copies["sums"])
        all_skipped = self.counters["skipped"] - previous["skipped"] >= window.steps
        self.skipping = self.skipping + window.steps if all_skipped else 0
        if self.skipping >= self.config.training.max_skipped:
            raise RunStopped(
                f"Every gradient of the last {self.skipping} steps was non-finite, first in "
                f"'{self.counters.get('first_bad_tensor')}'. No step was applied; the weights are unharmed.",
                "steps_skipped",
            )
        rate = report.scenes / max(report.moment.seconds() - self.clock.began, 1e-9)
        row = report.where | self._figures(window, previous, rate, report.planned)
        seen = sample and replace(sample, tensors={name: copies[name] for name in sample.tensors})
        row["health"] = self.step.telemetry.read(seen, self.state.epoch) | {
            "steps": window.steps,
            "attempted": self.counters["attempted"] - previous["attempted"],
            "skipped": self.counters["skipped"] - previous["skipped"],
            "applied": self.counters["applied"],
        }
        self.observer.step(row)

    def _read_counters(self, copied: Tensor | None = None) -> None:
        self.counters = self.optimizer.counters(copied)

    def _where(self) -> dict[str, Any]:
        """Where the run stands, as the host knows it."""
        return {
            "epoch": self.state.epoch + 1,
            "epochs": self._epochs_planned(),
            "step": self.state.step,
            "scenes_seen": self.state.scenes_seen,
            "seconds": self.state.seconds,
            "lr": self.step.learning_rates(),
            "planned_steps": self.plan.planned,
        }

    def _figures(self, meter: Meter, before: dict[str, int], rate: float, planned: int) -> dict[str, Any]:
        """What the device has told of the steps of a meter."""
        steps = max(1, self.counters["attempted"] - before["attempted"])
        return {
            "train_loss": meter.mean_loss(),
            "terms": meter.mean_terms(self.loss.weights),
            "grad_norm": self.counters["grad_norm"],
            "clipped": (self.counters["clipped"] - before["clipped"]) / steps,
            "skipped": (self.counters["skipped"] - before["skipped"]) / steps,
            "lr_planned": self._planned_rates(planned),
            "scenes_per_s": rate,
            "loss_scale": self.counters.get("loss_scale"),
        }

    def _planned_rates(self, planned: int) -> dict[str, float]:
        """The learning rates that the last update should have had, from the count of updates that were applied."""
        settings, counters = self.config.optimizer, self.counters
        skipped_last = self.skipping > 0
        factor = learning_rate_factor(
            counters["applied"] - (not skipped_last), planned, settings.warmup, settings.final_lr
        )
        return {group["name"]: group["peak_lr"] * factor for group in self.optimizer.param_groups}

    def _epochs_planned(self) -> int:
        left = self.plan.planned - (self.state.step - self.state.epoch_step)
        return max(
            self.state.epoch + 1,
            min(self.config.training.epochs, self.state.epoch + math.ceil(left / self.epoch_steps)),
        )

    def _time_over(self) -> bool:
        limit = self.config.training.max_seconds
        return limit > 0 and time.monotonic() - self.started >= limit
