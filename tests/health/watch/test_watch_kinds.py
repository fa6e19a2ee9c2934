"""Kinds of evidence, each with one mistake and its right twin: layers, scenes known again, losses met in backward, own
functions, schedulers, states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ris_fast.health import watch
from ris_fast.health.finding import Finding

Loss = Callable[[Tensor, Tensor], Tensor]


def mlp(*between: nn.Module, width: int = 16, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), *(between or (nn.Tanh(),)), nn.Linear(width, outputs))


def fit(
    model: nn.Module,
    loss: Loss = F.mse_loss,
    steps: int = 40,
    before: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda step, x, y: (x, y),
    told: bool = False,
    labels: bool = False,
) -> list[Finding]:
    """Epochs of 64 scenes in batches of 16."""
    torch.manual_seed(0)
    data = torch.randn(64, 8)
    targets = data[:, :4].argmax(1) if labels else data[:, :1] - data[:, 1:2] * data[:, 2:3]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for step in range(steps):
        if step % 4 == 0:
            order = torch.randperm(64)
        chosen = order[16 * (step % 4) : 16 * (step % 4 + 1)]
        x, y = before(step, data[chosen], targets[chosen])
        output = model(x)
        value = loss(output, y)
        if told:
            seen.loss(value, output, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    found = seen.report()
    seen.close()
    return found


class Bent(torch.autograd.Function):
    """x * sigmoid(x), with a backward that forgets one term where it is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forgets: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.forgets = forgets
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradients[0] * (s if ctx.forgets else s + x * s * (1 - s)), None


class By(nn.Module):
    """A layer, what `middle` makes of it and whether the mistake is in it, and another layer."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.middle = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, self.first(x)))


def noisy(model: nn.Module, hidden: Tensor, rate: float) -> Tensor:
    """A block that is computed again in backward, and draws its noise anew there."""

    def block(h: Tensor) -> Tensor:
        return torch.tanh(model.inner(F.dropout(h, rate)))

    return checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=rate == 0)


def in_turn(model: nn.Module, hidden: Tensor, detached: bool) -> Tensor:
    """One layer again and again."""
    for _ in range(4):
        hidden = torch.tanh(model.inner(hidden.detach() if detached else hidden))
        hidden = model.inner(hidden)
    return hidden


MODELS: dict[str, tuple[Callable[[bool], nn.Module], str]] = {
    "function": (lambda wrong: By(lambda m, h: Bent.apply(m.inner(h), wrong)), "wrong_backward"),
    "checkpoint": (lambda wrong: By(lambda m, h: noisy(m, h, 0.5 if wrong else 0.0)), "recomputed_differently"),
    "axis": (lambda wrong: By(lambda m, h: F.softmax(m.inner(h), dim=0 if wrong else 1)), "scenes_mixed"),
    "dropout": (lambda wrong: mlp(nn.Tanh(), nn.Dropout(0.9 if wrong else 0.1)), "heavy_dropout"),
    "epsilon": (lambda wrong: mlp(nn.LayerNorm(16, eps=1e3 if wrong else 1e-5)), "epsilon_swallows_signal"),
    "shared": (
        lambda wrong: mlp(*([nn.Linear(16, 16)] * 2 if wrong else [nn.Linear(16, 16) for _ in range(2)])),
        "tied_parameters",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrong", [True, False])
def test_watch_tells_what_is_wrong_in_a_model(name: str, wrong: bool) -> None:
    torch.manual_seed(0)
    make, cause = MODELS[name]
    found = [each.cause for each in fit(make(wrong))]
    assert found[:1] == [cause] if wrong else not found


LOSSES: dict[str, tuple[Callable[[bool], Loss], str, bool]] = {
    "sign": (lambda wrong: lambda o, y: (-1.0 if wrong else 1.0) * F.mse_loss(o, y), "loss_sign", False),
    "clamp": (
        lambda wrong: lambda o, y: (o - y - 9).square().clamp(max=1.0 if wrong else 1e6).mean(),
        "clamped_loss",
        False,
    ),
    "rounded": (
        lambda wrong: lambda o, y: (o.round() if wrong else o).sub(y).square().mean(),
        "non_differentiable",
        False,
    ),
    "logarithm": (
        lambda wrong: lambda o, y: F.nll_loss(o.softmax(1) if wrong else o.log_softmax(1), y),
        "wrong_units",
        True,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrong", [True, False])
def test_watch_tells_what_is_wrong_in_a_loss_that_it_was_not_told(name: str, wrong: bool) -> None:
    torch.manual_seed(0)
    make, cause, labels = LOSSES[name]
    found = [each.cause for each in fit(mlp(outputs=4 if labels else 1), make(wrong), labels=labels)]
    assert found[:1] == [cause] if wrong else not found


def shuffled(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y[torch.randperm(len(y))]


def kept_half(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([torch.ones(8, 8).cumsum(1), x[8:]]), y


def now_and_then_zero(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * (step % 4 > 0), y


@pytest.mark.parametrize(
    "before, cause",
    [(shuffled, "shuffled_labels"), (kept_half, "stale_cache"), (now_and_then_zero, "empty_cache_slot")],
)
def test_watch_knows_scenes_again(before: Any, cause: str) -> None:
    assert [each.cause for each in fit(mlp(), before=before, told=True)][:1] == [cause]


@pytest.mark.parametrize("wrong", [True, False])
def test_watch_looks_at_schedulers(wrong: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 if wrong else 120)
    seen = watch(model, optimizer)
    for _ in range(110):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert [each.cause for each in seen.report()] == (["schedule_per_batch"] if wrong else [])


@pytest.mark.parametrize("wrong", [True, False])
def test_watch_tells_a_state_that_was_kept_by_reference(wrong: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for step in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        if step == 9:
            kept = model.state_dict() if wrong else copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    assert [each.cause for each in seen.report()] == (["ema_equals_raw"] if wrong else [])


def test_a_detached_state_and_a_copy_of_a_watched_model() -> None:
    """The model can be copied while hooks that note states are on it."""
    torch.manual_seed(0)
    model = By(lambda m, h: in_turn(m, h, True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    twin = copy.deepcopy(mlp())
    twin.load_state_dict(copy.deepcopy(twin).state_dict())
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    assert "detached_backbone" in [each.cause for each in seen.report()]
