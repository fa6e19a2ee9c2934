"""Learning health: why a run does not learn, reported at once, with its cause."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ris_fast.health.watch import watch as watch  # now: importing the package of that name later would replace it

if TYPE_CHECKING:  # the names of _HOMES, for type checkers and editors
    from ris_fast.health.finding import Finding as Finding
    from ris_fast.health.monitor.attach import attach_health as attach_health
    from ris_fast.health.monitor.attach import watched as watched
    from ris_fast.health.monitor.watchdog import Watchdog as Watchdog

_HOMES = {
    "Finding": "finding",
    "Watchdog": "monitor.watchdog",
    "attach_health": "monitor.attach",
    "watched": "monitor.attach",
}
__all__ = ["watch", *_HOMES]

if not TYPE_CHECKING:  # a type checker that sees it takes every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'ris_fast.health' has no attribute '{name}'. It has: {', '.join(__all__)}.")
        return getattr(import_module(f"ris_fast.health.{_HOMES[name]}"), name)
