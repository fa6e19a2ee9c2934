"""Trackers: the rows of a run shown by TensorBoard, Trackio or W&B as well. They are mirrors: metrics.jsonl is the
record.

Every number of a row goes under its own name: 'step/' for the reports, 'epoch/', 'summary/', then the keys of the row
with '/' between them; the axis is the optimizer step. Rows are handed to a thread, so that training waits for nobody.
"""

from __future__ import annotations

import json
import queue
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ris_fast import exit_codes
from ris_fast.config.load import plain_settings
from ris_fast.config.schema import TRACKERS, Config, ConfigError
from ris_fast.config.spelling import did_you_mean, words
from ris_fast.environment import rank_number
from ris_fast.files import METRICS, SUMMARY, read_text
from ris_fast.report.eventlog import current_rows, read_events, row_place
from ris_fast.report.tracker_sinks import SINKS, Sink
from ris_fast.training.callback import Callback

WAIT = 30.0  # seconds in which a tracker may still take rows when a run has ended


class Tracker(Callback):
    """Mirrors a run in one tracker: `Trainer(config, folder, callbacks=[JsonlReport(folder), Tracker("wandb",
    folder)])`.

    A run that is resumed continues the same run of the tracker: rows that it goes over again replace the earlier ones
    in TensorBoard, and are left out in the others, which have no way of taking a step back. What was written before is
    read from the folder's metrics.jsonl, so that `JsonlReport` belongs in front. With several ranks the first one
    writes. An error in a tracker is reported once, and ends the mirror and nothing else.

    Args:
        name: tensorboard, trackio or wandb.
        folder: of the run.
        config: its settings, to be shown by the tracker.
        report: shows a line to a person.
        wait: seconds in which the tracker may still take rows when the run has ended; None: as long as it takes.
        anew: write a new run of the tracker, whatever it has of this one.
    Raises: ConfigError for a tracker that does not exist, or whose package is not installed.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        config: Config | None = None,
        *,
        report: Callable[[str], Any] = print,
        wait: float | None = WAIT,
        anew: bool = False,
    ) -> None:
        check_trackers(name)
        self.name, self.folder, self.config = name, Path(folder), config
        self.report, self.wait, self.anew = report, wait, anew
        self.before: list[dict[str, Any]] | None = None  # rows of earlier parts of the run, until the first new one
        self.last: tuple[int, bool] = (-1, False)  # place of the last row that a tracker has and cannot take back
        self.step = 0
        self.worker: Worker | None = None

    def on_train_start(self, info: dict[str, Any]) -> None:
        if rank_number():
            return
        there = (self.folder / METRICS).is_file() and not self.anew
        self.before = read_events(self.folder, skip_broken=True, superseded=True) if there else []
        self.sink: Sink = SINKS[self.name](self.folder, anew=self.anew)
        self.worker = Worker(self._failed)
        settings = {} if self.config is None else plain_settings(self.config)
        shown = {**settings, **{f"start/{key}": value for key, value in leaves(info) if _plain(value)}}
        try:
            import_module(self.name)  # some seconds of this process's time, which are not the training's here
        except Exception as error:
            self.worker.give_up(reason(error))
        self.worker.do(lambda: self.sink.open(shown))

    def on_log(self, row: dict[str, Any]) -> None:
        self.row({"event": "step", **row})

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.row({"event": "epoch", **row})

    def on_train_end(self, summary: dict[str, Any]) -> None:
        if self.worker is None:
            return
        ended, self.worker = self.worker, None
        values, step = (numbers(summary, "summary"), texts(summary)), summary.get("optimizer_steps", self.step)
        ended.do(lambda: self.sink.end(*values, step))
        ended.close(self.wait)

    def row(self, row: dict[str, Any]) -> None:
        """A row as metrics.jsonl has it."""
        if self.worker is None:
            return
        before, self.before = self.before, None
        rows = [row] if before is None else self._first(before, row)
        for each in rows:
            found = row_place(each)
            if found is not None and found > self.last:
                self.step = found[0]
                values = numbers({k: v for k, v in each.items() if k != "event"}, each["event"])
                self.worker.do(lambda values=values, step=self.step: self.sink.log(values, step))

    def _failed(self, reason: str) -> None:
        if self.anew:
            self.report(reason)
            return
        self.report(
            f"note: {self.sink.title} is not complete, training goes on: {reason}. When the run has ended, ris-fast"
            f" track {shlex.quote(str(self.folder))} --to {self.name} mirrors all of it"
        )

    def _first(self, before: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
        """What the tracker lacks of the run up to its first new row."""
        kept = [each for each in current_rows([*before, row]) if each.get("event") in ("step", "epoch")]
        if not self.sink.known or self.worker is None:
            return kept
        step = row["step"]
        if self.sink.replaces:
            self.worker.do(lambda: self.sink.drop_from(step))
            return [each for each in kept if each["step"] >= step]
        self.last = max((found for each in before if (found := row_place(each)) is not None), default=self.last)
        if step <= self.last[0]:
            self.report(
                f"note: {self.sink.title} keeps steps {step:,} to {self.last[0]:,} as the run made them first;"
                f" {METRICS} has them as they are now"
            )
        return kept


class Worker:
    """Does what it is given in a thread of its own, in order; after the first error, nothing more.

    The thread ends with the process, whatever it waits for.
    """

    def __init__(self, report: Callable[[str], Any]) -> None:
        self.report, self.failed = report, False
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self.thread.start()

    def do(self, job: Callable[[], None]) -> None:
        if not self.failed:
            self.jobs.put(job)

    def close(self, seconds: float | None) -> None:
        """Waits for what there is to do, but not longer than this; None: as long as it takes."""
        self.jobs.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.give_up(f"no answer within {seconds:.0f} s")

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                if not self.failed:
                    job()
            except (Exception, SystemExit) as error:  # no network, a full disk, a package that does not import
                self.give_up(reason(error))

    def give_up(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            self.report(why)


def reason(error: BaseException) -> str:
    """The first line of an error that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def trackers(config: Config, folder: Path, report: Callable[[str], Any] = print) -> list[Tracker]:
    """Those that `report.tracker` names. Raises: ConfigError."""
    return [Tracker(name, folder, config, report=report) for name in words(config.report.tracker)]


def check_trackers(names: str) -> None:
    """Raises: ConfigError for a tracker that does not exist, or whose package is not installed."""
    for name in words(names):
        if name not in TRACKERS:
            raise ConfigError(f"there is no tracker '{name}'.{did_you_mean(name, TRACKERS)}")
        if find_spec(name) is None:
            raise ConfigError(
                f"tracker {name}: its package is not installed. Run pip install 'ris-fast[{name}]', or leave"
                " report.tracker empty."
            )


class TrackerError(RuntimeError):
    """A tracker that could not take the rows of a run. Exit code 3."""

    exit_code = exit_codes.DATA


def mirror(folder: Path, name: str, config: Config | None = None) -> int:
    """Writes a whole run into a tracker, as a new run of it, from metrics.jsonl and summary.json. Returns: how many
    rows. Raises: ConfigError, TrackerError with what the tracker said."""
    rows = read_events(folder, skip_broken=True) if (folder / METRICS).is_file() else []
    summary = json.loads(read_text(folder / SUMMARY)) if (folder / SUMMARY).is_file() else {"verdict": "unfinished"}
    failed: list[str] = []
    tracker = Tracker(name, folder, config, report=failed.append, wait=None, anew=True)
    tracker.on_train_start(next((row for row in rows if row.get("event") == "start"), {}))
    shown = [row for row in rows if row.get("event") in ("step", "epoch")]
    for row in shown:
        tracker.row(row)
    tracker.on_train_end(summary)
    if failed:
        raise TrackerError(f"{tracker.sink.title} did not take the run: {failed[0]}.")
    return len(shown)


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """'key/key' -> value of everything in nested tables and lists."""
    inner = values.items() if isinstance(values, Mapping) else enumerate(values) if _many(values) else None
    if inner is None:
        yield path, values
        return
    for key, value in inner:
        yield from leaves(value, f"{path}/{key}" if path else str(key))


def numbers(row: Mapping[str, Any], beginning: str) -> dict[str, float]:
    """Every number of a row, by its name."""
    return {
        f"{beginning}/{key}": float(value) if isinstance(value, float) else value
        for key, value in leaves(row)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The verdict, and what the watch found, for a person."""
    evidence = [each for each in summary.get("evidence", ()) if each.get("cause") in summary.get("findings", ())]
    said = [f"{each['cause']}: {each['evidence']} Fix: {each['advice']}" for each in evidence]
    known = {each["cause"] for each in evidence}
    said += [name for name in summary.get("findings", ()) if name not in known]
    return {"verdict": str(summary.get("verdict", "")), "findings": "\n\n".join(said) or "none"}


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
