"""What `watch` says of told losses, of data that repeat, and of copies beside the model; and of loops near to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_fast.health import watch


def causes(lossf, outputs: int, targets, steps: int = 24) -> list[str]:
    """Of a loop of fresh batches whose losses are told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer)
    for _ in range(steps):
        x = torch.randn(16, 6)
        y = targets(x)
        made = model(x)
        loss = seen.loss(lossf(made, y), made, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [each.cause for each in seen.report()]


def first_number(x: Tensor) -> Tensor:
    return x[:, :1] + x[:, 1:2]


def labels(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def signs(x: Tensor) -> Tensor:
    return x[:, :1].sign()


@pytest.mark.parametrize(
    ("lossf", "outputs", "targets", "cause"),
    [
        (lambda o, y: -((o - y) ** 2).mean(), 1, first_number, "loss_sign"),
        (lambda o, y: ((o.detach() - y) ** 2).mean() + 1e-3 * o.abs().mean(), 1, first_number, "dead_loss_term"),
        (lambda o, y: F.binary_cross_entropy_with_logits(o, y), 1, signs, "target_scale_differs"),
        (lambda o, y: (1 - o * y).relu().mean(), 1, lambda x: (x[:, :1] > 0).float(), "scenes_left_out"),
        (lambda o, y: F.nll_loss(o.softmax(1), y), 3, labels, "wrong_units"),
        (
            lambda o, y: F.kl_div(o.softmax(1), y, reduction="batchmean"),
            3,
            lambda x: x[:, :3].softmax(1),
            "target_scale_differs",
        ),
    ],
)
def test_a_told_loss_that_asks_for_something_else(lossf, outputs: int, targets, cause: str) -> None:
    assert causes(lossf, outputs, targets)[0] == cause


@pytest.mark.parametrize(
    ("lossf", "outputs", "targets"),
    [
        (lambda o, y: torch.maximum(0.95 * (y - o), 0.05 * (o - y)).mean(), 1, first_number),
        (lambda o, y: F.gaussian_nll_loss(o[:, :1], y, o[:, 1:].exp()), 2, first_number),
        (lambda o, y: (1 - o * y).relu().mean(), 1, signs),
        (lambda o, y: F.binary_cross_entropy_with_logits(o, y), 1, lambda x: (x[:, :1] > 0).float()),
        (lambda o, y: (1 - (o.softmax(1) * y).sum(1)).mean(), 3, lambda x: x[:, :3].softmax(1)),
        (lambda o, y: (o.logsumexp(1) + F.nll_loss(o, y, reduction="none")).mean(), 3, labels),
    ],
)
def test_unusual_told_losses_that_are_right(lossf, outputs: int, targets) -> None:
    assert causes(lossf, outputs, targets) == []


@pytest.mark.parametrize(("follow", "expected"), [(0.0, ["ema_frozen"]), (1.0, ["ema_equals_raw"]), (0.1, [])])
def test_a_copy_beside_the_model(follow: float, expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    target = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(130):
        x = torch.randn(8, 4)
        with torch.no_grad():
            y = x[:, :1] + 0.5 * target(x.roll(1, 1))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), model.parameters()):
                slow.lerp_(fast, follow)
    assert [each.cause for each in seen.report()] == expected


@pytest.mark.parametrize("again", [True, False])
def test_a_seed_that_is_set_in_each_epoch(again: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(128, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(6):
        if again:
            torch.manual_seed(1)
        for chosen in torch.randperm(128).split(16):
            x = inputs[chosen]
            loss = F.mse_loss(model(x), x[:, :1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [each.cause for each in seen.report()] == (["repeated_batch"] if again else [])
