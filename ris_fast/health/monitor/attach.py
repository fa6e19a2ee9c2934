"""Attaches the watch over a run to a trainer: preflight first, then a callback that judges each row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ris_fast.health.finding import Finding, explained
from ris_fast.health.monitor.watchdog import STOPPING, Watchdog
from ris_fast.health.preflight.run import Result
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer


def attach_health(
    trainer: Trainer,
    *,
    stop: bool = True,
    preflight: bool = True,
    progress: Callable[[Result], None] | None = None,
    report: Callable[[Finding], None] | None = None,
) -> Trainer:
    """The same trainer under watch: `attach_health(Trainer(config)).fit()`.

    The watchdog is the last of `trainer.callbacks`, so that it judges a row after the others have recorded it; the
    findings are at `trainer.callbacks[-1].findings` and in the summary. `report` is called with each finding that the
    run shows, when it is first made.
    Raises: RunStopped (exit code 4) where preflight is certain of a structural mistake, unless `stop` is False.
    """
    watchdog = Watchdog(trainer, stop=stop, report=report)
    trainer.callbacks.append(watchdog)
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


def watched(trainer: Trainer, **options: Any) -> Trainer:
    """The former name of `attach_health`, whose `report` was called `tell`."""
    warnings.warn(
        "ris_fast.health.watched is attach_health now; the next release has the new name only.",
        FutureWarning,
        stacklevel=2,
    )
    if "tell" in options:
        options["report"] = options.pop("tell")
    return attach_health(trainer, **options)
