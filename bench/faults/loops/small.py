"""Small tasks for loops that must run in a second: a fixed random teacher, and fresh batches of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach


def begin(seed: int) -> random.Random:
    """Seeds torch, and gives the generator that a loop draws its sizes and rates from."""
    torch.manual_seed(1000 * seed + 17)
    return random.Random(7919 * seed + 3)


def apart(seed: int) -> None:
    """From here on each rank draws other samples; what was made before is the same on all."""
    torch.manual_seed(1000 * seed + 31 + dist.get_rank())


class Task:
    """Inputs of unit variance and what a fixed random teacher answers: numbers, or class labels.

    Args: inputs, outputs: numbers a sample; classes: labels instead of numbers;
        noise: standard deviation on the answer.
    """

    def __init__(self, inputs: int, outputs: int, classes: bool = False, noise: float = 0.05) -> None:
        self.inputs, self.outputs, self.classes, self.noise = inputs, outputs, classes, noise
        self._first = torch.randn(inputs, 2 * inputs) / inputs**0.5
        self._second = torch.randn(2 * inputs, outputs) / inputs**0.5

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """`size` fresh samples: (size, inputs), and (size, outputs) or labels (size,)."""
        x = torch.randn(size, self.inputs)
        return x, self.answer(x)

    def answer(self, x: Tensor) -> Tensor:
        """What the teacher says of (size, inputs)."""
        values = torch.tanh(x @ self._first) @ self._second
        values = values + self.noise * torch.randn_like(values)
        return values.argmax(-1) if self.classes else values


def images(size: int, classes: int, side: int = 8) -> tuple[Tensor, Tensor]:
    """(size, 1, side, side) noise with a bright bar in the row that is the label (size,); classes <= side."""
    labels = torch.randint(classes, (size,))
    pictures = 0.3 * torch.randn(size, 1, side, side)
    pictures[torch.arange(size), 0, labels] += 1.0
    return pictures, labels


def mlp(
    inputs: int, hidden: int, outputs: int, depth: int = 2, unit: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """`depth` hidden layers and a linear output."""
    sizes = [inputs] + [hidden] * depth
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), unit()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def falls(losses: Sequence[float | Tensor], to: float = 0.9) -> None:
    """Raises RuntimeError unless the last fifth of the losses is below `to` times the first tenth."""
    values = [float(each) for each in losses]
    first = values[: max(1, len(values) // 10)]
    last = values[-max(1, len(values) // 5) :]
    before, after = sum(first) / len(first), sum(last) / len(last)
    if not after < before - (1 - to) * abs(before):
        raise RuntimeError(f"The loop does not learn: its loss was {before:.4g} and is {after:.4g}.")


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    steps: int,
    after: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> list[Tensor]:
    """A plain loop of mean squared errors; `after(step, loss)` follows each optimizer step."""
    losses = []
    for step in range(steps):
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        after(step, losses[-1])
    return losses


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, keep: float) -> None:
    """Moves each parameter of `slow` towards `fast`."""
    for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
        old.lerp_(new, 1 - keep)


def train(
    attach: Attach,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
) -> list[Tensor]:
    """A plain loop of cross-entropies over `batches()`, watched; the losses."""
    seen = attach(model, optimizer)
    losses = []
    for _ in range(steps):
        x, y = batches()
        optimizer.zero_grad()
        outputs = model(x)
        loss = seen.loss(F.cross_entropy(outputs, y), outputs, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses
