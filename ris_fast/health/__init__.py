"""Learning health: why a run does not learn, said at once and by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Finding": "finding",
    "Watchdog": "monitor.watchdog",
    "attach_health": "monitor.attach",
    "watch": "watch.watch",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ris_fast.health' has no attribute '{name}'. It has: {', '.join(_HOMES)}.")
    value = getattr(import_module(f"ris_fast.health.{_HOMES[name]}"), name)
    globals()[name] = value  # importing the package `watch` has put the module where the function belongs
    return value
