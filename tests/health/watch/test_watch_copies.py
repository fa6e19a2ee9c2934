"""What `watch` sees of steps that stop, gradients that are zero now and then, copies, and state that goes back; and
healthy loops that look alike."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from tests.health.watch.loops import network


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 40,
    after: Callable[[int], Any] = lambda step: None,
) -> list[Finding]:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer, every=1)
    for step in range(steps):
        optimizer.zero_grad()
        loss(torch.randn(16, 8)).backward()
        optimizer.step()
        after(step)
    return seen.report()


def of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: (model(x) - x[:, :4].sin()).square().mean()


def said(found: list[Finding], cause: str) -> bool:
    assert not any(each.certain for each in found if each.cause == cause)
    return cause in [each.cause for each in found]


# ---- steps that stop ----


class Stops(torch.optim.SGD):
    """A step that does nothing from some step on, or that something skips at times."""

    def __init__(self, *args: Any, moves: Callable[[int], bool], **options: Any) -> None:
        super().__init__(*args, **options)
        self.moves, self.made = moves, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.made += 1
        if self.moves(self.made):
            super().step(closure)


def stops(moves: Callable[[int], bool], rate: float = 0.1) -> list[Finding]:
    model = network()
    return fit(model, of(model), Stops(model.parameters(), lr=rate, moves=moves))


def test_watch_sees_steps_that_stop_moving_anything() -> None:
    assert said(stops(lambda step: step < 12), "step_without_effect")


@pytest.mark.parametrize("moves", [lambda n: True, lambda n: n % 4 == 0, lambda n: n > 12, lambda n: n % 8 < 5])
def test_watch_accepts_steps_that_are_skipped(moves: Callable[[int], bool]) -> None:
    assert not said(stops(moves), "step_without_effect")


def test_watch_accepts_a_rate_that_ends() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 12))
    assert not said(fit(model, of(model), optimizer, after=lambda step: schedule.step()), "step_without_effect")


# ---- zeros now and then ----


class Halves(nn.Module):
    def __init__(self, between: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.lower, self.blocks = nn.Linear(8, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.upper, self.between, self.calls = nn.Linear(16, 4), between, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.between(self.lower(x), self.calls)
        for block in self.blocks:
            x = x + block(x)
        return self.upper(x)


@pytest.mark.parametrize("between", [lambda x, n: x * (n % 7 > 0), lambda x, n: x + (x.detach() - x) * (n % 7 == 0)])
def test_watch_sees_zeros_now_and_then(between: Callable[[Tensor, int], Tensor]) -> None:
    model = Halves(between)
    found = fit(model, of(model), steps=120)
    assert said(found, "zeroed_gradients") and "in front of blocks.0" in found[0].evidence


class Dropped(nn.Module):
    """Blocks that are left out at random, for a whole batch."""

    def __init__(self, stem: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8) if stem else nn.Identity()
        self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) * float(torch.rand(()) > 0.1)
        return self.head(x)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.one(self.body(x)) + self.other(self.body(x)) * (self.calls % 7 > 0)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Halves(lambda x, n: x),
        lambda: Halves(lambda x, n: x.detach() if n % 7 == 0 else x),
        lambda: Halves(lambda x, n: x * (n > 3)),
        lambda: Dropped(True),
        lambda: Dropped(False),
        TwoHeads,
    ],
    ids=["plain", "detached", "at_first", "dropped", "no_stem", "heads"],
)
def test_watch_accepts_gradients_that_are_zero_at_times(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    made = model()
    assert not said(fit(made, of(made), steps=120), "zeroed_gradients")


# ---- copies ----


class Mean(nn.Module):
    def __init__(self, parts: list[nn.Module], weights: tuple[float, ...] = (0.5, 0.5)) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), weights

    def forward(self, x: Tensor) -> Tensor:
        return sum(weight * part(x) for weight, part in zip(self.weights, self.parts, strict=True))


def copies() -> list[nn.Module]:
    one = network()
    return [one, copy.deepcopy(one)]


def test_watch_sees_copies_that_nothing_tells_apart() -> None:
    model = Mean(copies())
    assert said(fit(model, of(model)), "symmetric_init")


def apart() -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda model: lambda x: sum((part(x[8 * n :][:8]) - n).square().mean() for n, part in enumerate(model.parts))


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: Mean([network(), nn.Linear(8, 4)]), of),
        (lambda: Mean(copies()), apart()),
        (lambda: Mean(copies(), (0.7, 0.3)), of),
        (lambda: Mean([copies()[0], copies()[1].requires_grad_(False)]), of),
        (lambda: Mean([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4), nn.LayerNorm(4)) for _ in range(2)]), of),
        (lambda: Mean([nn.Sequential(nn.Dropout(), part) for part in copies()]), of),
    ],
    ids=["others", "targets", "shares", "frozen", "norms", "dropout"],
)
def test_watch_accepts_layers_of_one_shape(
    model: Callable[[], Mean], loss: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    made = model()
    assert not said(fit(made, loss(made)), "symmetric_init")


# ---- state that goes back ----


def reload(
    kind: type[torch.optim.Optimizer], at: Callable[[int], bool], weights: bool = False, same: bool = True
) -> bool:
    model = network()
    optimizer = kind(model.parameters(), lr=1e-3, **{"momentum": 0.9} if kind is torch.optim.SGD else {})
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())

    def after(step: int) -> None:
        if at(step):
            optimizer.load_state_dict(copy.deepcopy(saved[0] if same else optimizer.state_dict()))
            if weights:
                model.load_state_dict(saved[1])

    return said(fit(model, of(model), optimizer, after=after), "optimizer_state_lost")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_watch_sees_a_state_that_is_loaded_again_and_again(kind: type[torch.optim.Optimizer]) -> None:
    assert reload(kind, lambda step: step % 8 == 7)


@pytest.mark.parametrize(
    ("kind", "at", "weights", "same"),
    [
        (torch.optim.Adam, lambda step: step == 8, False, True),
        (torch.optim.Adam, lambda step: step % 8 == 7, True, True),
        (torch.optim.SGD, lambda step: step % 8 == 7, True, True),
        (torch.optim.Adam, lambda step: step % 8 == 7, False, False),
        (torch.optim.SGD, lambda step: step % 8 == 7, False, False),
    ],
    ids=["once", "episodes", "episodes_sgd", "own", "own_sgd"],
)
def test_watch_accepts_a_state_that_is_loaded(
    kind: type[torch.optim.Optimizer], at: Callable[[int], bool], weights: bool, same: bool
) -> None:
    assert not reload(kind, at, weights, same)


# ---- sums that end in NaN, and zeros put there by hand ----


def test_watch_names_gradients_that_add_up_until_they_are_nan() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    seen = watch(model, optimizer)
    x, factor = torch.randn(16, 8), 1.0

    def closure() -> Tensor:
        loss = (model(x) - 1.0).square().mean() * factor
        loss.backward()
        return loss

    for factor in (1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), 1.0, 1.0):  # noqa: B007 (the closure reads it)
        optimizer.step(closure)
    assert "gradients_never_cleared" in [each.cause for each in seen.report()]


def test_watch_names_layers_that_nothing_calls_though_they_have_zeros() -> None:
    model = network()
    model.extra = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    model.forward = lambda x: model[2](F.gelu(model[0](x)))  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(16):
        optimizer.zero_grad()
        of(model)(torch.randn(16, 8)).backward()
        for p in model.extra.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert [each.cause for each in seen.report()] == ["unused_head"]


# ---- what a watch leaves behind ----


@pytest.mark.parametrize(
    "loss", [F.mse_loss, lambda p, y: F.cross_entropy(p.softmax(1), y.argmax(1))], ids=["l2", "ce"]
)
def test_a_closed_watch_leaves_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """No tensor and no record, however many watches one process has had."""

    def train() -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with watch(model, optimizer) as seen:
            for step in range(40):
                model.train(step % 10 != 9)
                x, y = torch.randn(16, 8), torch.randn(16, 4)
                outputs = model(x)
                value = seen.loss(loss(outputs, y), outputs, y)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()

    def alive() -> int:
        gc.collect()
        return sum(type(each) is Tensor or type(each).__name__ == "PassRecord" for each in gc.get_objects())

    train()
    before = alive()
    train()
    assert alive() <= before
