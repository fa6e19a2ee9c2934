"""The training loop: epochs of steps, validation, checkpoints and what the observers are told."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Protocol

import torch

from ris_fast.config import Config
from ris_fast.data.source import SceneSource, epoch_batches, open_source
from ris_fast.models import build_model
from ris_fast.models.prediction import Prediction
from ris_fast.physics.floors import floors
from ris_fast.physics.scenes import Scenes
from ris_fast.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from ris_fast.training.devices import choose_device, compiled
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.schedule import Plan, learning_rate_factor, steps_in_epoch
from ris_fast.training.state import Meter, RunState, RunStopped
from ris_fast.training.step import Step, build_optimizer, network_inputs
from ris_fast.training.telemetry import Milestones
from ris_fast.training.validation import Score, scene_nmse, validate

LEARNED = 0.95        # a network has learned when it is below this share of the lowest floor and of its own start
VALIDATION_CHUNK = 1000


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


class Trainer:
    """One training run, from configuration to summary: `Trainer(config).fit()`.

    Args:
        folder: where checkpoints go; None writes nothing.
        observer: told about the run as it goes.
        resume: continue from `folder`'s last checkpoint.
    """

    def __init__(self, config: Config, folder: Path | None = None, observer: Observer | None = None, *,
                 resume: bool = False) -> None:
        self.config, self.folder, self.observer = config, folder, observer or Silent()
        self.device = choose_device(config.training.device)
        torch.manual_seed(config.training.seed)
        self.source: SceneSource = open_source(config, self.device)
        self.loss = CovarianceLoss(config.loss, config.task).to(self.device)
        self.model = build_model(config.model.name, config.task, **config.model.options).to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.network, self.compile_note = compiled(self.model, config, self.device)
        self.step = Step(self.network, self.loss, self.optimizer, config, self.device, self.model)
        self.state = RunState()
        self.started = time.monotonic()
        self.counters = dict.fromkeys(("attempted", "applied", "clipped", "skipped"), 0)
        self.skipping = self.groups_read = self.planned = 0
        self.epoch_steps = steps_in_epoch(self.source.size("train"), config.training.batch_size,
                                          config.training.accumulate)
        self.plan = Plan(config.training.epochs * self.epoch_steps, config.training.max_seconds)
        if resume:
            self._restore()

    # ---- the run ------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the epochs or of the time, and returns the summary."""
        self.validation = self._validation_scenes()
        self.floors = floors(self._floor_scenes(), self.validation) | self._classical_floor()
        self.observer.start(self._info())
        finding, verdict = None, None
        self.started = time.monotonic() - self.state.seconds
        self.milestones, self.between_epochs = Milestones(self.model), {}
        try:
            if self.state.step == 0:
                self.state.initial_nmse = self._score().nmse
                self.started = time.monotonic()
            self._epochs()
        except RunStopped as stop:
            finding, verdict = stop.finding, "stopped"
            raise
        except BaseException as error:
            verdict = "stopped"
            if isinstance(error, KeyboardInterrupt):
                self._save("last")
            raise
        finally:
            summary = self._summary(verdict, [finding] if finding else [])
            self.observer.finish(summary)
        return summary

    def _epochs(self) -> None:
        settings = self.config.training
        while self.state.epoch < settings.epochs and not self._time_over():
            self._epoch()
            if 0 < settings.patience <= self.state.epochs_since_best:
                break

    def _epoch(self) -> None:
        epoch_meter, window = Meter(), Meter()
        before, began, scenes_before = dict(self.counters), time.monotonic(), self.state.scenes_seen
        self.groups_read, self.between_epochs = 0, self.milestones.pass_by()
        self.model.train()
        for group in self._groups():
            self.planned = self.plan.planned
            result = self.step(group, self.planned)
            self._advance(result.scenes)
            epoch_meter.add(result)
            window.add(result)
            if self.step.telemetry.due(self.state.step):
                self._report_step(window, began, scenes_before)
                window = Meter()
            if self._time_over():
                break
        self._synchronize()
        rate = (self.state.scenes_seen - scenes_before) / max(time.monotonic() - began, 1e-9)
        self._check_steps(epoch_meter.steps, before)
        self._close_epoch(epoch_meter, before, rate)

    def _advance(self, scenes: int) -> None:
        """Counts one attempted step, and re-plans the schedule now and then where time is the limit."""
        state = self.state
        state.step, state.epoch_step, state.scenes_seen = state.step + 1, state.epoch_step + 1, state.scenes_seen + scenes
        state.seconds = time.monotonic() - self.started
        if self.config.training.max_seconds and (state.step in (5, 10, 20) or state.step % 50 == 0):
            self._synchronize()
            state.seconds = time.monotonic() - self.started
            self.plan.update(state.step, state.seconds)

    def _groups(self) -> Iterator[list[Scenes]]:
        """The epoch's scenes in groups of `accumulate` micro-batches, from where the run stands."""
        settings = self.config.training
        batches = list(epoch_batches(self.source, "train", self.state.epoch, settings.batch_size, settings.seed,
                                     self.config.data.fixed))
        for first in range(self.state.epoch_step * settings.accumulate, len(batches), settings.accumulate):
            group = [self.source.batch("train", index) for index in batches[first:first + settings.accumulate]]
            self.groups_read += 1
            yield group

    # ---- what must hold -----------------------------------------------------------------------------------------

    def _check_steps(self, made: int, before: dict[str, int]) -> None:
        """Attempted steps must be what the data imply, and most of them must have been applied."""
        self._read_counters()
        attempted = self.counters["attempted"] - before["attempted"]
        if self.state.epoch_step >= self.epoch_steps or not self._time_over():
            expected = self.epoch_steps - (self.state.epoch_step - made)
            if attempted != expected:
                raise RunStopped(f"Epoch {self.state.epoch + 1} made {attempted} optimizer steps; its scenes, batch size "
                                 f"and accumulation imply {expected}. The loop does not step once a group; the run ends.",
                                 "steps_differ_from_data")
        applied = self.counters["applied"] - before["applied"]
        if applied < self.config.health.min_applied * attempted:
            raise RunStopped(f"Only {applied} of {attempted} optimizer steps of epoch {self.state.epoch + 1} were applied; "
                             f"the others had a non-finite gradient, first in '{self.counters.get('first_bad_tensor')}'.",
                             "steps_skipped")

    def _report_step(self, window: Meter, began: float, scenes_before: int) -> None:
        previous = dict(self.counters)
        self._read_counters()
        all_skipped = self.counters["skipped"] - previous["skipped"] >= window.steps
        self.skipping = self.skipping + window.steps if all_skipped else 0
        if self.skipping >= self.config.training.max_skipped:
            raise RunStopped(f"Every gradient of the last {self.skipping} steps was non-finite, first in "
                             f"'{self.counters.get('first_bad_tensor')}'. No step was applied; the weights are unharmed.",
                             "steps_skipped")
        rate = (self.state.scenes_seen - scenes_before) / max(time.monotonic() - began, 1e-9)
        row = self._row(window, previous, rate)
        row["health"] = self.step.telemetry.read(self.state.epoch) | {
            "steps": window.steps, "attempted": self.counters["attempted"] - previous["attempted"],
            "skipped": self.counters["skipped"] - previous["skipped"], "applied": self.counters["applied"]}
        self.observer.step(row)

    def _read_counters(self) -> None:
        self.counters = self.optimizer.counters()

    def _row(self, meter: Meter, before: dict[str, int], rate: float) -> dict[str, Any]:
        steps = max(1, self.counters["attempted"] - before["attempted"])
        return {"epoch": self.state.epoch + 1, "epochs": self._epochs_planned(), "step": self.state.step,
                "scenes_seen": self.state.scenes_seen, "seconds": self.state.seconds, "train_loss": meter.mean_loss(),
                "terms": meter.mean_terms(self.loss.weights), "grad_norm": self.counters["grad_norm"],
                "clipped": (self.counters["clipped"] - before["clipped"]) / steps,
                "skipped": (self.counters["skipped"] - before["skipped"]) / steps,
                "lr": self.step.learning_rates(), "lr_planned": self._planned_rates(), "planned_steps": self.plan.planned,
                "scenes_per_s": rate, "loss_scale": self.counters.get("loss_scale")}

    def _planned_rates(self) -> dict[str, float]:
        """The learning rates that the last update should have had, from the count of updates that were applied."""
        settings, counters = self.config.optimizer, self.counters
        skipped_last = self.skipping > 0
        factor = learning_rate_factor(counters["applied"] - (not skipped_last), self.planned, settings.warmup,
                                      settings.final_lr)
        return {group["name"]: group["peak_lr"] * factor for group in self.optimizer.param_groups}

    def _epochs_planned(self) -> int:
        return max(self.state.epoch + 1, min(self.config.training.epochs, math.ceil(self.plan.planned / self.epoch_steps)))

    # ---- validation, checkpoints, summary -----------------------------------------------------------------------

    def _close_epoch(self, meter: Meter, before: dict[str, int], rate: float) -> None:
        self.milestones.pass_by()
        raw = self._score()
        ema = self._score(averaged=True) if self.optimizer.ema_decay else None
        state = self.state
        state.train_loss, state.val_nmse_raw = meter.mean_loss(), raw.nmse
        state.val_nmse_ema = ema.nmse if ema else math.nan
        state.seconds = time.monotonic() - self.started
        row = self._row(meter, before, rate) | {
            "val_loss": raw.loss, "val_nmse_raw": raw.nmse, "val_nmse_median": raw.median,
            "val_nmse_ema": ema.nmse if ema else None, "health": self._validation_reading(meter, raw, ema)}
        weights, score = ("ema", ema) if ema and ema.nmse < raw.nmse else ("raw", raw)
        better = score.nmse < state.best_nmse
        state.epochs_since_best = 0 if better else state.epochs_since_best + 1
        state.epoch, state.epoch_step = state.epoch + 1, 0
        if better:
            state.best_nmse, state.best_weights = score.nmse, weights
            self._save("best")
        if state.epoch % self.config.report.checkpoint_epochs == 0 or self._time_over():
            self._save("last")
        self.plan.update(state.step, state.seconds)
        self.observer.epoch(row)

    def _validation_reading(self, meter: Meter, raw: Score, ema: Score | None) -> dict[str, Any]:
        """What the epoch and its validation say of themselves, besides the scores."""
        scores = {"raw": raw} | ({"ema": ema} if ema else {})
        return {"steps": meter.steps, "groups_read": self.groups_read, "epoch_steps": self.epoch_steps,
                "cut_short": self._time_over(), "between_epochs": self.between_epochs, "around_validation": self.milestones.pass_by(),
                "scores": {name: {"answers": score.answers, "asleep": score.asleep, "loss": score.loss,
                                  "distance": self.milestones.distance(score.weights)}
                           for name, score in scores.items()},
                "distance": self.milestones.distance(self.milestones.last)}

    def _score(self, averaged: bool = False) -> Score:
        def score() -> Score:
            return validate(self.model, self.step.predict, self.loss, self.validation)

        if not averaged:
            return score()
        with self.optimizer.ema():
            return score()

    def _save(self, name: str) -> None:
        if self.folder is None:
            return
        groups = {"model": self.model.state_dict(), **self.optimizer.checkpoint_tensors()}
        if self.optimizer.ema_decay:
            with self.optimizer.ema():
                groups["ema"] = {key: value.clone() for key, value in self.model.state_dict().items()}
        save_checkpoint(self.folder / "checkpoints", name, groups,
                        {"state": self.state.to_json(), "planned_steps": self.plan.planned,
                         "model": self.config.model.name, "parameters": self.parameters})

    def _restore(self) -> None:
        groups, manifest = load_checkpoint(self.folder / "checkpoints", "last")
        load_weights(self.model, groups.pop("model"), str(self.folder))
        groups.pop("ema", None)
        self.optimizer.load_checkpoint_tensors(groups)
        self.state = RunState.from_json(manifest["state"])
        self.plan = replace(self.plan, planned=manifest["planned_steps"] if self.config.training.max_seconds else 0)
        self._read_counters()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def _summary(self, verdict: str | None, findings: list[str]) -> dict[str, Any]:
        state, seconds = self.state, max(self.state.seconds, 1e-9)
        best = state.best_nmse if math.isfinite(state.best_nmse) else None
        return {"verdict": verdict or ("learned" if best is not None and best < self._goal() else "stalled"),
                "parameters": self.parameters, "optimizer_steps": state.step, "scenes_seen": state.scenes_seen,
                "scenes_per_s": state.scenes_seen / seconds, "seconds": state.seconds, "epochs": state.epoch,
                "train_loss": state.train_loss, "initial_val_nmse": state.initial_nmse,
                "val_nmse_raw": state.val_nmse_raw, "val_nmse_ema": state.val_nmse_ema, "best_val_nmse": best,
                "best_weights": state.best_weights, "floors": self.floors, "findings": findings,
                "skipped_steps": self.counters["skipped"]}

    def _goal(self) -> float:
        """Below this a network has learned: clearly under its own start and every constant answer, and better than
        what its features say without it."""
        constants = [self.floors[name] for name in ("zero", "identity", "mean")]
        return min(LEARNED * min(self.state.initial_nmse, *constants), *self.floors.values())

    def _info(self) -> dict[str, Any]:
        training = self.config.training
        return {"preset": self.config.preset, "model": self.config.model.name, "parameters": self.parameters,
                "device": str(self.device), "precision": training.precision, "source": self.source.describe(),
                "notes": self.source.notes,
                "train_scenes": self.source.size("train"), "batch_size": training.batch_size,
                "accumulate": training.accumulate, "epochs": training.epochs, "max_seconds": training.max_seconds,
                "planned_steps": self.plan.planned, "floors": self.floors, "compile": self.compile_note,
                "epoch_steps": self.epoch_steps, "ema_decay": self.optimizer.ema_decay,
                "optimizer_backend": self.optimizer.backend}

    # ---- small things -------------------------------------------------------------------------------------------

    def _validation_scenes(self) -> list[Scenes]:
        size = min(self.config.data.val_limit, self.source.size("val"))
        batches = [self.source.batch("val", index) for index in torch.arange(size).split(VALIDATION_CHUNK)]
        for scenes in batches:
            self.network.remember(*network_inputs(scenes))
        return batches

    def _floor_scenes(self) -> Iterator[Scenes]:
        size = min(4 * VALIDATION_CHUNK, self.source.size("train"))
        return (self.source.batch("train", index) for index in torch.arange(size).split(VALIDATION_CHUNK))

    @torch.no_grad()
    def _classical_floor(self) -> dict[str, float]:
        """NMSE of what the network's features say without it, where they say anything."""
        if not hasattr(self.model, "classical"):
            return {}
        scores = []
        for scenes in self.validation:
            name, factor = self.model.classical(self.network.inputs(*network_inputs(scenes)))
            scores.append(scene_nmse(Prediction(factor), scenes).double())
        return {name: torch.cat(scores).mean().item()}

    def _time_over(self) -> bool:
        limit = self.config.training.max_seconds
        return limit > 0 and time.monotonic() - self.started >= limit

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
