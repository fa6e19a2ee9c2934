"""The clock of a watch: where a loop stands that makes no step, and that it leaves a healthy one alone."""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ris_fast.health import watch
from ris_fast.health.watch.clock import Clock, find_place
from tests.health.watch.loops import network, train
from tests.training.ranks.processes import values


def eventually(done: Callable[[], bool], within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while not done() and time.monotonic() < end:
        time.sleep(0.01)
    return done()


def watched(**options):
    model = network()
    return watch(model, torch.optim.SGD(model.parameters(), lr=1e-2), **options)


def test_watch_clock_names_the_line_where_the_loop_stands_once(caplog: pytest.LogCaptureFixture) -> None:
    seen = watched(stall_s=600)
    clock, now = seen.ranks.clock, time.monotonic()
    with caplog.at_level(logging.WARNING, "ris_fast.health.watch"):
        train(seen.model, seen.optimizers[0], 3)
        for later in (0, 599, 601, 900):
            clock.look(now + later)
        (found,) = seen.report()
        assert len(caplog.records) == 1 and "no_progress" in caplog.text
    assert found.cause == "no_progress" and not found.certain and found.step == 3
    assert "test_watch_clock.py" in found.evidence and "601 seconds after step 3" in found.evidence
    train(seen.model, seen.optimizers[0], 1)
    clock.look(now + 1000)
    clock.look(now + 1601)
    assert len(clock.stalls) == 2
    seen.close()


def test_watch_clock_looks_by_itself() -> None:
    seen = watched(stall_s=0.05)
    assert eventually(lambda: seen.ranks.clock.stalls)
    assert "(eventually)" in seen.report()[0].evidence
    seen.close()


def test_watch_clock_is_silent_while_steps_are_made() -> None:
    count = iter(range(1000))
    clock = Clock(lambda: next(count), limit_s=1.0)
    for now in range(100):
        clock.look(float(now))
    assert clock.findings() == []


def standing_in(name: str, body: str = "wait()"):
    """A frame that stands in a function of a module called `name`, which this file calls."""
    space = {"__name__": name, "wait": lambda: sys._getframe(1)}
    exec(f"def reduce_all():\n    return {body}\n", space)
    return space["reduce_all"]()


def test_clock_by_default_speaks_only_of_waits_for_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda: 5)
    for name, told in (("mine", 0), ("pdb", 0), ("torch.optim.sgd", 0), ("torch.distributed.distributed_c10d", 1)):
        frame = standing_in(name)
        monkeypatch.setattr(sys, "_current_frames", lambda frame=frame: {clock.thread_id: frame})
        for now in range(0, 1000, 30):
            clock.look(float(now))
        assert len(clock.stalls) == told
    assert "torch.distributed's reduce_all" in clock.findings()[0].evidence


def test_clock_by_default_does_not_add_up_short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda: 5)
    frames = [standing_in("torch.distributed.distributed_c10d"), standing_in("mine")]
    for n, now in enumerate(range(0, 3000, 30)):
        monkeypatch.setattr(sys, "_current_frames", lambda n=n: {clock.thread_id: frames[n % 8 == 7]})
        clock.look(float(now))
    assert clock.stalls == []


def test_find_place_names_backward_and_the_calling_line() -> None:
    class Stands(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            places.append(find_place(sys._getframe().f_back.f_back))
            return grad

    places: list = []
    Stands.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert places[0].call.startswith("backward") and "test_find_place" in places[0].line


def test_watch_clock_starts_and_ends_with_the_watch() -> None:
    seen, never = watched(), watched(stall_s=math.inf)
    train(seen.model, seen.optimizers[0], 2)
    assert seen.ranks.clock.thread is None and never.ranks.clock.thread is None
    seen = watched(stall_s=60.0)
    thread = seen.ranks.clock.thread
    assert thread.is_alive() and thread.daemon
    seen.close()
    assert eventually(lambda: not thread.is_alive())
    seen = watched(stall_s=60.0)
    thread = seen.ranks.clock.thread
    del seen
    gc.collect()
    assert eventually(lambda: not thread.is_alive())


@pytest.mark.parametrize("stall_s", [0, -1.0, "long", True, float("nan")])
def test_watch_refuses_what_is_no_time(stall_s) -> None:
    with pytest.raises(ValueError, match="stall_s"):
        watched(stall_s=stall_s)


def stands_alone() -> list[str]:
    """Rank 0 waits in a collective that rank 1 enters only when told."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    seen = watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    assert seen.ranks.clock.thread is not None
    seen.close()
    clock = Clock(lambda: 7, None)
    clock.limit_s = 0.2
    clock.start()
    if dist.get_rank() == 1:
        time.sleep(1.0)
    dist.all_reduce(torch.ones(4))
    clock.close()
    said = [each.evidence for each in clock.findings()]
    dist.destroy_process_group()
    return said


def test_clock_names_the_collective_that_a_rank_stands_in() -> None:
    mine, others = values(2, stands_alone)
    assert len(mine) == 1 and "torch.distributed's all_reduce" in mine[0] and "(stands_alone)" in mine[0]
    assert others == []
