"""A learning rate that follows a schedule of the user's own: what no schedule is meant to do, and what some do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ris_fast.health.own_schedule import out_of_plan

EPOCH, PLANNED = 8, 4000

MEANT: dict[str, Callable[[int], float]] = {
    "constant": lambda n: 1.0,
    "a warm-up of an epoch": lambda n: min(1.0, (n + 1) / EPOCH),
    "a cosine of epochs": lambda n: 0.5 * (1 + math.cos(math.pi * (n // EPOCH) / (PLANNED // EPOCH))),
    "a decay with each epoch": lambda n: 0.98 ** (n // EPOCH),
    "halved once": lambda n: 1.0 if n < 17 else 0.5,
    "one cycle": lambda n: min(1.0, 0.04 + n / 1200),
    "restarts from a little above its peak": lambda n: 0.001 + 0.5 * (1 + math.cos(math.pi * (n % 100) / 100)),
    "a rate of its own": lambda n: 2.0,
    "linear to zero": lambda n: 1 - n / PLANNED,
}
WRONG: dict[str, tuple[Callable[[int], float], str]] = {
    "a warm-up without an end": (lambda n: (n + 1) / EPOCH, "times its peak rate"),
    "a cosine of epochs by updates": (lambda n: 0.5 * (1 + math.cos(math.pi * n / 5)), "turns"),
    "a decay with each update": (lambda n: 0.9**n, "a thousandth"),
    "begun anew with each epoch": (lambda n: (n % EPOCH + 1) / EPOCH, "in every epoch"),
    "the rate of the rate": (lambda n: 0.005, "does not rise"),
    "zero": (lambda n: max(0.0, 1 - n / 10), "is zero"),
}


@pytest.mark.parametrize("name", [*MEANT, *WRONG])
def test_out_of_plan_tells_schedules_from_mistakes(name: str) -> None:
    share, seen = WRONG[name] if name in WRONG else (MEANT[name], "")
    said = out_of_plan([(n, share(n)) for n in range(3 * EPOCH)], EPOCH, PLANNED)
    assert bool(said) == (name in WRONG) and seen in said
