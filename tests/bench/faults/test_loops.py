"""A loop under `watch` goes through the trial with its mistake and without it, in one process and in two ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.faults.loops import __main__ as command
from bench.faults.loops import trial
from bench.faults.loops.catalogue import Attach, Group, all_loops
from bench.faults.loops.trial import Judged, LoopOutcome, judge_loop, score_loop

GROUP = Group("own")
STEPS = 30


@GROUP.mistake("the optimizer has the last layer alone", "missing_from_optimizer")
def half_an_optimizer(attach: Attach, wrong: bool, seed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD((model[2] if wrong else model).parameters(), lr=0.1)
    seen = attach(model, optimizer)
    for _ in range(STEPS):
        inputs = torch.randn(16, 4)
        outputs, target = model(inputs), inputs.sum(1, keepdim=True)
        optimizer.zero_grad()
        seen.loss(nn.functional.mse_loss(outputs, target), outputs, target).backward()
        optimizer.step()


@GROUP.mistake("the second rank's optimizer has no rate", "ranks_diverged zero_learning_rate", ranks=2)
def idle_rank(attach: Attach, wrong: bool, seed: int) -> None:
    assert dist.get_world_size() == 2
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if wrong and dist.get_rank() == 1 else 0.1)
    attach(model, optimizer)
    for _ in range(STEPS):
        inputs = torch.randn(16, 4)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()


@GROUP.right("a loop that an exception ends, with another default dtype and without gradients")
def interrupted(attach: Attach, wrong: bool, seed: int) -> None:
    model = nn.Linear(4, 1)
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    raise KeyError("no batch 7")


@GROUP.right("one rank never ends", ranks=2)
def waits_for_ever(attach: Attach, wrong: bool, seed: int) -> None:
    model = nn.Linear(4, 1)
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if dist.get_rank() == 0:
        time.sleep(1000)


HALF, IDLE, INTERRUPTED, WAITING = GROUP.loops


@pytest.mark.parametrize("loop", [HALF, pytest.param(IDLE, marks=pytest.mark.slow)], ids=lambda loop: loop.name)
def test_the_mistake_is_named_and_the_twin_is_silent(loop: Any) -> None:
    judged = judge_loop(loop)
    mistake, twin = judged.mistake, judged.twin
    assert mistake is not None and not mistake.crashed and not twin.crashed
    assert twin.said == () and not judged.accused
    assert mistake.said[0] == loop.expect[0] and judged.detected and judged.named
    assert len(mistake.certain) == len(mistake.said) and mistake.evidence and mistake.seconds > 0


def test_an_exception_is_noted_and_leaves_torch_as_it_was() -> None:
    outcome = score_loop(INTERRUPTED, False)
    assert outcome.crashed.startswith("KeyError: 'no batch 7' (test_loops.py:")
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert judge_loop(INTERRUPTED).mistake is None  # there is none to make


@pytest.mark.slow
def test_a_rank_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "RANKS_LIMIT_S", 3.0)
    assert score_loop(WAITING, False).crashed == "rank 0: was not through after 3 s"


@pytest.mark.parametrize(
    ("of_mistake", "of_twin", "detected", "named"),
    [
        (("zero_learning_rate", "dead_units"), (), True, True),
        (("dead_units", "zero_learning_rate"), (), True, False),
        (("zero_learning_rate", "dead_units"), ("dead_units",), True, True),
        (("zero_learning_rate", "dead_units"), ("zero_learning_rate",), True, False),
        (("dead_units",), ("dead_units", "collapsed"), False, False),
        ((), (), False, False),
    ],
)
def test_only_what_the_twin_is_not_accused_of_counts(
    of_mistake: tuple[str, ...], of_twin: tuple[str, ...], detected: bool, named: bool
) -> None:
    def outcome(wrong: bool, said: tuple[str, ...]) -> LoopOutcome:
        certain = (True,) * len(said)
        return LoopOutcome("a", "b", wrong, ("zero_learning_rate",) * wrong, said, certain, "", 0.0)

    judged = Judged(outcome(False, of_twin), outcome(True, of_mistake))
    assert (judged.detected, judged.named, judged.accused) == (detected, named, bool(of_twin))


def test_the_command_prints_lines_on_request_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "all_loops", lambda: {loop.name: loop for loop in (HALF, INTERRUPTED)})
    command.main([])
    totals = capsys.readouterr().out
    assert HALF.name not in totals and totals.splitlines()[-1].split()[:-1] == "own 1 1 1 2 0 0 1".split()
    command.main(["--show", "--only", HALF.name])
    assert capsys.readouterr().out.startswith(f"named    own                   {HALF.name}")
    with pytest.raises(SystemExit):
        command.main(["--group", "nobody"])


def test_every_loop_of_the_catalogue_is_one_function_of_its_name() -> None:
    for name, loop in all_loops().items():
        run: Callable = loop.run
        assert run.__name__ == name and loop.story and loop.ranks in (1, 2)
