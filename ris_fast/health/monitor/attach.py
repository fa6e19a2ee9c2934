"""Puts the watch around a trainer: preflight first, then an observer that judges each row after others have seen it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ris_fast.health.finding import Finding, explained
from ris_fast.health.monitor.watchdog import STOPPING, Watchdog
from ris_fast.health.preflight.run import Result
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Observer, Trainer


class HealthCallback:
    """Observer that passes events on and lets the watchdog judge them; the summary carries what was found."""

    def __init__(self, watchdog: Watchdog, inner: Observer) -> None:
        self.watchdog, self.inner = watchdog, inner

    def start(self, info: Mapping[str, Any]) -> None:
        self.inner.start(info)
        self.watchdog.start(info)

    def step(self, row: Mapping[str, Any]) -> None:
        self.inner.step(row)
        self.watchdog.step(row)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.inner.epoch(row)
        self.watchdog.epoch(row)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.watchdog.finish(summary)
        self.inner.finish(with_findings(self.watchdog, summary))


def with_findings(watchdog: Watchdog, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with the causes that were found, most certain first, their evidence, and what was ruled out."""
    found = watchdog.findings
    names = [finding.cause for finding in found]
    rest = [name for name in summary.get("findings", ()) if name not in names]
    return {
        **summary,
        "findings": names + rest,
        "evidence": [finding.to_json() for finding in found],
        "ruled_out": watchdog.ruled_out,
    }


def attach_health(
    trainer: Trainer,
    *,
    stop: bool = True,
    preflight: bool = True,
    progress: Callable[[Result], None] | None = None,
    tell: Callable[[Finding], None] | None = None,
) -> Trainer:
    """The same trainer under watch: `attach_health(Trainer(config)).fit()`; findings at `trainer.observer.watchdog.findings`.

    `tell` is called with each finding that the run shows, when it is first made.
    Raises: RunStopped (exit code 4) where preflight is certain of a structural mistake, unless `stop` is False.
    """
    watchdog = Watchdog(trainer, stop=stop, tell=tell)
    trainer.observer = HealthCallback(watchdog, trainer.observer)
    if preflight:
        found = watchdog.preflight(progress)
        if stop and found and found[0].certain and found[0].severity in STOPPING:
            certain = [finding for finding in found if finding.certain]
            many = f"{len(certain)} reasons" if len(certain) > 1 else "a reason"
            raise RunStopped(
                f"preflight found {many} why this run would not learn:\n{explained(found)}\n"
                "Train all the same with --set health.stop=false, or mute what is meant: --set health.mute="
                f"{','.join(finding.cause for finding in certain if finding.severity in STOPPING)}",
                found[0].cause,
            )
    return trainer
