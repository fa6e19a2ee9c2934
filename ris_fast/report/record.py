"""A callback that only keeps a record of a run, so that an error in it must not end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ris_fast.training.callback import Callback


class Record(Callback):
    """Calls `callback` in its place; the first error that it raises is shown, and none ends the run.

    Args: what: the record in a word or two; report: shows a line to a person.
    """

    def __init__(self, callback: Callback, what: str, report: Callable[[str], Any]) -> None:
        self.callback, self.what, self.report, self.failed = callback, what, report, False

    def on_train_start(self, info: dict[str, Any]) -> None:
        self._try(self.callback.on_train_start, info)

    def on_log(self, row: dict[str, Any]) -> None:
        self._try(self.callback.on_log, row)

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self._try(self.callback.on_epoch_end, row)

    def on_train_end(self, summary: dict[str, Any]) -> None:
        self._try(self.callback.on_train_end, summary)

    def _try(self, method: Callable[[dict[str, Any]], None], values: dict[str, Any]) -> None:
        try:
            method(values)
        except Exception as error:  # a full disk, or a library that an interrupt left half imported
            if not self.failed:
                self.report(
                    f"note: {self.what} is not complete, training goes on: {str(error) or type(error).__name__}"
                )
            self.failed = True
