"""Right loops learn, and a published mistake makes its loop compute something else than its twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.faults.loops import published
from bench.faults.loops.catalogue import Loop, all_loops
from bench.faults.loops.trial import as_before

LOOPS = list(all_loops().values())
PUBLISHED = [loop for loop in LOOPS if loop.group.startswith("published")]
RIGHT = [loop for loop in LOOPS if loop.group.startswith("right_")]


class Unwatched:
    """What a loop gets that is not watched."""

    def loss(self, value: Any, *_: Any) -> Any:
        return value

    def close(self) -> None:
        pass


def weights_after(loop: Loop, wrong: bool, seed: int) -> Tensor:
    """All numbers of the model that the loop has trained."""
    models: list[nn.Module] = []

    def attach(model: nn.Module, optimizer: Any, **options: Any) -> Unwatched:
        models.append(model)
        return Unwatched()

    with as_before(seed):
        loop.run(attach, wrong, seed)
    return torch.cat([value.detach().double().flatten() for value in models[-1].state_dict().values()])


def test_the_table_has_every_published_loop_and_no_other() -> None:
    rows = [line.split("|") for line in (published.__doc__ or "").splitlines() if line.startswith("|")][2:]
    named = [row[2].strip() for row in rows]
    assert len(rows) == 26
    assert sorted(name for name in named if name != "none") == sorted(loop.name for loop in PUBLISHED)
    assert all(loop.source and 1 <= len(loop.expect) <= 3 for loop in PUBLISHED)


def test_right_loops_are_of_many_kinds() -> None:
    assert len(RIGHT) >= 40
    assert not any(loop.expect for loop in RIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [loop for loop in PUBLISHED if loop.ranks == 1], ids=lambda loop: loop.name)
def test_a_published_mistake_changes_what_is_computed(loop: Loop) -> None:
    right = weights_after(loop, False, 0)
    assert torch.equal(right, weights_after(loop, False, 0))
    assert not torch.equal(right, weights_after(loop, True, 0))


@pytest.mark.slow
@pytest.mark.parametrize("loop", [loop for loop in RIGHT if loop.ranks == 1], ids=lambda loop: loop.name)
def test_a_right_loop_learns_and_another_seed_is_another_run(loop: Loop) -> None:
    first = weights_after(loop, False, 0)  # the loop raises where its loss does not fall
    second = weights_after(loop, False, 1)
    assert first.shape != second.shape or not torch.equal(first, second)
