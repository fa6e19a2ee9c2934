"""A watch ends no loop: an error of its own is said, and its reports say nothing from then on."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAILURES: list[str] = []  # of all watches of the process


def guarded(function: Callable[..., None], *args: Any) -> None:
    """Calls what looks on at a loop."""
    try:
        function(*args)
    except Exception as error:
        say_failure(error)


def say_failure(error: Exception) -> None:
    """Notes and says an error of the watch itself."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    FAILURES.append(f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")
    warn(FAILURES[-1])


def warn(failure: str) -> None:
    warnings.warn(
        f"ris_fast.health.watch met an error of its own, {failure}. The loop goes on, and reports of this watch say"
        " nothing, since what was seen may be in part. Please tell the project, with this line.",
        RuntimeWarning,
        stacklevel=3,
    )
