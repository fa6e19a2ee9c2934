"""The training loop: epochs of steps, validation, checkpoints, the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.open_source import open_source, widened_sector
from ris_fast.data.source import SceneSource, epoch_batches
from ris_fast.models import build_model
from ris_fast.physics.baselines import baselines, mean_covariance
from ris_fast.physics.scenes import Scenes
from ris_fast.training.capture import CapturedCall, CapturedStep
from ris_fast.training.compiled_model import choose_device, compile_now, compiled
from ris_fast.training.footprint import refuse_too_large
from ris_fast.training.loss import CovarianceLoss, served_by
from ris_fast.training.parts import Built
from ris_fast.training.reporter import Observer, Reporting, Silent
from ris_fast.training.resume import restore, save, start_from
from ris_fast.training.schedule import Plan, steps_in_epoch
from ris_fast.training.state import Meter, RunState, RunStopped
from ris_fast.training.step import Step, StepResult, build_optimizer, network_inputs
from ris_fast.training.summary import info, summary
from ris_fast.training.telemetry.async_copy import Clock, DeviceTimestamp, own_stream
from ris_fast.training.telemetry.step_telemetry import WeightDriftMonitor, weight_norms
from ris_fast.training.validation import Score, classical_baseline, validate

VALIDATION_CHUNK = 1000
REPLAN_EVERY = 50  # steps between two looks at the device's clock


class Trainer(Built, Reporting):
    """One training run, from configuration to summary: `Trainer(config).fit()`.

    Its model, loss, optimizer, source, device and configuration stay those it was made with (see `Built`).

    Args:
        folder: where checkpoints go; None writes nothing.
        observer: told about the run as it goes.
        resume: continue from `folder`'s last checkpoint, or from the one of this name.
        progress: called with (scenes read, scenes in all) while data files are read and checked.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path | None = None,
        observer: Observer | None = None,
        *,
        resume: bool | str = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, Config):
            raise ConfigError(
                f"Trainer: expected a Config, got {type(config).__name__}. Make one with ris_fast.load_config(...)."
            )
        self.config, self.observer = config, observer or Silent()
        self.folder = None if folder is None else Path(folder)
        self.device = choose_device(config.training.device)
        torch.manual_seed(config.training.seed)
        self.source: SceneSource = open_source(config, self.device, progress)
        weights, notes = served_by(config.loss, self.source.lacks)
        wider, more = (
            (config, []) if resume else widened_sector(config, self.source.reach)
        )  # a run keeps the settings it began with
        self.config = config = replace(wider, loss=weights)
        self.source.notes += notes + more
        self.loss = CovarianceLoss(config.loss, config.task).to(self.device)
        self.model = build_model(config.model.name, config.task, **config.model.options).to(self.device)
        self.notes: list[str] = []  # what a person should read before training, besides the source's
        if config.training.init and not resume:
            start_from(self, config.training.init)
        self.optimizer = build_optimizer(self.model, config)
        self.network, self.compile_note = compiled(self.model, config, self.device)
        self.step = Step(self.network, self.loss, self.optimizer, config, self.device, self.model)
        self.state = RunState()
        self.started, self.clock = time.monotonic(), Clock(self.device)
        self.capture: CapturedStep | None = None
        self.validation_runner = lambda work: work()
        self.paced: tuple[int, DeviceTimestamp] | None = None
        self.optimizer_batches = 0
        self.epoch_steps = steps_in_epoch(
            self.source.size("train"), config.training.batch_size, config.training.accumulate
        )
        self.plan = Plan(config.training.epochs * self.epoch_steps, config.training.max_seconds)
        self.first_norms: Tensor | None = None
        refuse_too_large(self)
        if (group := config.training.batch_size * config.training.accumulate) > self.source.size("train"):
            self.notes.append(
                f"training.batch_size times training.accumulate is {group:,}, and an epoch has"
                f" {self.source.size('train'):,} scenes: each step takes all of them"
            )
        if resume:
            self.first_norms = weight_norms(self.model)  # the seed's, as when the run began
            restore(self, resume if isinstance(resume, str) else "last")
            self._read_counters()
        self._built = True

    # ---- the run ------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the epochs or of the time, and returns the summary."""
        with own_stream(self.device):
            return self._fit()

    def _fit(self) -> dict[str, Any]:
        self.validation = self._validation_scenes()
        constant, static = mean_covariance(self._baseline_scenes()), self.config.task.symbols == "static"
        self.baselines = baselines(constant, self.validation) | classical_baseline(
            self.model, self.network, self.validation, constant, static
        )
        self._compile()
        self._capture()
        self.observer.start(info(self))
        self._read_counters()  # steps that somebody made before are not the loop's
        finding, verdict, ended_by = None, None, {}
        self.started = time.monotonic() - self.state.seconds
        self.weight_drift, self.weight_drift_between_epochs = WeightDriftMonitor(self.model, self.first_norms), {}
        try:
            if self.state.step == 0:
                self.state.initial_nmse = self._score().nmse
                self.started = time.monotonic()
            self._epochs()
        except RunStopped as stop:
            finding, verdict = stop.finding, "stopped"
            raise
        except BaseException as error:
            verdict, ended_by = "stopped", {"ended_by": f"{type(error).__name__}: {error}"}
            if isinstance(error, KeyboardInterrupt):
                save(self, "last")
            raise
        finally:
            outcome = summary(self, verdict, [finding] if finding else []) | ended_by
            self.observer.finish(outcome)
        return outcome

    def _epochs(self) -> None:
        settings = self.config.training
        while self.state.epoch < settings.epochs and not self._time_over():
            self._epoch()
            if 0 < settings.patience <= self.state.epochs_since_best:
                break

    def _epoch(self) -> None:
        epoch_meter, window = Meter(), Meter()
        before, scenes_before = dict(self.counters), self.state.scenes_seen
        self.optimizer_batches, self.weight_drift_between_epochs, self.paced = 0, self.weight_drift.check(), None
        self.model.train()
        self.clock.start()
        for result in self._results():
            self._advance(result.scenes)
            window.add(result)
            if self.step.telemetry.due(self.state.step):
                self._order_report(window, self.state.scenes_seen - scenes_before)
                epoch_meter.join(window)
                window = Meter()
            if self._time_over():
                break
        epoch_meter.join(window)
        self._deliver_report()
        rate = (self.state.scenes_seen - scenes_before) / max(self.clock.record().seconds() - self.clock.began, 1e-9)
        self._check_steps(epoch_meter.steps, before)
        self._close_epoch(epoch_meter, before, rate)

    def _results(self) -> Iterator[StepResult]:
        """Makes the epoch's steps, one at a time."""
        if self.capture is None:
            for group in self._groups():
                self.planned = self.plan.planned
                yield self.step(group, self.planned)
            return
        for indices in self._index_groups():
            self.optimizer_batches, self.planned = self.optimizer_batches + 1, self.plan.planned
            yield self.capture(indices, self.planned)

    def _advance(self, scenes: int) -> None:
        """Counts one attempted step."""
        state = self.state
        state.step, state.epoch_step, state.scenes_seen = (
            state.step + 1,
            state.epoch_step + 1,
            state.scenes_seen + scenes,
        )
        state.seconds = time.monotonic() - self.started
        if state.step in (5, 10, 20) or state.step % REPLAN_EVERY == 0:
            self._replan_schedule()

    def _replan_schedule(self) -> None:
        """Re-plans the schedule where time is the limit; on a GPU by the time at which it was here before.

        That is long past as a rule; where it is not, waiting for it keeps the host less than 2 REPLAN_EVERY steps ahead.
        """
        before, self.paced = self.paced, (self.state.step, self.clock.record())
        step, moment = (self.paced if self.device.type == "cpu" else before) or (0, None)
        if moment is not None:
            self.plan.update(step, moment.seconds() - self.started)

    def _groups(self) -> Iterator[list[Scenes]]:
        """The epoch's scenes in groups of `accumulate` micro-batches, from where the run stands."""
        for indices in self._index_groups():
            group = [self.source.batch("train", index) for index in indices]
            self.optimizer_batches += 1
            yield group

    def _index_groups(self) -> Iterator[list[Tensor]]:
        """The numbers of those scenes."""
        settings = self.config.training
        batches = list(
            epoch_batches(
                self.source, "train", self.state.epoch, settings.batch_size, settings.seed, self.config.data.fixed
            )
        )
        for first in range(self.state.epoch_step * settings.accumulate, len(batches), settings.accumulate):
            yield batches[first : first + settings.accumulate]

    # ---- validation, checkpoints, summary -----------------------------------------------------------------------

    def _close_epoch(self, meter: Meter, before: dict[str, int], rate: float) -> None:
        self.weight_drift.check()
        meter.read()
        raw = self._score()
        ema = self._score(averaged=True) if self.optimizer.ema_decay else None
        state = self.state
        state.train_loss, state.val_nmse_raw = meter.mean_loss(), raw.nmse
        state.val_nmse_ema = ema.nmse if ema else math.nan
        state.seconds = time.monotonic() - self.started
        row = (
            self._where()
            | self._figures(meter, before, rate, self.planned)
            | {
                "val_loss": raw.loss,
                "val_nmse_raw": raw.nmse,
                "val_nmse_median": raw.median,
                "val_nmse_ema": ema.nmse if ema else None,
                "health": self._validation_reading(meter, raw, ema),
            }
        )
        weights, score = ("ema", ema) if ema and ema.nmse < raw.nmse else ("raw", raw)
        better = score.nmse < state.best_nmse
        state.epochs_since_best = 0 if better else state.epochs_since_best + 1
        state.epoch, state.epoch_step = state.epoch + 1, 0
        if better:
            state.best_nmse, state.best_weights = score.nmse, weights
            save(self, "best")
        if state.epoch % self.config.report.checkpoint_epochs == 0 or self._time_over():
            save(self, "last")
        self.plan.update(state.step, state.seconds)
        self.observer.epoch(row)

    def _validation_reading(self, meter: Meter, raw: Score, ema: Score | None) -> dict[str, Any]:
        """What the epoch and its validation say of themselves, besides the scores."""
        scores = {"raw": raw} | ({"ema": ema} if ema else {})
        resumed_after = self.state.epoch_step - meter.steps
        return {
            "steps": meter.steps,
            "optimizer_batches": self.optimizer_batches,
            "epoch_steps": self.epoch_steps - resumed_after,
            "cut_short": self._time_over(),
            "weight_drift_between_epochs": self.weight_drift_between_epochs,
            "weight_drift_in_validation": self.weight_drift.check(),
            "scores": {
                name: {
                    "prediction_hash": score.prediction_hash,
                    "in_eval_mode": score.in_eval_mode,
                    "loss": score.loss,
                    "distance": self.weight_drift.distance(score.weights),
                }
                for name, score in scores.items()
            },
            "distance": self.weight_drift.distance(self.weight_drift.last),
            "first_norm": self.weight_drift.size,
        }

    def _score(self, averaged: bool = False) -> Score:
        def score() -> Score:
            return validate(self.model, self.step.predict, self.loss, self.validation, self.validation_runner)

        if not averaged:
            return score()
        with self.optimizer.ema():
            return score()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    # ---- small things -------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        """Compiles before the clock of the run starts, on a batch that trains nothing, unless preflight has done so."""
        if self.step.network is not self.network or not self.network.compiled or self.network.ready:
            return
        size = self.config.training.batch_size
        if self.source.size("train") < size:
            self.compile_note = f"eager: no batch reaches {size} scenes, so that compiling would not pay"
            return
        scenes = self.source.batch("train", torch.arange(size, device=self.source.index_device))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def train() -> None:
            torch.autograd.grad(self.loss(self.step.predict(scenes), scenes)[0], trained, allow_unused=True)

        self.compile_note = compile_now(self.network, train, self.device)

    def _capture(self) -> None:
        """On CUDA, steps and validation become graphs; the note says why where they do not."""
        if self.device.type != "cuda":
            return
        self.capture = CapturedStep(self.step, self.source, self.config)
        if self.config.training.capture:
            self.validation_runner = CapturedCall("validation")
        refused = self.capture.refused
        self.compile_note += (
            f"; steps launched kernel by kernel: {refused}" if refused else "; each step one CUDA graph"
        )

    def _validation_scenes(self) -> list[Scenes]:
        size = min(self.config.data.val_limit, self.source.size("val"))
        batches = [self.source.batch("val", index) for index in torch.arange(size).split(VALIDATION_CHUNK)]
        for scenes in batches:
            self.network.remember(*network_inputs(scenes))
        return batches

    def _baseline_scenes(self) -> Iterator[Scenes]:
        size = min(4 * VALIDATION_CHUNK, self.source.size("train"))
        return (self.source.batch("train", index) for index in torch.arange(size).split(VALIDATION_CHUNK))
