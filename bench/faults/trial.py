"""One watched run: what a watchdog says about a fault, or about a healthy run, and when.

A watchdog is built on a trainer that has the fault in it, is asked for its preflight, and then observes the run.
"""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bench.faults.catalogue import FAMILIES, Fault, all_faults, faulty
from bench.faults.healthy import healthy_config, with_files
from ris_fast.config.schema import Config
from ris_fast.training.callback import Callback
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer

GRACE_REPORTS = 5  # reports that an outcome rule may wait for, however short the run
PATIENCE = 24  # optimizer steps that a fault is watched beyond its limit


class Watching(Protocol):
    """What is measured: `Watchdog(trainer)`, a Callback whose `findings` are ranked, most certain first."""

    findings: Sequence[Any]

    def preflight(self) -> Sequence[Any]: ...


Build = Callable[[Trainer], Watching]


@dataclass(frozen=True)
class Outcome:
    """What was said about one run.

    `said`: causes at the moment when the first was given, most certain first, `certain` beside each. `step`:
    optimizer steps attempted until then, 0 for preflight, None if nothing was said. `limit`: the step until which
    it should be said. `crashed`: an exception that no rule foresaw. `stopped`: what ended the run by name.
    """

    name: str
    family: str
    held_out: bool
    expect: tuple[str, ...]
    said: tuple[str, ...]
    evidence: str
    step: int | None
    limit: int
    stopped: str
    crashed: str
    seconds: float
    twin_said: tuple[str, ...] = ()
    certain: tuple[bool, ...] = ()

    @property
    def detected(self) -> bool:
        return self.ever and self.step is not None and self.step <= self.limit

    @property
    def ever(self) -> bool:
        """Something was said that is not said about the healthy twin, be it late."""
        return bool(set(self.said) - set(self.twin_said))

    @property
    def named(self) -> bool:
        return self.detected and self.said[0] in self.expect and self.said[0] not in self.twin_said


class StopRun(Exception):
    """Ends a run that has told what it can."""


class Listener(Callback):
    """Comes behind the watchdog in a trainer's callbacks: notes the first finding, and ends the run then."""

    def __init__(self, trainer: Trainer, watchdog: Watching, last_step: float) -> None:
        self.trainer, self.watchdog, self.last_step = trainer, watchdog, last_step
        self.step_said: int | None = None
        self.said: tuple[str, ...] = ()
        self.certain: tuple[bool, ...] = ()
        self.evidence = ""

    def listen(self, findings: Iterable[Any], step: int) -> None:
        findings = list(findings)
        if findings and self.step_said is None:
            self.step_said, self.said = step, tuple(finding.cause for finding in findings)
            self.certain = tuple(finding.certain for finding in findings)
            self.evidence = findings[0].evidence

    def on_train_start(self, info: dict[str, Any]) -> None:
        self._after()

    def on_log(self, row: dict[str, Any]) -> None:
        self._after()

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self._after()

    def on_train_end(self, summary: dict[str, Any]) -> None:
        self.listen(self.watchdog.findings, self.trainer.state.step)

    def _after(self) -> None:
        self.listen(self.watchdog.findings, self.trainer.state.step)
        if self.said or self.trainer.state.step >= self.last_step:
            raise StopRun


def default_watchdog(trainer: Trainer) -> Watching:
    from ris_fast.health.monitor.watchdog import Watchdog

    return Watchdog(trainer)


def limit_of(fault: Fault, trainer: Trainer) -> int:
    """The optimizer step until which the fault should be named; 0: before the first."""
    kind, _, amount = fault.by.partition(":")
    if kind == "preflight":
        return 0
    if kind == "steps":
        return fault.onset + int(amount)
    report = max(trainer.config.report.every_steps, trainer.epoch_steps)
    return fault.onset + max(round(float(amount) * trainer.plan.planned), GRACE_REPORTS * report)


def watch(trainer: Trainer, build: Build, last_step: float) -> tuple[Listener, str]:
    """Preflight and, if that says nothing, the run. Returns what was heard and what stopped the run, if anything
    did."""
    listener = Listener(trainer, build(trainer), last_step)
    listener.listen(listener.watchdog.preflight(), 0)
    trainer.callbacks += [listener.watchdog, listener]
    if listener.said:
        return listener, ""
    try:
        trainer.fit()
    except StopRun:
        pass
    except RunStopped as stop:
        return listener, stop.finding
    return listener, ""


def score_fault(fault: Fault, build: Build = default_watchdog) -> Outcome:
    """Runs one fault until something is said or it is too late."""
    limit = 0

    def run() -> tuple[Listener, str]:
        nonlocal limit
        with faulty(fault) as trainer:
            limit = limit_of(fault, trainer)
            return watch(trainer, build, PATIENCE + max(limit, fault.onset + GRACE_REPORTS * trainer.epoch_steps))

    heard = observed(run)
    return Outcome(fault.name, fault.family, fault.held_out, fault.expect, limit=limit, **heard)


def twin_fault(name: str) -> Fault:
    """A healthy twin by its name, watched as long as the fault of it that takes longest."""
    faults = [fault for fault in all_faults().values() if fault.twin_name == name]
    longest = max(faults, key=lambda fault: fault.onset + _steps(fault))
    return replace(longest.healthy(), name=f"twin {name}", family=FAMILIES[0], mistake="nothing", expect=())


def _steps(fault: Fault) -> float:
    """How long a fault is watched, to compare by: a share of a run is more than a few steps."""
    kind, _, amount = fault.by.partition(":")
    return {"preflight": 0.0, "steps": float(amount or 0), "share": 40.0}[kind]


def score_healthy(number: int, build: Build = default_watchdog, config: Config | None = None) -> Outcome:
    """One whole healthy run; anything that is said is a false alarm, and so is a stop."""

    def run() -> tuple[Listener, str]:
        chosen = config or healthy_config(number)
        with tempfile.TemporaryDirectory() as place:
            trainer = Trainer(with_files(number, chosen, Path(place) / "scenes"))
            return watch(trainer, build, float("inf"))

    return Outcome(f"healthy {number}", "healthy", False, (), limit=0, **observed(run))


def observed(run: Callable[[], tuple[Listener, str]]) -> dict[str, Any]:
    """Runs it and returns what an Outcome keeps. A rule that raises is a result, not a reason to end the
    measurement."""
    began, kept = time.monotonic(), {"said": (), "evidence": "", "step": None, "stopped": "", "crashed": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            listener, stopped = run()
        kept |= {"said": listener.said, "certain": listener.certain, "evidence": listener.evidence}
        kept |= {"step": listener.step_said, "stopped": stopped}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kept["crashed"] = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return kept | {"seconds": time.monotonic() - began}
