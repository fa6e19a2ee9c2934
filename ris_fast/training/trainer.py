"""The training loop: epochs of steps, validation, checkpoints, the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.open_source import open_source, widened_sector
from ris_fast.data.source import SceneSource, epoch_batches
from ris_fast.environment import keep_freed_memory
from ris_fast.files import BEST, CHECKPOINTS, LAST
from ris_fast.models import build_model
from ris_fast.models.modes import has_dropout
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback, callback_list, check_callbacks, from_observer, step_callbacks
from ris_fast.training.capture import CapturedCall, CapturedStep
from ris_fast.training.checkpoint_writer import CheckpointWriter
from ris_fast.training.comparisons import CHUNK, Comparisons, compare
from ris_fast.training.compiled_model import choose_device, compile_now, compiled
from ris_fast.training.footprint import refuse_too_large
from ris_fast.training.interrupts import interrupts_held
from ris_fast.training.loss import CovarianceLoss, served_by
from ris_fast.training.parts import Built
from ris_fast.training.precision import choose_precision, refuse_tf32
from ris_fast.training.reporter import MetricsReporter, validation_reading
from ris_fast.training.resume import finished, precision_of, restore, run_facts, start_from, tensors_of
from ris_fast.training.schedule import Plan, steps_in_epoch
from ris_fast.training.state import EpochMeters, Meter, RunState, RunStopped, trainable
from ris_fast.training.step import Step, StepResult, build_optimizer, network_inputs
from ris_fast.training.step_seed import seed_step
from ris_fast.training.summary import info, summary
from ris_fast.training.telemetry.async_copy import Clock, DeviceTimestamp, own_stream
from ris_fast.training.telemetry.step_telemetry import WeightDriftMonitor, weight_norms
from ris_fast.training.validation import Score, validate

REPLAN_EVERY = 50  # steps between two looks at the device's clock


class Trainer(Built):
    """One training run, from configuration to summary: `Trainer(config).fit()`.

    Its model, loss, optimizer, source, device and configuration stay those it was made with (see `Built`).

    Args:
        folder: where checkpoints go; None writes nothing.
        callbacks: called as the run proceeds, in order; also `trainer.callbacks`, a list that may be changed before
            `fit`.
        resume: continue from `folder`'s last checkpoint, or from the one of this name.
        progress: called with (scenes read, scenes in all) while data files are read and checked.
        observer: what `callbacks` was in earlier versions.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        resume: bool | str = False,
        progress: Callable[[int, int], None] | None = None,
        observer: Any = None,
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(
                f"Trainer: expected a Config, got {type(config).__name__}. Make one with ris_fast.load_config(...)."
            )
        self.callbacks = callback_list(callbacks, observer)
        self.folder = None if folder is None else Path(folder)
        self.device = choose_device(config.training.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.training.seed)
        self.source: SceneSource = open_source(config, self.device, progress)
        self.config = config = self._served(config, resumed=bool(resume))
        self.loss = CovarianceLoss(config.loss, config.task).to(self.device)
        self.model = build_model(config.model.name, config.task, **config.model.options).to(self.device)
        self.notes: list[str] = []  # what a person should read before training, besides the source's
        if config.training.init and not resume:
            self.notes += start_from(config.training.init, self.model)
        checkpoint = resume if isinstance(resume, str) else LAST
        if config.training.precision == "auto":
            self.config = config = self._with_precision(checkpoint if resume else None)
        refuse_tf32(self.device, config.training.precision)
        self.optimizer = build_optimizer(self.model, config)
        self.network, self.compile_note = compiled(self.model, config, self.device)
        self.step = Step(self.network, self.loss, self.optimizer, config, self.device, self.model)
        self.capture: CapturedStep | None = None  # the step as a graph, on CUDA
        self.writer = CheckpointWriter()
        self.validation_runner: Callable[[Callable[[], Any]], Any] = lambda work: work()

        training, scenes = config.training, self.source.size("train")
        self.epoch_steps = steps_in_epoch(scenes, training.batch_size, training.accumulate)
        self.plan = Plan(training.epochs * self.epoch_steps, training.max_seconds)
        self.planned = 0  # length of the schedule that the last step used
        self.state = RunState()
        self.started, self.clock = time.monotonic(), Clock(self.device)  # started: when, had nothing interrupted it
        self.saved = self.started  # when the last checkpoint was
        self.replanned_at: tuple[int, DeviceTimestamp] | None = None
        self.optimizer_batches = 0  # of the epoch, that were read
        self.preflight: list[str] = []  # names of the checks that the run has passed, before a resumption too
        self.meters, self.resumed_meters = EpochMeters(), None  # of the epoch under way; what a checkpoint had of it
        self.attempted: int | None = None  # within a step: the optimizer's steps before it
        self.validation: list[Scenes] = []  # this and what follows: from the start of `fit`
        self.comparisons = Comparisons()
        self.first_norms: Tensor | None = None  # of the weights that a resumed run began with
        self.weight_drift: WeightDriftMonitor | None = None
        self.weight_drift_between_epochs: dict[str, Any] = {}
        refuse_too_large(self)
        if (group := training.batch_size * training.accumulate) > scenes:
            self.notes.append(
                f"training.batch_size times training.accumulate is {group:,}, and an epoch has"
                f" {scenes:,} scenes: each step takes all of them"
            )
        if resume:
            self._restore(checkpoint)
        self.reporter = MetricsReporter(config, self.step, self.state, self.plan, self.clock, self.epoch_steps)
        if resume:
            self.reporter.read_counters()
        self._built = True

    # ---- the run ------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the epochs or of the time, and returns the summary."""
        check_callbacks(self.callbacks)
        with own_stream(self.device):
            self._prepare()
            return self._fit()

    def _prepare(self) -> None:
        """What comes before the clock of the run starts: scenes to validate, baselines, compiling."""
        self.validation = self.validation or self._validation_scenes()  # the network knows them by their identity
        self.comparisons = compare(self.model, self.network, self.source, self.validation, self.config.task)
        self._compile()
        self._capture()

    def _fit(self) -> dict[str, Any]:
        self._notify("on_train_start", self._info())
        self.reporter.read_counters()  # steps that somebody made before are not the loop's
        findings, verdict, ended_by, begun = [], None, {}, self.state.step
        self.saved = time.monotonic()
        self.started = self.saved - self.state.seconds
        self.weight_drift, self.weight_drift_between_epochs = WeightDriftMonitor(self.model, self.first_norms), {}
        try:
            if self.state.step == 0:
                self.state.initial_nmse = self._score().nmse
                self.started = time.monotonic()
            settings = self.config.training
            while not finished(settings, self.state) and not self._time_over():
                self._epoch()
            if self.state.step > begun:
                self._save_last()
        except RunStopped as stop:
            findings, verdict = [stop.finding], "stopped"
            raise
        except BaseException as error:
            verdict, ended_by = "stopped", {"ended_by": f"{type(error).__name__}: {error}"}
            if isinstance(error, KeyboardInterrupt) and not self._broken_off():
                self._save_last()
            raise
        finally:
            if lost := self.writer.close():
                ended_by["checkpoint_error"] = lost
            outcome = self._summary(verdict, findings) | ended_by
            self._notify("on_summary", outcome)
            self._notify("on_train_end", outcome)
        return outcome

    def _epoch(self) -> None:
        """One epoch: its steps, their reports, then validation, checkpoints and the epoch's row."""
        reporter, state, listeners = self.reporter, self.state, step_callbacks(self.callbacks)
        before, scenes_before, begun = dict(reporter.counters), state.scenes_seen, state.epoch_step
        meters = self.meters = self._begun_meters(before)
        self.optimizer_batches, self.replanned_at = 0, None
        self.weight_drift_between_epochs = self.weight_drift.check()
        self.model.train()
        self.clock.start()
        # A captured step makes its scenes itself, from their numbers.
        step, batches = (self.step, self._groups()) if self.capture is None else (self.capture, self._index_groups())
        for batch in batches:
            self._save_if_due()
            self.planned = self.plan.planned
            for callback in listeners:
                callback.on_step_start()
            with interrupts_held():
                self._step(lambda batch=batch: step(batch, self.planned), listeners, meters.window)
            if reporter.due(state.step):
                self._log(reporter.enqueue(meters.window, state.scenes_seen - scenes_before, self.planned))
                meters.close_window()
            if self._time_over():
                break
        meters.close_window()
        self._log(reporter.flush())
        rate = (state.scenes_seen - scenes_before) / max(self.clock.record().seconds() - self.clock.began, 1e-9)
        reporter.check_epoch(state.epoch_step - begun, before, cut_short=self._time_over())
        self._close_epoch(meters, state.epoch_step - begun, rate)

    def _begun_meters(self, counters: dict[str, Any]) -> EpochMeters:
        """Those of the epoch that begins, or those that a checkpoint within it had."""
        meters, self.resumed_meters = self.resumed_meters or EpochMeters(before=counters), None
        self.reporter.counters = {**counters, **meters.reported}
        if self.state.step and not self.step.rates:  # what the last update had, where the epoch may have none to come
            self.planned = self.plan.planned
            self.step.rates = list(self.reporter.planned_rates(self.planned).values())
        return meters

    def _step(self, step: Callable[[], StepResult], listeners: list[Callback], window: Meter) -> None:
        """One step and its count, which follows whatever a callback raises: weights and count belong together."""
        self.attempted = self.optimizer.attempted_steps()
        seed_step(self.device, self.config.training.seed, self.state.step)
        result = step()
        self.attempted = None
        try:
            for callback in listeners:
                callback.on_step_end()
        finally:
            self._advance(result.scenes)
            window.add(result)

    def _broken_off(self) -> bool:
        """Whether a second Ctrl-C fell into an update, so that weights, moments and counts do not belong together."""
        return self.attempted is not None and self.optimizer.counters()["attempted"] != self.attempted

    def _groups(self) -> Iterator[list[Scenes]]:
        """The scenes of each optimizer step, `accumulate` micro-batches, from where the run is in its epoch."""
        for indices in self._index_groups():
            yield [self.source.batch("train", index) for index in indices]

    def _index_groups(self) -> Iterator[list[Tensor]]:
        """The numbers of those scenes."""
        settings, fixed = self.config.training, self.config.data.fixed
        batches = list(epoch_batches(self.source, "train", self.state.epoch, settings.batch_size, settings.seed, fixed))
        for first in range(self.state.epoch_step * settings.accumulate, len(batches), settings.accumulate):
            self.optimizer_batches += 1
            yield batches[first : first + settings.accumulate]

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

        That time is usually long past; where it is not, waiting for it keeps the host less than 2 REPLAN_EVERY steps
        ahead.
        """
        before, self.replanned_at = self.replanned_at, (self.state.step, self.clock.record())
        step, moment = (self.replanned_at if self.device.type == "cpu" else before) or (0, None)
        if moment is not None:
            self.plan.update(step, moment.seconds() - self.started)

    def _time_over(self) -> bool:
        limit = self.config.training.max_seconds
        return limit > 0 and time.monotonic() - self.started >= limit

    # ---- validation and checkpoints -----------------------------------------------------------------------------

    def _close_epoch(self, meters: EpochMeters, made: int, rate: float) -> None:
        """Args: made: steps of the epoch that this process made."""
        meter = meters.epoch
        self.weight_drift.check()
        meter.read()
        raw = self._score()
        ema = self._score(averaged=True) if self.optimizer.ema_decay else None
        state = self.state
        state.train_loss, state.val_nmse_raw = meter.mean_loss(), raw.nmse
        state.val_nmse_ema = ema.nmse if ema else math.nan
        state.seconds = time.monotonic() - self.started
        row = self.reporter.position() | self.reporter.figures(meter, meters.before, rate, self.planned)
        row |= {
            "val_loss": raw.loss,
            "val_nmse_raw": raw.nmse,
            "val_nmse_median": raw.median,
            "val_nmse_ema": ema.nmse if ema else None,
            "health": {
                "steps": made,
                "optimizer_batches": self.optimizer_batches,
                "epoch_steps": self.epoch_steps - (state.epoch_step - made),  # without those before a resumption
                "cut_short": self._time_over(),
                "weight_drift_between_epochs": self.weight_drift_between_epochs,
                **validation_reading({"raw": raw} | ({"ema": ema} if ema else {}), self.weight_drift),
            },
        }
        with interrupts_held():  # an epoch is counted, its best weights are saved and its row is written, or none of it
            weights, score = ("ema", ema) if ema and ema.nmse < raw.nmse else ("raw", raw)
            better = score.nmse < state.best_nmse
            state.epochs_since_best = 0 if better else state.epochs_since_best + 1
            state.epoch, state.epoch_step, self.meters = state.epoch + 1, 0, EpochMeters()
            self.plan.update(state.step, state.seconds)
            if better:
                state.best_nmse, state.best_weights = score.nmse, weights
                self._save(BEST)
            self._notify("on_epoch_end", row)

    def _score(self, averaged: bool = False) -> Score:
        def score() -> Score:
            return validate(self.model, self.step.predict, self.loss, self.validation, self.validation_runner)

        if not averaged:
            return score()
        with self.optimizer.ema():
            return score()

    def _save(self, name: str) -> None:
        """Has a checkpoint written of the run as it is now; the last one has the moments too."""
        if self.folder is None:
            return
        if name == LAST:
            self.saved = time.monotonic()
        facts = run_facts(self.config, self.source, self.state, self.plan.planned, self.model)
        tensors = tensors_of(self.model, self.optimizer, moments=name == LAST)
        if name == LAST:
            self.meters.reported = self.reporter.counters if self.reporter.pending is None else {}
            facts["meters"] = self.meters.to_json()
            tensors["meters"] = {"sums": self.meters.sums(len(self.loss.weights), self.device)}
        self.writer.save(self.folder / CHECKPOINTS, name, tensors, facts)

    def _save_if_due(self) -> None:
        """The last checkpoint after each `report.checkpoint_seconds`; later where the one before is not on disk yet."""
        self.writer.poll()
        seconds = self.config.report.checkpoint_seconds
        if 0 < seconds <= time.monotonic() - self.saved and not self.writer.busy(LAST):
            self._save(LAST)

    def _save_last(self) -> None:
        """The last checkpoint, of which one copy is in memory at a time, on disk."""
        self.writer.finish()
        self._save(LAST)
        self.writer.finish()

    def _restore(self, name: str) -> None:
        self.first_norms = weight_norms(self.model)  # of the untrained network, as when the run began
        found = restore(self.folder or Path("."), name, self.config, self.source, self.model, self.optimizer)
        self.state, self.plan = found.state, found.plan(self.config.training, self.epoch_steps)
        self.resumed_meters = found.meters(list(self.loss.weights), self.device)
        self.notes += found.notes

    # ---- what callbacks receive ---------------------------------------------------------------------------------

    def _notify(self, event: str, values: dict[str, Any]) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(values)

    def _log(self, row: dict[str, Any] | None) -> None:
        if row is not None:
            self._notify("on_log", row)

    def _info(self) -> dict[str, Any]:
        return info(
            self.config,
            self.source,
            parameters=self.parameters,
            device=str(self.device),
            notes=[*self.source.notes, *self.notes],
            planned_steps=self.plan.planned,
            **self.comparisons._asdict(),
            dropout=has_dropout(self.model),
            compile=self.compile_note,
            epoch_steps=self.epoch_steps,
            ema_decay=self.optimizer.ema_decay,
            preflight=self.preflight,
            optimizer_backend=self.optimizer.backend,
        )

    def _summary(self, verdict: str | None, findings: list[str]) -> dict[str, Any]:
        return summary(
            self.state,
            self.comparisons.baselines,
            verdict,
            findings,
            from_weights=bool(self.config.training.init),
            mmse_bound=self.comparisons.mmse_bound,
            parameters=self.parameters,
            skipped_steps=self.reporter.counters["skipped"],
            checkpoints=None if self.folder is None else self.writer.figures(),
        )

    @property
    def parameters(self) -> int:
        return trainable(self.model)

    @property
    def observer(self) -> NoReturn:
        raise AttributeError(
            "Trainer.observer is trainer.callbacks now, a list; the findings of attach_health are at"
            " trainer.callbacks[-1].findings."
        )

    @observer.setter
    def observer(self, value: Any) -> None:
        self.callbacks[:] = [from_observer(value)]

    # ---- preparation --------------------------------------------------------------------------------------------

    def _served(self, config: Config, *, resumed: bool) -> Config:
        """The configuration with what the data make of it; a resumed run keeps the sector it began with."""
        weights, notes = served_by(config.loss, self.source.lacks)
        wider, more = (config, []) if resumed else widened_sector(config, self.source.reach)
        self.source.notes += notes + more
        return replace(wider, loss=weights)

    def _with_precision(self, checkpoint: str | None) -> Config:
        """The configuration with the precision that the run began in, or else the one that pays on this machine."""
        precision = precision_of(self.folder or Path("."), checkpoint) if checkpoint else None
        if precision is None:
            precision, why = choose_precision(self.model, self.loss, self.source, self.device)
            self.notes.append(why)
        origins = {**self.config.provenance, "training.precision": "precision auto"}
        return replace(self.config, training=replace(self.config.training, precision=precision), provenance=origins)

    def _validation_scenes(self) -> list[Scenes]:
        size = min(self.config.data.val_limit, self.source.size("val"))
        batches = [self.source.batch("val", index) for index in torch.arange(size).split(CHUNK)]
        for scenes in batches:
            self.network.remember(*network_inputs(scenes))
        return batches

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
