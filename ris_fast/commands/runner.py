"""Runs one command: its signals, its output, and every expected error as one message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cyclopts import App, CycloptsError

from ris_fast import exit_codes
from ris_fast.commands.launch import one_process_only, tell_launcher
from ris_fast.commands.usage import empty_value, usage_message, without_set
from ris_fast.environment import rank_number
from ris_fast.files import WRITER
from ris_fast.old_names import OldNameWarning
from ris_fast.streams import unbreakable

LEAVES_A_RECORD = (
    "train",
    "tune",
    "simulate",
    "convert",
    "evaluate",
    "predict",
)  # what these print can be read in their folder
NOTHING_WRITTEN = "interrupted: nothing was written, and a file of an earlier call is as it was"
WRITE_AT_THE_END = {
    "predict",
    "evaluate",
    "mismatch",
    "compare",
}  # each file whole; see `writing_results` for the end itself


def run(app: App, tokens: Sequence[str]) -> int:
    """Runs the command that the tokens name. Returns: its exit code, see `exit_codes`.

    Output that nobody can receive any more ends nothing. A bug prints its traceback and ends with 70, so that 1,
    Python's own code for it, says that a gradient check failed and nothing else.
    """
    with unbreakable(rank_number()) as (output, _), endings_as_interrupts(), old_names_as_notes():
        code = _run(app, tokens)
        _await_checkpoints()
        output.flush()
        if output.failed and code == exit_codes.DONE and tokens[:1] and tokens[0] not in LEAVES_A_RECORD:
            return _complain(f"standard output cannot be written: {output.lost}.", exit_codes.DATA)
        return code


def _run(app: App, tokens: Sequence[str]) -> int:
    if (refused := empty_value(tokens) or without_set(tokens)) is not None:
        return _complain(refused, exit_codes.USAGE)
    if (refused := one_process_only(tokens)) is not None:
        return _complain(refused, exit_codes.USAGE)
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        return command(*bound.args, **bound.kwargs) or exit_codes.DONE
    except CycloptsError as error:
        return _complain(usage_message(error), exit_codes.USAGE)
    except KeyboardInterrupt as interrupt:
        plain = NOTHING_WRITTEN if set(tokens[:1]) & WRITE_AT_THE_END else "interrupted"
        return _complain(str(interrupt) or plain, exit_codes.INTERRUPTED)
    except Exception as error:
        return _explain(error)


def _await_checkpoints() -> None:
    """Waits for the thread that still writes a checkpoint, for which Python would wait too, but would not outlive
    another SIGTERM."""
    for thread in threading.enumerate():
        while thread.name == WRITER and thread.is_alive():
            try:
                time.sleep(
                    0.02
                )  # not Thread.join: after an interrupt in it Python takes the thread for ended (gh-90882)
            except KeyboardInterrupt:
                print(
                    "ris-fast: this ends when the checkpoint is on disk. kill -9 leaves the one before", file=sys.stderr
                )


def _explain(error: Exception) -> int:
    """Says what went wrong: the error's own message where it is meant for the user, else its traceback."""
    code = getattr(error, "exit_code", None)
    tell_launcher(error)
    if code is not None:
        return code if getattr(error, "said", False) else _complain(str(error), code)
    if isinstance(error, OSError) and error.filename is not None:
        advice = f"Give another path{_variable(error.filename)}."
        return _complain(f"{error.filename}: {error.strerror}. {advice}", exit_codes.DATA)
    traceback.print_exc()
    return exit_codes.BUG


@contextmanager
def writing_results() -> Iterator[None]:
    """Within the block several files are written, each whole or not at all: an interrupt says just that."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted while writing: each file is whole, from this call or as it was. Run the same command again"
        ) from None


@contextmanager
def endings_as_interrupts() -> Iterator[None]:
    """Makes a cluster's time limit (SIGTERM) and a closed terminal (SIGHUP) save and say what Ctrl-C does.

    A signal that is ignored already, as under nohup, stays ignored.
    """
    endings = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        endings = []
    for each in endings:
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for each in endings:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def old_names_as_notes() -> Iterator[None]:
    """Shows each OldNameWarning once, as one line `note: ...` on standard error; other warnings as before."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", OldNameWarning)
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, OldNameWarning):
                show(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                print(f"note: {message}", file=sys.stderr)

        warnings.showwarning = note
        yield


def _complain(text: str, code: int) -> int:
    print(f"ris-fast: {text}", file=sys.stderr)
    return code


def _variable(path: Any) -> str:
    """' in the environment variable X' where X holds this path, such as that of torch's compile cache; else ''."""
    return next(
        (f" in the environment variable {name}" for name, value in os.environ.items() if value == str(path)), ""
    )
