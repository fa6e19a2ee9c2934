"""What `ris-fast train` does around the trainer: the run folder, its callbacks, and why a run ended early."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast import exit_codes
from ris_fast.commands.launch import outcome_of, restart_count, restarts_allowed
from ris_fast.commands.run_folder import (
    RunFolder,
    drop_if_empty,
    forget_refused,
    how_to_resume,
    new_folder,
    run_and_checkpoint,
    run_lock,
)
from ris_fast.config.schema import Config, Task
from ris_fast.files import CONFIG, LAST, METRICS, SUMMARY, StorageError, read_text
from ris_fast.old_names import OldNameWarning
from ris_fast.report.eventlog import JsonlReport, read_events, write_json
from ris_fast.report.record import Record
from ris_fast.streams import stage
from ris_fast.training.callback import Callback

LOCK_WAIT = 60.0  # seconds in which the processes of a run that is started again may still end

if TYPE_CHECKING:
    from ris_fast.health import Watchdog
    from ris_fast.report.console import ConsoleReport
    from ris_fast.training.ranks.group import Ranks


def run_training(config: Config, out: Path | None, *, resume: Path | None = None, profile: bool = False) -> int:
    """Trains, shows and records one run. Returns its exit code: 0 (learned), 4 (stopped or stalled) or 130 (Ctrl-C,
    SIGTERM, SIGHUP).

    Args: resume: a run folder, or a checkpoint of one.
    Raises ConfigError for a folder that holds another run, DataError, and OutOfMemory with a batch size that fits.
    """
    from ris_fast.training.ranks.group import join, rank_device
    from ris_fast.training.ranks.lost import AllInterrupted, EndedByFirst
    from ris_fast.training.state import RunStopped

    ranks = join(rank_device(config.training.device))
    try:
        code = _run(config, ranks, out, resume, profile)
    except (EndedByFirst, RunStopped, AllInterrupted) as error:  # known to all ranks, and said by rank 0
        code = getattr(error, "exit_code", exit_codes.INTERRUPTED)
        if ranks.first and not _at_its_own_end(code):
            raise
        if ranks.first:
            print(f"ris-fast: {error}", file=sys.stderr)
    if _at_its_own_end(code):
        print(f"exit code 0 and not {code}, upon which torchrun would start this run again; {SUMMARY} has the verdict")
        code = exit_codes.DONE
    if code == exit_codes.DONE:
        ranks.leave()
    else:
        ranks.outlast_first()
    return code


def _at_its_own_end(code: int) -> bool:
    """Whether a launcher that restarts what fails has to be kept from it: the run did not fail, it did not learn."""
    return code == exit_codes.NOT_LEARNED and restarts_allowed()


def _run(config: Config, ranks: Ranks, out: Path | None, resume: Path | None, profile: bool) -> int:
    """`run_training` on one of the ranks; what rank 0 does for all it does while the others wait."""
    from ris_fast.report.console import ConsoleReport
    from ris_fast.report.trackers import check_trackers
    from ris_fast.training.ranks.lost import RankLost

    check_trackers(config.report.tracker)
    ours = resume is None and (out is None or not out.exists())
    folder, checkpoint = ranks.by_first(
        lambda: (new_folder(config, out), None) if resume is None else run_and_checkpoint(resume)
    )
    console = ConsoleReport(standard_task=config.task == Task(), run=folder)
    try:
        with ExitStack() as held:
            ranks.by_first(lambda: held.enter_context(run_lock(folder, wait=LOCK_WAIT if restarts_allowed() else 0.0)))
            if resume is None:
                ranks.by_first(lambda: forget_refused(folder))
            if (ended := ranks.by_first(lambda: _ended(folder))) is not None:
                return ended
            summary = fit_in_folder(config, folder, console, checkpoint=checkpoint, profile=profile)
    except (KeyboardInterrupt, RankLost) as error:
        console.close()
        if not ranks.first:
            raise
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        print(f"\nris-fast: {said}. {how_to_resume(folder)}", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except StorageError as error:
        if (folder / CONFIG).exists():
            error.add(how_to_resume(folder))
        raise
    finally:
        console.close()
        if ours and ranks.first:
            drop_if_empty(folder)
    if summary is None:
        return exit_codes.DONE
    print(f"run folder: {folder}")
    return _code(summary)


def _code(summary: Mapping[str, Any]) -> int:
    return exit_codes.DONE if summary["verdict"] == "learned" else exit_codes.NOT_LEARNED


def _ended(folder: Path) -> int | None:
    """The exit code of a run that torchrun starts again though it came to its own end, as one that has not learned
    does; None of any other. Before the first start the summary of an earlier end is taken away."""
    if restart_count() and (summary := outcome_of(folder)) is not None:
        print(f"not started again: the run has ended, verdict {summary['verdict']}\nrun folder: {folder}")
        return _code(summary)
    if restarts_allowed() and not restart_count():
        (folder / SUMMARY).unlink(missing_ok=True)
    return None


def fit_in_folder(
    config: Config,
    folder: Path,
    console: ConsoleReport,
    *,
    checkpoint: str | None = None,
    profile: bool = False,
    preflight: bool = True,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any] | None:
    """The summary of the run; None for one that had nothing left to do.

    Args: checkpoint: None: a new run; preflight: false: none, whatever the settings say; callbacks: behind those of
        every run.
    """
    from ris_fast.environment import fallback_note
    from ris_fast.report.console import counter
    from ris_fast.training.batch_size import advice
    from ris_fast.training.footprint import OutOfMemory, is_memory
    from ris_fast.training.trainer import Trainer

    try:
        stage("opening the data and building the network")
        trainer = Trainer(config, folder, resume=checkpoint or False, progress=counter("scenes read"))
        if checkpoint is not None and report_resume_point(trainer, folder, checkpoint):
            return None
        if restarts_allowed() and checkpoint not in (None, "", LAST):
            trainer.save_last()  # what the run is continued from, should it be started again
        first = trainer.ranks.first
        trainer.callbacks += _callbacks(trainer, folder, console) if first else []
        if first:
            console.show_notes([*trainer.source.notes, *trainer.notes])
        if (note := fallback_note()) and trainer.device.type == "cpu":
            print(f"note: {note}")
        if trainer.network.compiled:
            print(
                "compiling the network; a large one takes minutes of processor time, less the next time"
                " (training.compile=false: none)",
                flush=True,
            )
        if checkpoint and first:
            trainer.preflight = checks_passed(folder)
        preflight = preflight and config.health.preflight and not checkpoint
        trainer.ranks.by_first(
            lambda: attach_run_health(trainer, folder, preflight=preflight, report=console.found) and None
        )
        if profile and first:
            from ris_fast.training.profile import Profile

            trainer.callbacks.append(Profile(folder / "profile", print))
        trainer.callbacks += callbacks
        stage("measuring the baselines, compiling")
        return fit_with_nan_replay(trainer)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error) or isinstance(error, OutOfMemory):  # the second says what would fit
            raise
        problem = (str(error) or type(error).__name__).splitlines()[0]
    raise OutOfMemory(
        f"out of memory with {config.training.batch_size} scenes in a micro-batch ({problem}).\n{advice(config)}"
    )


def report_resume_point(trainer: Any, folder: Path, checkpoint: str) -> bool:
    """Says where a resumed run continues; true where it has come to its end."""
    from ris_fast.training.resume import finished

    done = finished(trainer.config.training, trainer.state)
    if done and not _has_summary(folder, trainer.state.step):
        print(f"nothing to train: {done}; {SUMMARY} is missing or of an earlier end, and is written now")
        return False
    if done:
        print(f"nothing to do: {done}\nrun folder: {folder}")
    elif not checkpoint:
        print(f"{folder} has no checkpoint yet: the run begins anew, with its own settings")
    else:
        state = trainer.state
        print(
            f"resumed from checkpoint '{checkpoint}': epoch {state.epoch + 1}, after {state.step:,} steps and"
            f" {state.seconds:.0f} s"
        )
    return bool(done)


def _has_summary(folder: Path, steps: int) -> bool:
    """Whether summary.json is that of a run of so many steps: a kill behind the last checkpoint leaves another or
    none."""
    try:
        found = json.loads(read_text(folder / SUMMARY))
        return found["optimizer_steps"] == steps and "ended_by" not in found
    except (OSError, ValueError, LookupError, TypeError):
        return False


def fit_with_nan_replay(trainer: Any) -> dict[str, Any]:
    """Fits; where gradients that are not finite end the run and health.anomaly is set, says which operation made
    them."""
    from ris_fast.training.state import RunStopped

    try:
        return trainer.fit()
    except RunStopped as stop:
        if trainer.config.health.anomaly and stop.finding in (
            "steps_skipped",
            "nonfinite_gradients",
            "sanitised_gradients",
        ):
            from ris_fast.health.monitor.nan_replay import replay

            found = [f"anomaly: {culprit}" for culprit in replay(trainer)]  # of this rank's scenes
            if found and not trainer.ranks.first:
                print("\n".join(found), file=sys.stderr)
            print("\n".join(found) or "anomaly: the replayed step is finite")
        raise


def attach_run_health(trainer: Any, folder: Path, *, preflight: bool, report: Callable[[Any], None]) -> Watchdog:
    """Puts the trainer under the watch of learning health, which shows what it finds at once; a run that preflight
    stops leaves its findings in the folder."""
    from ris_fast.health.monitor.attach import attach_health
    from ris_fast.training.state import RunStopped

    stop, began = trainer.config.health.stop, time.monotonic()
    try:
        attach_health(
            trainer,
            stop=stop,
            preflight=preflight,
            report=report,
            progress=lambda check: stage(f"preflight, done: {check.name}"),
        )
    except RunStopped as error:
        RunFolder(folder, trainer.config).on_train_start({})
        summary = {"verdict": "stopped", "optimizer_steps": 0, "findings": [error.finding]}
        trainer.callbacks[-1].add_findings(summary)
        write_json(folder / SUMMARY, summary)
        raise
    watchdog = trainer.callbacks[-1]
    if preflight:
        print(preflight_line(watchdog, time.monotonic() - began), flush=True)
        for finding in watchdog.findings:
            report(finding)
    return watchdog


def checks_passed(folder: Path) -> list[str]:
    """Names of the preflight checks that a run passed when it began, as its metrics.jsonl says; none where it does
    not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldNameWarning)  # of entries that are not looked at here
            rows = read_events(folder, skip_broken=True)
    except OSError:
        return []
    starts = [row.get("preflight") for row in rows if row.get("event") == "start"]
    return next((list(names) for names in reversed(starts) if isinstance(names, list) and names), [])


def preflight_line(watchdog: Any, seconds: float) -> str:
    """What preflight did, what it found, how far the network got with a few scenes, and what could not be looked at."""
    from ris_fast.health.preflight.run import unknown

    notes = "; ".join(check.note for check in watchdog.checks if check.note)
    found = ", ".join(finding.cause for finding in watchdog.findings) or "nothing found"
    said = [f"preflight: {len(watchdog.checks)} checks in {seconds:.1f} s, {found}", notes, unknown(watchdog.checks)]
    return "; ".join(part for part in said if part)


def _callbacks(trainer: Any, folder: Path, console: ConsoleReport) -> list[Callback]:
    """In the order in which they are called; the watchdog of `attach_run_health` comes behind them."""
    from ris_fast.report.tensor_log import TensorLog
    from ris_fast.report.trackers import trackers
    from ris_fast.training.mfu import MfuCallback

    table, pictures = trainer.config.health.log_tensors, trainer.config.report.plots
    callbacks = [
        MfuCallback(trainer),
        RunFolder(folder, trainer.config),  # the settings with what the data made of them
        Record(JsonlReport(folder), f"{METRICS} or {SUMMARY}", print),
        console,
        *trackers(trainer.config, folder),
    ]
    if pictures:
        from ris_fast.report.plots import PlotReport

        callbacks.append(Record(PlotReport(folder), "the picture of the losses", print))
    tensors = TensorLog(trainer, folder, table=table, picture=pictures)
    return [*callbacks, Record(tensors, "the record of the tensors", print)]
