"""The plain PyTorch networks and loops that the tests of the watch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding

Loop = Callable[[bool], tuple[list[Finding], str]]  # with a mistake or without; what is found, and the mistake's cause


def mlp(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        parts += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 12,
    before: Callable[[], Any] = lambda: None,
    clear: bool = True,
) -> None:
    """before: called between backward and the optimizer's step."""
    for _ in range(steps):
        loss = (model(torch.randn(32, 8)) - 1.0).square().mean()
        if clear:
            optimizer.zero_grad()
        loss.backward()
        before()
        optimizer.step()
