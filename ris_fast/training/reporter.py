"""The rows of a run: the numbers of its steps, brought to the host without waiting, and what must hold of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.training.schedule import Plan, learning_rate_factor
from ris_fast.training.state import Meter, RunState, RunStopped
from ris_fast.training.step import Step
from ris_fast.training.telemetry.async_copy import Clock, DeviceTimestamp, HostCopy
from ris_fast.training.telemetry.settings import RunSettings
from ris_fast.training.telemetry.step_telemetry import DENSE, StepSample, WeightDriftMonitor
from ris_fast.training.validation import Score


@dataclass(frozen=True)
class PendingReport:
    """A report whose numbers are on their way to the host: what the host knew by then, and what it waits for."""

    position: dict[str, Any]
    planned: int  # length of the schedule that its last step used
    window: Meter
    scenes: int  # of the epoch, until then
    sample: StepSample | None
    copies: HostCopy
    moment: DeviceTimestamp
    settings: dict[str, Any]


class MetricsReporter:
    """Counts a run's steps, makes its rows, and stops it where the counts cannot be right.

    Args: step, state, plan, clock: the trainer's own, read when a row is made; epoch_steps: steps that an epoch's data
        imply.
    """

    def __init__(self, config: Config, step: Step, state: RunState, plan: Plan, clock: Clock, epoch_steps: int) -> None:
        self.config, self.step, self.state, self.plan = config, step, state, plan
        self.clock, self.epoch_steps, self.device = clock, epoch_steps, clock.device
        self.counters: dict[str, Any] = dict.fromkeys(("attempted", "applied", "clipped", "skipped"), 0)
        self.pending: PendingReport | None = None
        self.settings: RunSettings | None = None  # from the start of `fit`

    def due(self, step: int) -> bool:
        """Whether a report follows the step of this number, counted from 1."""
        return step <= DENSE or step % max(1, self.config.report.every_steps) == 0

    def enqueue(self, window: Meter, scenes: int, planned: int) -> dict[str, Any] | None:
        """Orders a report of the window's steps and returns the row that is ready: on a CPU this report's, on a GPU
        the previous one's, so that nobody waits.

        Args: scenes: of the epoch, until now; planned: length of the schedule that the last step used.
        """
        row = self.flush()
        sample = self.step.telemetry.sample()
        tensors = {"counters": self.step.optimizer.counter_states(), "sums": window.sums}
        tensors |= sample.tensors if sample else {}
        self.pending = PendingReport(
            self.position(),
            planned,
            replace(window),
            scenes,
            sample,
            HostCopy(tensors),
            self.clock.record(),
            self.settings_changed(),
        )
        return self.flush() if self.device.type == "cpu" else row

    def flush(self) -> dict[str, Any] | None:
        """The row of the pending report, whose numbers it waits for; None where there is none. Raises: RunStopped."""
        if self.pending is None:
            return None
        report, self.pending, previous = self.pending, None, dict(self.counters)
        copies, window, sample = report.copies.result(), report.window, report.sample
        self.read_counters(copies["counters"])
        window.read(copies["sums"])
        self._check_skipped(self.counters["skipped"] - previous["skipped"], window.steps)
        rate = report.scenes / max(report.moment.seconds() - self.clock.began, 1e-9)
        seen = sample and replace(sample, tensors={name: copies[name] for name in sample.tensors})
        health = self.step.telemetry.read(seen, self.state.epoch) | {
            "steps": window.steps,
            "attempted": self.counters["attempted"] - previous["attempted"],
            "skipped": self.counters["skipped"] - previous["skipped"],
            "applied": self.counters["applied"],
            **report.settings,
        }
        return report.position | self.figures(window, previous, rate, report.planned) | {"health": health}

    def settings_changed(self) -> dict[str, Any]:
        """What is not as it was when the run began; empty where all is."""
        changed = {} if self.settings is None else self.settings.changes()
        return {"settings_changed": changed} if changed else {}

    def read_counters(self, copied: Tensor | None = None) -> None:
        """Waits for the optimizer's counters, or takes `copied`, a copy that is there already."""
        self.counters = self.step.optimizer.counters(copied)

    # ---- what must hold -----------------------------------------------------------------------------------------

    def check_epoch(self, made: int, expected: int, before: dict[str, Any], *, cut_short: bool) -> None:
        """Attempted steps must be what the data imply, and most of them must have been applied. Raises: RunStopped.

        Args: made: steps of the epoch that this process made; expected: those that the scenes left at its start imply;
            before: the counters then.
        """
        self.read_counters()
        attempted = self.counters["attempted"] - before["attempted"]
        if made >= expected or not cut_short:
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

    def _check_skipped(self, skipped: int, steps: int) -> None:
        self.state.skipping = self.state.skipping + steps if skipped >= steps else 0
        if self.state.skipping >= self.config.training.max_skipped:
            raise RunStopped(
                f"Every gradient of the last {self.state.skipping} steps was non-finite, first in "
                f"'{self.counters.get('first_bad_tensor')}'. No step was applied; the weights are unharmed.",
                "steps_skipped",
            )

    # ---- parts of a row -----------------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """How far the run has come, as the host knows it."""
        return {
            "epoch": self.state.epoch + 1,
            "epochs": self._epochs_planned(),
            "step": self.state.step,
            "scenes_seen": self.state.scenes_seen,
            "seconds": self.state.seconds,
            "lr": self.step.learning_rates(),
            "planned_steps": self.plan.planned,
        }

    def figures(self, meter: Meter, before: dict[str, Any], rate: float, planned: int) -> dict[str, Any]:
        """What the device measured in the steps of a meter."""
        steps = max(1, self.counters["attempted"] - before["attempted"])
        return {
            "train_loss": meter.mean_loss(),
            "terms": meter.mean_terms(self.step.loss.weights),
            "grad_norm": self.counters["grad_norm"],
            "clipped": (self.counters["clipped"] - before["clipped"]) / steps,
            "skipped": (self.counters["skipped"] - before["skipped"]) / steps,
            "lr_planned": self.planned_rates(planned),
            "scenes_per_s": rate,
            "loss_scale": self.counters.get("loss_scale"),
        }

    def planned_rates(self, planned: int) -> dict[str, float]:
        """The learning rates that the last update should have had, from the count of updates that were applied."""
        settings, counters = self.config.optimizer, self.counters
        skipped_last = self.state.skipping > 0
        factor = learning_rate_factor(
            counters["applied"] - (not skipped_last), planned, settings.warmup, settings.final_lr
        )
        return {group["name"]: group["peak_lr"] * factor for group in self.step.optimizer.param_groups}

    def _epochs_planned(self) -> int:
        left = self.plan.planned - (self.state.step - self.state.epoch_step)
        return max(
            self.state.epoch + 1,
            min(self.config.training.epochs, self.state.epoch + math.ceil(left / self.epoch_steps)),
        )


def validation_reading(scores: Mapping[str, Score], drift: WeightDriftMonitor) -> dict[str, Any]:
    """What a validation reports besides the scores: name of the weights -> score."""
    return {
        "weight_drift_in_validation": drift.check(),
        "scores": {
            name: {
                "prediction_hash": score.prediction_hash,
                "in_eval_mode": score.in_eval_mode,
                "loss": score.loss,
                "distance": drift.distance(score.weights),
                "held": drift.held(score.weights, drift.last),
                "scenes_hash": score.scenes_hash,
                **({"in_training_mode": score.in_training_mode} if score.in_training_mode else {}),
            }
            for name, score in scores.items()
        },
        "distance": drift.distance(drift.last),
        "first_norm": drift.size,
        "scenes": min(scores.values(), key=lambda score: score.nmse).scenes,
    }
