"""What `why` makes of a run when all is over: rows alone, of a run that nobody checked or watched while it went on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from bench.faults.catalogue import Fault, faulty
from bench.faults.trial import GRACE_REPORTS, PATIENCE, Listener, Outcome, StopRun, limit_of, observed
from ris_fast.health.diagnose.why import why
from ris_fast.training.callback import Callback
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer


class Kept(Callback):
    """Keeps a run as its folder does: rows of metrics.jsonl and summary.json, through JSON; ends it at
    `last_step`."""

    def __init__(self, trainer: Trainer, last_step: float) -> None:
        self.trainer, self.last_step = trainer, last_step
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def on_train_start(self, info: dict[str, Any]) -> None:
        self._keep("start", info)

    def on_log(self, row: dict[str, Any]) -> None:
        self._keep("step", row)

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self._keep("epoch", row)

    def on_train_end(self, summary: dict[str, Any]) -> None:
        self.summary = through_json(summary)

    def _keep(self, event: str, row: Mapping[str, Any]) -> None:
        self.rows.append(through_json({"event": event, **row}))
        if event != "start" and self.trainer.state.step >= self.last_step:
            raise StopRun


def through_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file keeps of it; arrays become lists, as in the event log."""
    return json.loads(json.dumps(value, default=lambda each: each.tolist() if hasattr(each, "tolist") else str(each)))


def run_to_the_end(trainer: Trainer, last_step: float) -> Kept:
    """Trains without preflight and without a watch, as far as the trainer itself goes."""
    trainer.callbacks.append(kept := Kept(trainer, last_step))
    try:
        trainer.fit()
    except (StopRun, RunStopped):
        pass  # the summary has been left, with what the trainer itself stopped for
    return kept


def score_afterwards(fault: Fault) -> Outcome:
    """Whether `why` finds and names a fault in what a run of it left behind. There is no limit in steps: all is
    over."""

    def run() -> tuple[Listener, str]:
        with faulty(fault) as trainer:
            last = PATIENCE + max(limit_of(fault, trainer), fault.onset + GRACE_REPORTS * trainer.epoch_steps)
            kept = run_to_the_end(trainer, last)
            listener = Listener(trainer, kept, last)
            listener.listen(why("run", kept.rows, kept.summary).findings, trainer.state.step)
            return listener, ""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Outcome(fault.name, fault.family, fault.held_out, fault.expect, limit=2**31, **observed(run))
