"""Several observers of a run as one: what the trainer is given when a run is shown, logged and drawn at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping

if TYPE_CHECKING:
    from ris_fast.training.loop import Observer


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
