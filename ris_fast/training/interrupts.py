"""Ctrl-C and its like wait for the end of a step, so that what a run saves is its state between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """What Python would do at SIGINT, SIGTERM or SIGHUP within the block it does at its end; at a second one at once.

    Where the block ends in an exception of its own, that is the one that is raised. Signals interrupt the main thread
    alone; in another one nothing is held. Takes some microseconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    waiting: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            handlers[number](number, frame)
        waiting.append((number, frame))

    with handled_by(hold, handlers):
        yield
    for number, frame in waiting[:1]:
        handlers[number](number, frame)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], before: Mapping[int, Any]) -> Iterator[None]:
    """Within the block the signals of `before` go to `handler`, behind it to the handlers in `before` again."""
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
