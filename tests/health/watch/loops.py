"""The plain PyTorch network and loop that the tests of the watch share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


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
