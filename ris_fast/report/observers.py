"""Several observers of a run as one: what the trainer is given when a run is shown, logged and drawn at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ris_fast.training.trainer import Observer


class Observers:
    """Passes every event on, in the order the observers were given."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def start(self, info: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.start(info)

    def step(self, row: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.step(row)

    def epoch(self, row: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.epoch(row)

    def finish(self, summary: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.finish(summary)


class Record:
    """Passes events on to an observer that only keeps a record of the run: what it cannot write is told once and ends
    nothing.

    Args: what: the record in a word or two; tell: shows a line to a person.
    """

    def __init__(self, observer: Observer, what: str, tell: Callable[[str], Any]) -> None:
        self.observer, self.what, self.tell, self.failed = observer, what, tell, False

    def start(self, info: Mapping[str, Any]) -> None:
        self._try(self.observer.start, info)

    def step(self, row: Mapping[str, Any]) -> None:
        self._try(self.observer.step, row)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._try(self.observer.epoch, row)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._try(self.observer.finish, summary)

    def _try(self, event: Callable[[Mapping[str, Any]], None], given: Mapping[str, Any]) -> None:
        try:
            event(given)
        except (
            Exception
        ) as error:  # a full disk, or a library that an interrupt left half imported: a record ends no run
            if not self.failed:
                self.tell(f"note: {self.what} is not complete, training goes on: {str(error) or type(error).__name__}")
            self.failed = True
