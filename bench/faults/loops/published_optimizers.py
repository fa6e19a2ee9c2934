"""Errors of TrainCheck about what the optimizer holds, is given and does. The table of all is in `published`."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, images, mlp

PUBLISHED = Group("published_optimizers")


class Captured(torch.optim.Optimizer):
    """SGD whose step runs what an earlier step with the same guards has captured.

    Args: guarded: the guards ask which tensors have a gradient; without that, a step that was captured when there were
        none is found first by every later step.
    """

    def __init__(self, parameters: object, lr: float, guarded: bool) -> None:
        super().__init__(parameters, {"lr": lr})  # type: ignore[arg-type]
        self.guarded = guarded
        self.captured: list[tuple[object, list[Tensor]]] = []

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        moved = [each for each in group["params"] if each.grad is not None]
        guard = [id(each) for each in moved]
        found = next((each for key, each in self.captured if key is None or key == guard), None)
        if found is None:
            found = moved
            self.captured.insert(0, (guard if moved or self.guarded else None, moved))
        for each in found:
            each.sub_(each.grad, alpha=group["lr"])


@PUBLISHED.mistake(
    "a compiled step that once ran without gradients does nothing ever after: its guards do not ask for them",
    "step_without_effect stale_compiled_graph",
    source="https://github.com/pytorch/pytorch/issues/115607",
)
def stale_no_op_step(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, idle = mlp(8, draw.choice((24, 32)), 3), draw.randrange(30, 60)
    optimizer = Captured(model.parameters(), 0.1, guarded=not wrong)
    attach(model, optimizer)
    for step in range(250):
        x, y = task.batch(32)
        optimizer.zero_grad()
        if step != idle:
            F.mse_loss(model(x), y).backward()
        optimizer.step()


@PUBLISHED.mistake(
    "zero_grad is never called",
    "gradients_never_cleared",
    source="https://stackoverflow.com/questions/60335387",
)
def gradients_kept(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width = draw.choice((6, 8))
    model = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    for _ in range(120):
        x, y = images(16, 6)
        if not wrong:
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@PUBLISHED.mistake(
    "the optimizer was made for a model of which the one that trains is a converted copy",
    "stale_optimizer_parameters missing_from_optimizer",
    source="https://github.com/deepspeedai/DeepSpeed/issues/6770",
)
def optimizer_of_another_copy(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    first = mlp(8, draw.choice((24, 32)), 3)
    model = copy.deepcopy(first).bfloat16().float()
    decayed, plain = [], []
    for p in (first if wrong else model).parameters():
        (decayed if p.dim() > 1 else plain).append(p)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    random.Random(seed).shuffle(groups)
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    attach(model, optimizer)
    for _ in range(150):
        x, y = task.batch(32)
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
