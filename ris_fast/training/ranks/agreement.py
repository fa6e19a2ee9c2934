"""What the clock or the signals of one rank decide, done by all of them after the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ris_fast.training.interrupts import INTERRUPTS, handled_by
from ris_fast.training.ranks.group import Ranks
from ris_fast.training.ranks.lost import AllInterrupted
from ris_fast.training.state import RunStopped

SECONDS = 0.5  # about so often the ranks exchange what they know
MOST_STEPS = 200  # at least once in so many steps
SAME = 5.0  # seconds in which a second signal is the first once more: a launcher passes on what all of them got


class Agreement:
    """Ends a run on all ranks after the same step: by the time of rank 0, a signal to any, or a RunStopped of any.

    The ranks exchange a few whole numbers over the host, not at every step, which is what would break first with a
    thousand of them: at each report, at the end of an epoch, and after as many steps as rank 0 makes in half a second.
    A single process looks at its own clock after each step, and holds nothing back.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.over = False  # whether the time of the run is over
        self.next = 0  # the step after which the ranks exchange what they know
        self.last: tuple[int, float] | None = None  # step and time of the last exchange
        self.stop: RunStopped | None = None  # raised here, and not yet known to all
        self.heard: float | None = None  # when the first signal came

    def after(self, step: int, over: bool, *, now: bool = False) -> bool:
        """Whether the time is over. Args: over: by this process's clock; now: exchange at once, as all ranks do here.

        Raises: AllInterrupted (a KeyboardInterrupt) or RunStopped, on all ranks after the same step.
        """
        if self.ranks.alone:
            self.over = over
        elif now or step >= self.next:
            self._exchange(step, over)
        return self.over

    def _exchange(self, step: int, over: bool) -> None:
        first = self.ranks.first
        mine = [self.stop is not None, self.heard is not None, first and over, self._steps(step) if first else 0]
        stopped, interrupted, ended, steps = self.ranks.largest([int(each) for each in mine])
        self.next, self.last, self.over = step + steps, (step, time.monotonic()), bool(ended)
        if stopped:
            found = [each for each in self.ranks.all_values(self.stop and (str(self.stop), self.stop.finding)) if each]
            raise self.stop or RunStopped(*found[0])
        if interrupted:
            raise AllInterrupted

    def _steps(self, step: int) -> int:
        """Until the next exchange, by the steps since the last one."""
        if self.last is None or step <= self.last[0]:
            return 1
        a_step = (time.monotonic() - self.last[1]) / (step - self.last[0])
        return max(1, min(MOST_STEPS, round(SECONDS / max(a_step, 1e-9))))

    @contextmanager
    def held(self) -> Iterator[None]:
        """With several ranks a RunStopped within the block waits for the next exchange, to be raised on all of them."""
        try:
            yield
        except RunStopped as stop:
            if self.ranks.alone:
                raise
            self.stop = self.stop or stop

    @contextmanager
    def signals_held(self) -> Iterator[None]:
        """With several ranks SIGINT, SIGTERM and SIGHUP within the block wait for the next exchange; from five seconds
        after the first on they act at once."""
        if self.ranks.alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in INTERRUPTS}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

        def note(number: int, frame: FrameType | None) -> None:
            if self.heard is None:
                self.heard = time.monotonic()
            elif time.monotonic() - self.heard > SAME:
                signal.signal(number, before[number])
                signal.raise_signal(number)

        with handled_by(note, before):
            yield
