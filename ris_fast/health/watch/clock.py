"""A clock for a loop that makes no step: where its thread stands, seen from another thread.

It starts by itself only between ranks, where a loop that hangs in a collective reports nothing any more; there it
speaks only of a thread that waits for other ranks, and not of a notebook between cells, a debugger or an evaluation. On
request it speaks of every wait. The thread is a daemon, ends with the watch, and costs the loop nothing: it reads how
many steps were made.
"""

from __future__ import annotations

import logging
import math
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import finding

STALL_S = 300.0  # below the usual limits of torch.distributed, after which it ends the process
LOOKS = 8  # in the time without a step
LONGEST_SLEEP_S = 30.0
LIBRARY = (sysconfig.get_path("stdlib"), "<frozen")

logger = logging.getLogger("ris_fast.health.watch")


@dataclass(frozen=True)
class Place:
    """Where a thread stands. Args: call: what of torch it waits in for other ranks, or empty; inner: the innermost
    function; line: of the innermost code that is the loop's own, as
        file:line (function)."""

    call: str
    inner: str
    line: str


@dataclass(frozen=True)
class Stall:
    seconds: float
    steps: int
    place: Place
    asked: bool

    def finding(self) -> Finding:
        """What is said of it, at once and in a report."""
        where = f"in {self.place.call}, called at" if self.place.call else f"in {self.place.inner}, at"
        return finding(
            "no_progress",
            f"no step for {self.seconds:.3g} seconds after step {self.steps}: the thread stands {where}"
            f" {self.place.line}.",
            self.steps,
            "Another rank may be busy on purpose, as with an evaluation or a checkpoint."
            if self.place.call
            else "An evaluation or a checkpoint may take so long.",
        )


class Clock:
    """Looks at the thread that made it.

    Args: count_steps: steps made so far; limit_s: without a step, until it speaks; None for 300 seconds in which the
        thread waits for other ranks all the time.
    """

    def __init__(self, count_steps: Callable[[], int], limit_s: float | None = None) -> None:
        self.count_steps, self.asked = count_steps, limit_s is not None
        self.limit_s = STALL_S if limit_s is None else limit_s
        self.thread_id = threading.get_ident()
        self.stalls: list[Stall] = []
        self.steps, self.since, self.said = count_steps(), time.monotonic(), False
        self.place: Place | None = None
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread; again: nothing."""
        if self.thread is None and math.isfinite(self.limit_s) and not self.stop.is_set():
            self.thread = threading.Thread(
                target=_run,
                args=(weakref.ref(self), self.stop, min(self.limit_s / LOOKS, LONGEST_SLEEP_S)),
                name="ris_fast.health.watch.clock",
                daemon=True,
            )
            weakref.finalize(self, self.stop.set)
            self.thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self.stop.set()

    def findings(self) -> list[Finding]:
        return [stall.finding() for stall in self.stalls]

    def look(self, now: float) -> None:
        """Where the thread stands. `now`: on the clock of `time.monotonic`."""
        steps, frame = self.count_steps(), sys._current_frames().get(self.thread_id)
        place = None if frame is None else find_place(frame)
        waits = place is not None and (self.asked or (bool(place.call) and place == self.place))
        if steps != self.steps or not waits:
            self.since = now
        self.said = self.said and steps == self.steps
        self.steps, self.place = steps, place
        if place is not None and not self.said and now - self.since >= self.limit_s:
            self.said = True
            self.stalls.append(Stall(now - self.since, steps, place, self.asked))
            logger.warning("%s", self.stalls[-1].finding())


def _run(clock: weakref.ref[Clock], stop: threading.Event, every_s: float) -> None:
    """The thread: holds no clock while it sleeps, so that one that nobody holds any more ends it."""
    while not stop.wait(every_s):
        if (found := clock()) is None:
            return
        found.look(time.monotonic())
        del found


def find_place(frame: FrameType) -> Place:
    """Of a thread's innermost frame."""
    frames = [frame]
    while frames[-1].f_back is not None:
        frames.append(frames[-1].f_back)
    within = next((n for n, each in enumerate(frames) if _package(each) != "torch"), len(frames) - 1)
    own = next((each for each in frames if _is_own(each)), frames[-1])
    code = own.f_code
    return Place(
        call=_rank_call(frames[:within]),
        inner=f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}",
        line=f"{code.co_filename}:{own.f_lineno} ({code.co_name})",
    )


def _is_own(frame: FrameType) -> bool:
    """Whether it is of the loop, and not of a library."""
    file = frame.f_code.co_filename
    return _package(frame) not in ("torch", "ris_fast") and "site-packages" not in file and not file.startswith(LIBRARY)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _rank_call(frames: list[FrameType]) -> str:
    """What of torch is waited in for other ranks; `frames`: torch's, the innermost first."""
    names = [(str(each.f_globals.get("__name__")), each.f_code.co_name) for each in frames]
    distributed = [
        name for module, name in names if module.startswith("torch.distributed") and not name.startswith(("wrap", "_"))
    ]
    if distributed:
        return f"torch.distributed's {distributed[-1]}"
    if any(module == "torch.nn.parallel.distributed" for module, _ in names):
        return "DistributedDataParallel's forward, which waits for the other ranks"
    if names and names[0][0] == "torch.autograd.graph":
        return "backward, where DistributedDataParallel waits for the other ranks"
    return ""
