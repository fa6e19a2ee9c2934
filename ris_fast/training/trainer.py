"""The training loop: epochs of steps, validation, checkpoints, the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.open_source import open_source
from ris_fast.data.prefetch import reads_ahead, scene_groups
from ris_fast.data.source import SceneSource, epoch_batches
from ris_fast.environment import keep_freed_memory
from ris_fast.files import BEST, CHECKPOINTS, LAST
from ris_fast.models.modes import eval_mode, has_dropout
from ris_fast.physics.scenes import Scenes
from ris_fast.training.callback import Callback, callback_list, check_callbacks, from_observer, step_callbacks
from ris_fast.training.capture import CapturedCall, CapturedStep
from ris_fast.training.checkpoint_writer import CheckpointWriter
from ris_fast.training.comparisons import CHUNK, Comparisons, compare
from ris_fast.training.compiled_model import compiled
from ris_fast.training.contract import check_contract
from ris_fast.training.footprint import refuse_too_large
from ris_fast.training.interrupts import interrupts_held
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.parts import Built, network_of, with_objects
from ris_fast.training.precision import refuse_tf32
from ris_fast.training.preparation import compile_step, served, shared_out, with_precision
from ris_fast.training.ranks.agreement import Agreement
from ris_fast.training.ranks.group import Ranks, join, rank_device
from ris_fast.training.ranks.lost import RankLost
from ris_fast.training.ranks.rank_telemetry import RankTelemetry
from ris_fast.training.ranks.reduction import GradientReduction
from ris_fast.training.reporter import MetricsReporter, validation_reading
from ris_fast.training.resume import Found, changed_sources, find, finished, restore, run_facts, start_from, tensors_of
from ris_fast.training.scene_scores import Division, divisions
from ris_fast.training.schedule import Plan, steps_in_epoch
from ris_fast.training.state import EpochMeters, Meter, RunState, RunStopped, trainable
from ris_fast.training.step import Group, Step, build_optimizer, network_inputs, own_schedule
from ris_fast.training.step_result import StepResult
from ris_fast.training.step_seed import seed_step
from ris_fast.training.summary import info, summary
from ris_fast.training.telemetry.async_copy import Clock, DeviceTimestamp, own_stream
from ris_fast.training.telemetry.settings import RunSettings, describe_settings
from ris_fast.training.telemetry.step_telemetry import WeightDriftMonitor, weight_norms
from ris_fast.training.validation import Score, ValidationShare, scene_nmse, validate

REPLAN_EVERY = 50  # steps between two looks at the device's clock
APART, LOOKS, FEW_SCENES = 2.0, 3, 64  # times training: validation is far above it; epochs and scenes to see why


class Trainer(Built):
    """One training run, from configuration to summary: `Trainer(config).fit()`.

    Its model, loss, optimizer, source, device and configuration stay those it was made with (see `Built`).

    Args:
        config: the settings, such as `load_config` makes them.
        folder: where checkpoints go; None writes nothing.
        model: a network of your own in place of the one that `config.model` names; docs/own-network.md is its contract.
            It is trained in place; `trainer.model` is what the trainer makes of it, with the same parameters.
        loss: one more term of your own, as `CovarianceLoss` takes it, with the weight `config.loss.own_weight`.
        callbacks: called as the run proceeds, in order; also `trainer.callbacks`, a list that may be changed before
            `fit`. With several ranks each calls its own; `trainer.ranks.first` is true on the one that writes.
        resume: continue from `folder`'s last checkpoint, or from the one of this name.
        ranks: the processes that train it together; those that torchrun has started by default.
        progress: called with (scenes read, scenes in all) while data files are read and checked.
        observer: what `callbacks` was in earlier versions.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        model: nn.Module | None = None,
        loss: Callable[..., Tensor] | None = None,
        resume: bool | str = False,
        progress: Callable[[int, int], None] | None = None,
        observer: Any = None,
        ranks: Ranks | None = None,
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(
                f"Trainer: expected a Config, got {type(config).__name__}. Make one with ris_fast.load_config(...)."
            )
        self.callbacks = callback_list(callbacks, observer)
        self.folder = None if folder is None else Path(folder)
        self.device = rank_device(config.training.device)
        self.ranks = join(self.device) if ranks is None else ranks
        if self.device.type == "cpu":
            keep_freed_memory()
        config = with_objects(config, model, loss)
        torch.manual_seed(config.training.seed)
        self.source: SceneSource = open_source(config, self.device, progress)
        self.config = config = served(config, self.source, resumed=bool(resume))
        found = self._found(resume if isinstance(resume, str) else LAST) if resume else None
        self.loss = CovarianceLoss(config.loss, config.task, loss).to(self.device)
        self.model = network_of(config, model).to(self.device)
        # What a person should read before training, besides the source's.
        self.notes: list[str] = check_contract(self.model, self.loss, config, self.source)
        self.notes += [] if found is None else changed_sources(found.manifest, config)
        if config.training.init and not resume:
            self.notes += start_from(config.training.init, self.model, self.ranks)
        if config.training.precision == "auto":
            config, notes = with_precision(config, found, self.model, self.loss, self.source, self.ranks)
            self.notes += notes
        refuse_tf32(self.device, config.training.precision)
        config, notes = shared_out(config, self.source, found, self.ranks)
        self.config = config
        self.optimizer = build_optimizer(self.model, config)
        self.network, self.compile_note = compiled(self.model, config, self.device)
        self.step = Step(self.network, self.loss, self.optimizer, config, self.device, self.model)
        self.capture: CapturedStep | None = None  # the step as a graph, on CUDA
        self.writer = CheckpointWriter()
        self.validation_runner: Callable[[Callable[[], Any]], Any] = lambda work: work()

        training, scenes = config.training, self.source.size("train")
        self.micro_batch = training.batch_size * self.ranks.size  # scenes, on all ranks
        self.epoch_steps = self.epoch_left = steps_in_epoch(scenes, self.micro_batch, training.accumulate)
        self.plan = Plan(training.epochs * self.epoch_steps, training.max_seconds)
        self.planned = 0  # length of the schedule that the last step used
        self.state = RunState()
        self.started, self.clock = time.monotonic(), Clock(self.device)  # started: when, had nothing interrupted it
        self.saved = self.started  # when the last checkpoint was
        self.replanned_at: tuple[int, DeviceTimestamp] | None = None
        self.optimizer_batches = 0  # of the epoch, that were read
        self.batches: Iterator[Any] = iter(())  # of the epoch, still to come
        self.preflight: list[str] = []  # names of the checks that the run has passed, before a resumption too
        self.meters, self.resumed_meters = EpochMeters(), None  # of the epoch under way; what a checkpoint had of it
        self.attempted: int | None = None  # within a step: the optimizer's steps before it
        self.last_scenes = 0  # of the last step
        self.agreement = Agreement(self.ranks)
        self.validation: list[Scenes] = []  # this and what follows: from the start of `fit`
        self.validation_divisions: dict[str, Division] = {}  # ways to divide them
        self.looked_apart = 0  # epochs in which training scenes were scored in evaluation mode
        self.comparisons = Comparisons()
        self.first_norms: Tensor | None = None  # of the weights that a resumed run began with
        self.weight_drift: WeightDriftMonitor | None = None
        self.weight_drift_between_epochs: dict[str, Any] = {}
        refuse_too_large(self)
        self.notes += notes
        if found is not None:
            self._restore(found)
        self._share_start()
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
            self.agreement = Agreement(self.ranks)
            if not self.ranks.alone:
                self.step.reduction = GradientReduction(self.ranks, self.optimizer)
                capacity = self.config.training.batch_size * self.config.training.accumulate
                self.step.telemetry.ranks = RankTelemetry(self.ranks, self.model, self.optimizer, capacity)
            try:
                with self.agreement.signals_held():
                    return self._fit()
            finally:
                self.step.reduction = self.step.telemetry.ranks = None

    def _prepare(self) -> None:
        """What comes before the clock of the run starts: scenes to validate, baselines, compiling."""
        self.validation = self.validation or self._validation_scenes()  # the network knows them by their identity
        self.comparisons = self.ranks.by_first(self._compare)
        self.step.telemetry.know_validation(self.validation)
        self.validation_divisions = divisions(self.validation) if self.ranks.alone else {}
        self._compile()
        self._capture()

    def _fit(self) -> dict[str, Any]:
        self.reporter.settings = RunSettings(self.model, self.loss, self.optimizer, self.config, self._announced())
        with self.agreement.held():
            self._notify("on_train_start", self._info())
        self.reporter.settings.begin()  # with what a callback has set
        self._ends(now=True)
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
            while not finished(settings, self.state, by_time=False) and not self._ends(now=True):
                self._epoch()
            if self.state.step > begun:
                self.save_last()
        except RunStopped as stop:
            findings, verdict = [stop.finding], "stopped"
            raise
        except BaseException as error:
            verdict, ended_by = "stopped", {"ended_by": f"{type(error).__name__}: {error}"}
            if isinstance(error, (KeyboardInterrupt, RankLost)) and not self._broken_off():
                self.save_last()
            raise
        finally:
            if isinstance(self.batches, Generator):
                self.batches.close()  # ends a thread that reads ahead
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
        self.optimizer_batches, self.replanned_at, self.epoch_left = 0, None, self._steps_left()
        self.weight_drift_between_epochs = self.weight_drift.check()
        self.step.telemetry.begin_epoch()
        self.model.train()
        self.clock.start()
        # A captured step makes its scenes itself, from their numbers.
        plain = self.capture is None or reads_ahead(self.source)
        step, batches = (self.step, self._groups()) if plain else (self.capture, self._index_groups())
        self.batches = batches
        for batch in batches:
            self._save_if_due()
            self._expect(batch.neighbour)
            self.planned = self.plan.planned
            for callback in listeners:
                callback.on_step_start()
            with interrupts_held():
                self._step(lambda batch=batch: step(batch, self.planned), listeners, meters.window)
            if reported := reporter.due(state.step):
                meters.window.join_ranks(self.ranks.sum_)
                self._log(reporter.enqueue(meters.window, state.scenes_seen - scenes_before, self.planned))
                meters.close_window()
            if self._ends(now=reported):
                break
        meters.window.join_ranks(self.ranks.sum_)
        meters.close_window()
        self._log(reporter.flush())
        self._ends(now=True)
        rate = (state.scenes_seen - scenes_before) / max(self.clock.record().seconds() - self.clock.began, 1e-9)
        reporter.check_epoch(state.epoch_step - begun, self.epoch_left, before, cut_short=self.agreement.over)
        self._close_epoch(meters, state.epoch_step - begun, rate)

    def _begun_meters(self, counters: dict[str, Any]) -> EpochMeters:
        """Those of the epoch that begins, or those that a checkpoint within it had."""
        meters, self.resumed_meters = self.resumed_meters or EpochMeters(before=counters), None
        if not self.ranks.alone:  # what each rank measures from here on is summed over them
            meters.close_window()
            meters.reported = {}
        self.reporter.counters = {**counters, **meters.reported}
        if self.state.step and not self.step.rates:  # what the last update had, where the epoch may have none to come
            self.planned = self.plan.planned
            self.step.rates = list(self.reporter.planned_rates(self.planned).values())
        return meters

    def _step(self, step: Callable[[], StepResult], listeners: list[Callback], window: Meter) -> None:
        """One step and its count, which follows whatever a callback raises: weights and count belong together."""
        self.attempted = self.optimizer.attempted_steps()
        seed_step(self.device, self.config.training.seed, self.state.step, self.ranks.rank)
        result = step()
        self.attempted = None
        try:
            for callback in listeners:
                callback.on_step_end()
        finally:
            window.add(result)
            self._advance(result.scenes)

    def _broken_off(self) -> bool:
        """Whether a second Ctrl-C fell into an update, so that weights, moments and counts do not belong together."""
        return self.attempted is not None and self.optimizer.counters()["attempted"] != self.attempted

    def _groups(self) -> Iterator[Group]:
        """The scenes of each optimizer step, `accumulate` micro-batches, from where the run is in its epoch."""
        with closing(scene_groups(self.source, "train", self._index_groups())) as groups:
            for indices, scenes in groups:
                yield Group(scenes, indices.scenes, indices.neighbour)

    def _index_groups(self) -> Iterator[Group]:
        """The numbers of those scenes; with several ranks this one's share of each micro-batch."""
        settings, fixed, done = self.config.training, self.config.data.fixed, self.state.epoch_scenes
        epoch = self.source, "train", self.state.epoch
        batches = epoch_batches(*epoch, self.micro_batch, settings.seed, fixed, start=done)
        while group := list(islice(batches, settings.accumulate)):
            self.optimizer_batches += 1
            neighbour = group[0][(self.ranks.rank + 1) % self.ranks.size :][:1]
            yield Group(map(self.ranks.share, group), sum(map(len, group)), neighbour)

    def _expect(self, neighbour: Tensor) -> None:
        """Makes the first scene of the next rank too, by its number, (1,) or (0,), for a step whose telemetry compares
        it with what that rank is shown."""
        telemetry = self.step.telemetry
        if telemetry.ranks is not None and telemetry.next_due():
            telemetry.ranks.expected = self.source.batch("train", neighbour) if len(neighbour) else None

    def _steps_left(self) -> int:
        """Of the epoch under way."""
        scenes = self.source.size("train") - self.state.epoch_scenes
        return steps_in_epoch(scenes, self.micro_batch, self.config.training.accumulate)

    def _advance(self, scenes: int) -> None:
        """Counts one attempted step."""
        state = self.state
        self.last_scenes = scenes
        state.step, state.epoch_step = state.step + 1, state.epoch_step + 1
        state.epoch_scenes, state.scenes_seen = state.epoch_scenes + scenes, state.scenes_seen + scenes
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
            self._plan_by(step, moment.seconds() - self.started)

    def _plan_by(self, step: int, seconds: float) -> None:
        """Plans by the clock of rank 0."""
        self.plan.update(step, seconds)
        if self.plan.max_seconds > 0:
            self.plan.planned = self.ranks.from_first(self.plan.planned)

    def _ends(self, *, now: bool = False) -> bool:
        """Whether the time is over, on all ranks. Raises what ends the run on all of them: see `Agreement`."""
        limit = self.config.training.max_seconds
        over = self.agreement.after(self.state.step, 0 < limit <= time.monotonic() - self.started, now=now)
        if over:  # what a resumed run goes by, which was counted at the last step or validation
            self.state.seconds = max(self.state.seconds, limit)
        return over

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
                "epoch_steps": self.epoch_left,  # without those before a resumption
                "cut_short": self.agreement.over,
                "weight_drift_between_epochs": self.weight_drift_between_epochs,
                **self.reporter.settings_changed(),
                **self._training_in_eval_mode(row["terms"], raw.nmse),
                **validation_reading({"raw": raw} | ({"ema": ema} if ema else {}), self.weight_drift),
            },
        }
        with interrupts_held():  # an epoch is counted, its best weights are saved and its row is written, or none of it
            weights, score = ("ema", ema) if ema and ema.nmse < raw.nmse else ("raw", raw)
            better = score.nmse < state.best_nmse
            state.epochs_since_best = 0 if better else state.epochs_since_best + 1
            state.epoch, state.epoch_step, state.epoch_scenes = state.epoch + 1, 0, 0
            self.meters = EpochMeters()
            self._plan_by(state.step, state.seconds)
            if better:
                state.best_nmse, state.best_weights = score.nmse, weights
                self._save(BEST)
            with self.agreement.held():
                self._notify("on_epoch_end", row)

    def _training_in_eval_mode(self, trained: dict[str, dict[str, float]], validated: float) -> dict[str, Any]:
        """Where validation is far above training: what the raw weights score on scenes of this epoch as validation
        scores its own, which tells another mode or other weights from other scenes. In the first such epochs alone."""
        term = trained.get("cov_pred") or (trained.get("cov") if self.config.loss.beta == 0.0 else None)
        if term is None or not APART * term["raw"] < validated or self.looked_apart >= LOOKS or not self.ranks.alone:
            return {}
        self.looked_apart += 1
        settings, fixed = self.config.training, self.config.data.fixed
        order = epoch_batches(self.source, "train", self.state.epoch, FEW_SCENES, settings.seed, fixed)
        scenes = self.source.batch("train", next(order))
        with torch.no_grad(), eval_mode(self.model):
            nmse = scene_nmse(self.step.predict(scenes), scenes).mean().item()
        return {"training_in_eval_mode": {"scenes": scenes.batch, "nmse": nmse, "trained": term["raw"]}}

    def _score(self, averaged: bool = False) -> Score:
        def score() -> Score:
            share = None if self.ranks.alone else self._validation_share()
            runner, ways = self.validation_runner, self.validation_divisions
            return validate(self.model, self.step.predict, self.loss, self.validation, runner, share, ways)

        if not averaged:
            return score()
        with self.optimizer.ema():
            return score()

    def _save(self, name: str) -> None:
        """Has a checkpoint written of the run as it is now, by rank 0; the last one has the moments too."""
        if self.folder is None or not self.ranks.first:
            return
        if name == LAST:
            self.saved = time.monotonic()
        facts = run_facts(self.config, self.source, self.state, self.plan.planned, self.model, self.ranks.size)
        tensors = tensors_of(self.model, self.optimizer, moments=name == LAST)
        if name == LAST:
            self.meters.reported = self.reporter.counters if self.reporter.pending is None else {}
            # The window of several ranks is in parts on all of them: its steps are left out, of counts too.
            meters = self.meters if self.ranks.alone else replace(self.meters, window=Meter(), reported={})
            facts["meters"] = meters.to_json()
            tensors["meters"] = {"sums": meters.sums(len(self.loss.weights), self.device)}
        self.writer.save(self.folder / CHECKPOINTS, name, tensors, facts)

    def _save_if_due(self) -> None:
        """The last checkpoint after each `report.checkpoint_seconds`; later where the one before is not on disk yet."""
        self.writer.poll()
        seconds = self.config.report.checkpoint_seconds
        if 0 < seconds <= time.monotonic() - self.saved and not self.writer.busy(LAST):
            self._save(LAST)

    def save_last(self) -> None:
        """The last checkpoint, of which one copy is in memory at a time, on disk."""
        self.writer.finish()
        self._save(LAST)
        self.writer.finish()

    def _found(self, name: str) -> Found:
        """The checkpoint to continue from, which rank 0 reads."""
        return self.ranks.by_first(lambda: find(self.folder or Path("."), name, self.config, self.source))

    def _restore(self, found: Found) -> None:
        self.first_norms = weight_norms(self.model)  # of the untrained network, as when the run began
        restore(found, self.model, self.optimizer)
        self.state = found.state
        self.plan = found.plan(self.config.training, self.epoch_steps, self._steps_left())
        self.resumed_meters = found.meters(list(self.loss.weights), self.device)
        self.notes += found.notes

    def _share_start(self) -> None:
        """Gives every rank the weights of rank 0, bit for bit."""
        for value in self.model.state_dict().values():
            self.ranks.broadcast_(value)

    # ---- what callbacks receive ---------------------------------------------------------------------------------

    def _notify(self, event: str, values: dict[str, Any]) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(values)

    def _log(self, row: dict[str, Any] | None) -> None:
        with self.agreement.held():
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
            settings=describe_settings(self.reporter.settings),
            step_callbacks=[type(each).__name__ for each in step_callbacks(self.callbacks)],
            own_callbacks=[
                type(each).__name__ for each in self.callbacks if not type(each).__module__.startswith("ris_fast.")
            ],
            own_schedule=own_schedule(self.step),
            own_source=not type(self.source).__module__.startswith("ris_fast."),
            own_order="_index_groups" in vars(self) or type(self)._index_groups is not Trainer._index_groups,
        )

    def _announced(self) -> tuple[str, ...]:
        """Beginnings of the names of settings that callbacks change on purpose."""
        named = [each.changes for each in self.callbacks]
        return tuple(name for each in named for name in ((each,) if isinstance(each, str) else each))

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
        """How many numbers are trained."""
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

    def _validation_share(self) -> ValidationShare:
        return ValidationShare(self.ranks, min(self.config.data.val_limit, self.source.size("val")), CHUNK)

    def _validation_scenes(self) -> list[Scenes]:
        """Of this rank's share; with their features, which stay the same."""
        batches = [self.source.batch("val", index) for index in self._validation_share().own()]
        for scenes in batches:
            self.network.remember(*network_inputs(scenes))
        return batches

    def _compare(self) -> Comparisons:
        whole = self.validation
        if not self.ranks.alone:
            whole = [self.source.batch("val", index) for index in self._validation_share().chunks()]
        return compare(self.model, self.network, self.source, whole, self.config.task)

    def _compile(self) -> None:
        note = compile_step(self.network, self.step, self.source, self.model, self.ranks)
        self.compile_note = note or self.compile_note

    def _capture(self) -> None:
        """On CUDA, steps and validation become graphs; the note says why where they do not."""
        if self.device.type != "cuda":
            return
        self.capture = CapturedStep(self.step, self.source, self.config, ranks=self.ranks)
        if self.config.training.capture:
            self.validation_runner = CapturedCall("validation")
        refused = self.capture.refused
        self.compile_note += (
            f"; steps launched kernel by kernel: {refused}" if refused else "; each step one CUDA graph"
        )
