"""What saves time in a step that is looked at hides nothing: gradients are read once where nothing changes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.watch import any_step
from ris_fast.health.watch.gradients import LARGE, UNCHANGED
from ris_fast.health.watch.records import StepRecord
from ris_fast.health.watch.schedule import SHARE, LookSchedule

STEPS = 12


def looks(
    change: Callable[[Tensor], Any] | None = None, in_hook: bool = False, width: int = 8
) -> tuple[list[StepRecord], Any]:
    """Records of a loop in which something is done to each gradient before the step, or in a hook after ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer)
    if in_hook:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: (change(p.grad), None)[1])
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        if change and not in_hook:
            for p in model.parameters():
                change(p.grad)
        optimizer.step()
    return seen.records, seen


def test_gradients_that_nothing_changes_are_the_same_on_both_sides() -> None:
    records, seen = looks()
    assert len(records) >= 8 and seen.report() == []
    assert all(torch.equal(each.grad_at_step, each.grad_after_backward) for each in records)
    assert all(each.grad_change is UNCHANGED for each in records)


@pytest.mark.parametrize("in_hook", [False, True])
@pytest.mark.parametrize("halve", [lambda g: g.mul_(0.5), lambda g: g.data.mul_(0.5)], ids=["counted", "uncounted"])
def test_gradients_that_something_halves_are_seen_at_both_norms(halve: Callable[[Tensor], Any], in_hook: bool) -> None:
    for each in looks(halve, in_hook)[0][:8]:  # later a hook of ours may come after theirs
        assert torch.allclose(each.grad_at_step, 0.5 * each.grad_after_backward, rtol=1e-5)


def test_norms_of_large_gradients_are_those_of_the_gradients() -> None:
    model = nn.Linear(512, LARGE // 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = watch(model, optimizer)
    for _ in range(2):  # accumulated: the last norm counts
        model(torch.ones(2, 512)).square().mean().backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    optimizer.step()
    assert torch.allclose(seen.records[0].grad_after_backward, norms, rtol=1e-5)


@pytest.mark.parametrize("period", [8, 10, 16])
def test_what_happens_now_and_then_is_met(period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the steps it is, in a loop that is long enough to pay for looks."""
    now = [0.0]
    monkeypatch.setattr(sys.modules[LookSchedule.__module__], "perf_counter", lambda: now[0])
    schedule, met = LookSchedule(100), set()
    for step in range(200):
        now[0] += 0.01
        if schedule.due(step):
            met.add(step % period)
            schedule.finish_look(step, 0.001)
    assert met == set(range(period)) and schedule.looks < 50


def test_looks_stay_within_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loop whose looks cost a third of a step, after the first steps."""
    now = [0.0]
    monkeypatch.setattr(sys.modules[LookSchedule.__module__], "perf_counter", lambda: now[0])
    schedule, spent, step_s, look_s = LookSchedule(10**6), 0.0, 0.03, 0.01
    for step in range(6000):
        now[0] += step_s
        if schedule.due(step):
            now[0] += look_s
            spent += look_s * (step >= 1000)
            schedule.finish_look(step, look_s)
    assert 0 < spent < 1.2 * SHARE * 5000 * step_s


def loop() -> tuple[nn.Module, Callable[[], None], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()

    return model, step, seen


def test_a_step_that_is_not_looked_at_runs_few_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the package's own, after the first hundred steps."""
    monkeypatch.setattr(any_step, "_LISTENERS", [])  # watches of other tests, which nobody has closed
    _, step, seen = loop()
    counts: list[int] = []

    def count(frame: FrameType, event: str, _: Any) -> None:
        counts[-1] += event == "call" and "ris_fast" in frame.f_code.co_filename

    for number in range(140):
        looks = seen.hooks[0].schedule.looks
        counts.append(0)
        sys.setprofile(count if number >= 100 else None)
        step()
        sys.setprofile(None)
        counts = counts if seen.hooks[0].schedule.looks == looks and number >= 100 else counts[:-1]
    assert len(counts) >= 10 and sorted(counts)[len(counts) // 2] <= 32


def test_every_pass_is_counted_and_late_evaluations_are_looked_at() -> None:
    model, step, seen = loop()
    for _ in range(99):
        step()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3))  # leaves no hook behind
    step()
    model.eval()
    with torch.no_grad():
        model(torch.randn(16, 8))
    model.train()
    step()
    passes = seen.forward.passes
    assert seen.forward.count in (102, 103)  # with the one that raised an error, where only those to come are counted
    assert [each.training for each in passes].count(False) == 1 and seen.forward.drawn == [False]
    assert len(model._forward_hooks) == 0 and len(model._forward_pre_hooks) == 1
