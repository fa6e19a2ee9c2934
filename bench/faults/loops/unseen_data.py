"""Small problems for the loops of the examination, drawn from torch's global generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def surface(count: int = 512, features: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (count, features) and targets (count, 1), which are smooth and have mean 0 and variance 1."""
    inputs = torch.randn(count, features)
    bent, straight = torch.randn(features, 1) / features**0.5, torch.randn(features, 1) / features**0.5
    targets = torch.sin(2 * inputs @ bent) + inputs @ straight
    return inputs, (targets - targets.mean()) / targets.std()


def blobs(count: int = 512, features: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs (count, features) around one centre a class, and labels (count,)."""
    labels = torch.randint(classes, (count,))
    return 1.5 * torch.randn(classes, features)[labels] + torch.randn(count, features), labels


def batches(steps: int, size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`steps` batches, in a new order in every epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(tensors[0]))
        yield tuple(tensor[order[:size]] for tensor in tensors)
        order = order[size:]


def layers(*widths: int, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with an activation between each two."""
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        parts += [nn.Linear(before, after), between()]
    return nn.Sequential(*parts[:-1])


def recent(losses: Sequence[float], count: int = 10) -> float:
    """Mean of the last losses, which is what a log shows at the end."""
    return sum(losses[-count:]) / len(losses[-count:])
