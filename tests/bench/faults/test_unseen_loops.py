"""Mistakes of the examination cost something: with the mistake, a loop ends at a clearly larger loss than its twin."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from bench.faults.loops.catalogue import Loop, all_loops
from bench.faults.loops.trial import as_before

UNSEEN = [loop for loop in all_loops().values() if loop.group.startswith("unseen_2026_11")]
SAMPLED = [loop for loop in UNSEEN if loop.ranks == 1][::3]  # the score of the rules runs them all
COSTS = 1.12  # the cheapest of them makes the loss a sixth larger


class Unwatched:
    """What a loop gets that is not watched."""

    def loss(self, value: Any, *_: Any) -> Any:
        return value

    def close(self) -> None:
        pass


def ended_at(loop: Loop, wrong: bool) -> float:
    with as_before(0):
        loss = loop.run(lambda *_, **__: Unwatched(), wrong, 0)
    assert loss is not None
    return loss


def test_every_set_has_twenty() -> None:
    which = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    sets = [f"unseen_2026_11_{each}" for each in which]
    assert Counter(loop.group for loop in UNSEEN) == dict.fromkeys(sets, 20)
    assert all(1 <= len(loop.expect) <= 3 for loop in UNSEEN)


@pytest.mark.slow
@pytest.mark.parametrize("loop", SAMPLED, ids=lambda loop: loop.name)
def test_a_mistake_costs_something(loop: Loop) -> None:
    right, wrong = ended_at(loop, False), ended_at(loop, True)
    assert math.isfinite(right)
    assert not math.isfinite(wrong) or wrong > COSTS * right
