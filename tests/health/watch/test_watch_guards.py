"""Loops with a guard between backward and step, a loss of zero, `maximize`, a loss scale; and what `watch` is given,
keeps and closes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import Finding, watch
from tests.health.watch.loops import network


def guarded(
    at: Iterable[int], clear: Callable[[torch.optim.Optimizer], Any], size: float, steps: int = 40
) -> list[Finding]:
    """`size`: of the loss at these steps."""
    model, at = network(), set(at)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        ((model(torch.randn(16, 8)) - 1.0).square().mean() * (size if step in at else 1.0)).backward()
        if step in at:
            clear(optimizer)
        optimizer.step()
    return seen.report()


def none(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def zeros(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


def numbers(optimizer: torch.optim.Optimizer) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.where(p.grad.isfinite(), p.grad, torch.ones_like(p.grad))


@pytest.mark.parametrize("clear", [none, zeros])
@pytest.mark.parametrize("size", [50.0, float("nan")])
def test_watch_allows_a_guard_that_leaves_a_few_steps_out(clear: Callable[..., Any], size: float) -> None:
    assert guarded([3, 6, 30], clear, size) == []


def test_watch_counts_the_steps_that_a_guard_leaves_out() -> None:
    (many,) = guarded(range(0, 40, 2), none, 50.0)
    assert (many.cause, many.certain) == ("gradients_cleared_before_step", False) and "steps that were" in many.evidence
    (few,) = guarded(range(3, 40, 4), zeros, 1.0)  # no spike
    assert (few.cause, few.certain) == ("gradients_cleared_before_step", False)
    (every,) = guarded(range(40), zeros, 1.0)
    assert (every.cause, every.certain) == ("gradients_cleared_before_step", True)


def test_watch_tells_numbers_for_nan_from_steps_left_out() -> None:
    some = guarded([2, 5], numbers, float("nan"))[0]
    assert (some.cause, some.certain) == ("sanitised_gradients", False) and "2 of the" in some.evidence
    every = guarded(range(40), numbers, float("nan"))[0]
    assert (every.cause, every.certain) == ("sanitised_gradients", True)
    left_out = guarded(range(40), none, float("nan"))[0]  # the loss tells more
    assert (left_out.cause, left_out.certain) == ("nonfinite_gradients", True)


def test_watch_doubts_gradients_of_a_loss_that_is_zero() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        (model(torch.randn(16, 8)).square() - 1e6).relu().mean().backward()
        optimizer.step()
    found = seen.report()
    assert found and not any(each.certain for each in found)
    assert any(each.cause == "vanishing_gradient" and "exactly 0" in each.evidence for each in found)


@pytest.mark.parametrize(
    ("up", "sign", "expected"), [(True, -1, []), (True, 1, ["loss_sign"]), (False, -1, ["loss_sign"])]
)
@pytest.mark.parametrize("told", [True, False])
def test_watch_knows_which_way_the_optimizer_goes(up: bool, sign: int, expected: list[str], told: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, maximize=up)
    seen = watch(model, optimizer)
    for _ in range(24):
        x = torch.randn(32, 8)
        y = model(x)
        optimizer.zero_grad()
        loss = sign * F.mse_loss(y, x[:, :4])
        (seen.loss(loss, y, x[:, :4]) if told else loss).backward()
        optimizer.step()
    assert [each.cause for each in seen.report()] == expected


def scaled_loop(unscaled: bool) -> list[Finding]:
    model = network()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-6), torch.amp.GradScaler("cpu")
    seen = watch(model, optimizer)
    for _ in range(12):
        loss = F.mse_loss(model(torch.randn(32, 8)), torch.ones(32, 4))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if unscaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return seen.report()


def test_watch_sees_a_loss_scale_that_is_left_in() -> None:
    assert "gradient_scale_differs" in [each.cause for each in scaled_loop(False)]
    assert "gradient_scale_differs" not in [each.cause for each in scaled_loop(True)]


class Tokens(nn.Module):
    """A layer that is applied to learned tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens, self.second = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 8)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) @ self.second(torch.relu(self.tokens)).T)


class Folded(nn.Module):
    """Two scenes in one row, from the first layer on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.reshape(-1, 16)).relu()).reshape(-1, 4)


class Turned(nn.Module):
    """Time first, within."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.transpose(0, 1)).transpose(0, 1)


def fit(model: nn.Module, optimizer: Any, given: tuple[int, ...] = (32, 8), **options: Any) -> list[Finding]:
    seen = watch(model, optimizer, **options)
    for _ in range(12):
        for each in optimizer if isinstance(optimizer, list) else [optimizer]:
            each.zero_grad()
            (model(torch.randn(given)) - 1.0).square().mean().backward()
            each.step()
    return seen.report()


@pytest.mark.parametrize(
    ("make", "given", "expected"),
    [(Tokens, (32, 8), []), (Turned, (8, 4, 3), []), (Folded, (32, 8), ["batch_shrinks"])],
)
def test_watch_knows_which_rows_are_the_batch(
    make: type[nn.Module], given: tuple[int, ...], expected: list[str]
) -> None:
    model = make()
    found = fit(model, torch.optim.SGD(model.parameters(), lr=1e-3), given)
    assert [each.cause for each in found if each.cause == "batch_shrinks"] == expected


def test_watch_takes_each_optimizer_once_and_two_in_turn() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, [optimizer, optimizer])
    assert seen.optimizers == [optimizer] and seen.report() == []
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    parts = [torch.optim.SGD([*model[0].parameters(), *each.parameters()], lr=1e-2) for each in (model[2], model[1])]
    assert "duplicate_parameters" not in [each.cause for each in fit(model, parts)]


def test_watch_allows_declared_normalisations_and_empty_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[1].eval().requires_grad_(False)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 4)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert fit(model, optimizer, frozen=("1.",)) == []


class Wrapped(torch.optim.Optimizer):
    """As accelerate's: without `Optimizer.__init__`."""

    def __init__(self, inner: torch.optim.Optimizer, name: str = "optimizer") -> None:
        setattr(self, name, inner)
        self.inner_step = inner.step

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner_step()


def test_watch_looks_into_wrapped_optimizers() -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    assert watch(model, Wrapped(inner)).optimizers == [inner]
    with pytest.raises(ValueError, match="torch optimizer within it"):
        watch(model, Wrapped(inner, "base"))


def test_watch_takes_scripted_modules() -> None:
    model = torch.jit.script(network())
    assert fit(model, torch.optim.SGD(model.parameters(), lr=1e-2)) == []
    seen = watch(model, torch.optim.SGD(list(model.parameters())[:2], lr=1e-2))
    assert seen.report()[0].cause == "missing_from_optimizer"
    seen.close()


def test_closed_watch_keeps_its_findings_and_nothing_else() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-2)
    gone = weakref.ref(model), weakref.ref(optimizer)
    with watch(model, optimizer) as seen:
        model(torch.randn(8, 8)).sum().backward()
        optimizer.step()
    del model, optimizer
    gc.collect()
    assert [each() for each in gone] == [None, None] and seen.steps == 1
    assert [each.cause for each in seen.report()] == ["missing_from_optimizer"] and seen.loss(3.0) == 3.0
    seen.close()
    assert pickle.loads(pickle.dumps(seen)).report() == seen.report()


def test_copies_of_a_watch_watch_nothing() -> None:
    model = network()
    seen = watch(model, torch.optim.SGD(model[0].parameters(), lr=1e-2))
    assert copy.deepcopy({"trainer": seen})["trainer"].report() == [] and seen.report()


@pytest.mark.parametrize("wait_s", ["x", -1, float("nan"), True])
def test_report_refuses_what_is_no_time(wait_s: Any) -> None:
    model = network()
    seen = watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match="wait_s"):
        seen.report(wait_s=wait_s)
    with pytest.raises(ValueError, match="frozen"):
        watch(model, torch.optim.SGD(model.parameters(), lr=1e-2), frozen=("",))
