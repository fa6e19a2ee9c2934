"""Callbacks: what observes a run while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from ris_fast.old_names import with_old_keys


class Callback:
    """Base class of the observers in `Trainer(config, callbacks=[...])`; every method does nothing.

    The trainer calls the callbacks of its list `callbacks` in order, each with one dict of plain numbers, texts and
    further dicts. They all get the same dict: a key that one adds is seen by those behind it. An error that a callback
    raises ends the run.

    `changes`: beginnings of the names of settings that it changes on purpose while the run goes on, such as
    'loss.angle' or 'frozen': learning health says nothing of these. What it calls them is in its finding
    `settings_changed`.
    """

    changes: tuple[str, ...] = ()

    def on_train_start(self, info: dict[str, Any]) -> None:
        """Once, with the settings and the baselines, before the first validation and the first step."""

    def on_step_start(self) -> None:
        """Before each optimizer step, when its scenes are there. Called only where a class overrides it."""

    def on_step_end(self) -> None:
        """After each optimizer step, for which a GPU may still be busy. Called only where a class overrides it."""

    def on_log(self, row: dict[str, Any]) -> None:
        """At each report: after each of the first steps, then every `report.every_steps`; on a GPU one report later."""

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """After the epoch's validation."""

    def on_summary(self, summary: dict[str, Any]) -> None:
        """At the end, also after an error in a step, before any `on_train_end`: to add to the summary."""

    def on_train_end(self, summary: dict[str, Any]) -> None:
        """At the end, also after an error in a step, with the finished summary."""


class ObserverCallback(Callback):
    """An observer of earlier versions, an object with `start`, `step`, `epoch` and `finish`, as a callback: what it is
    given has the keys of those versions too."""

    def __init__(self, observer: Any) -> None:
        calls = [getattr(observer, name, None) for name in ("start", "step", "epoch", "finish")]
        if not all(map(callable, calls)):
            raise TypeError(
                f"Trainer: {observer!r} is no callback. Give callbacks=[...], a list of objects of a class derived from"
                " ris_fast.Callback."
            )
        self.on_train_start, self.on_log, self.on_epoch_end, self.on_train_end = (
            lambda values, call=call: call(with_old_keys(values)) for call in calls
        )


def callback_list(callbacks: Any, observer: Any) -> list[Callback]:
    """The callbacks as a list, with what was given as an observer, by keyword or in its old place, behind them."""
    if isinstance(callbacks, Callback):
        raise TypeError(f"Trainer: callbacks is a {type(callbacks).__name__}, expected a list: callbacks=[...].")
    if not isinstance(callbacks, Iterable):
        callbacks, observer = (), callbacks if observer is None else observer
    return [*callbacks, *([] if observer is None else [from_observer(observer)])]


def from_observer(observer: Any) -> Callback:
    """The observer as a callback, with a warning that names what takes its place."""
    callback = observer if isinstance(observer, Callback) else ObserverCallback(observer)
    warnings.warn(
        "Trainer: observer=x is callbacks=[x] now, with x a ris_fast.Callback whose methods on_train_start, on_log,"
        " on_epoch_end and on_train_end were start, step, epoch and finish; the next release takes callbacks only.",
        FutureWarning,
        stacklevel=4,
    )
    return callback


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raises: TypeError for what is no Callback."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"Trainer.callbacks: expected objects of ris_fast.Callback, got {type(callback).__name__}. Derive its"
                " class from Callback, and override the methods that it needs."
            )


def step_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
    """Those that override a method called at every step."""
    return [
        each
        for each in callbacks
        if (type(each).on_step_start, type(each).on_step_end) != (Callback.on_step_start, Callback.on_step_end)
    ]
