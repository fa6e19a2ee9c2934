"""What a rank raises because another one has ended, and which one that was."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from ris_fast import exit_codes

GATHERING = 10.0  # seconds in which ranks that still live say so: each hears of the end only when its own step waits
OF_TWO = 2.0  # seconds of it where there is one other rank, whose name is known


class RankLost(RuntimeError):
    """Another rank has ended, or cannot be reached. Exit code 130: this one was ended from outside."""

    exit_code = exit_codes.INTERRUPTED
    follows = True  # from another rank's end, which is the cause

    def __init__(self, lost: Sequence[int], heard: str) -> None:
        names = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost[:8]))}" if lost else "another rank"
        said = re.sub(r"^\[[^]]*\] ", "", heard.strip()).partition(" This is")[0] or "nothing"
        super().__init__(
            f"{names} ended; its own message or torchrun's says why (heard here: {said})".replace(".)", ")")
        )
        self.lost = tuple(lost)


class AllInterrupted(KeyboardInterrupt):
    """A signal to any rank, as all of them act on it after the same step."""


class EndedByFirst(RuntimeError):
    """Rank 0 has raised an error with this exit code in what it does for all, and says it itself."""

    follows = said = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("rank 0 ended the run; its own message says why")
        self.exit_code = exit_code


def name_the_lost(store: Any, rank: int, size: int) -> list[int]:
    """The ranks that do not answer: each one that has lost another says in the store that it lives. The last one that
    has not said so has ended, and so have all who have not when the time is over. Empty where nobody can know."""
    if store is None:
        return []
    try:
        store.set(f"alive/{rank}", "")
        others = [other for other in range(size) if other != rank]
        deadline = time.monotonic() + (GATHERING if size > 2 else OF_TWO)
        while True:
            silent = [other for other in others if not store.check([f"alive/{other}"])]
            if len(silent) <= 1 and size > 2 or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)
    except RuntimeError:  # the store has ended with its process
        return []
