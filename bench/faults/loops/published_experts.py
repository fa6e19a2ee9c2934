"""Errors of TrainCheck with experts and stages on two ranks, most of them hangs. The table of all is in `published`."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.published_ranks import Summed
from bench.faults.loops.small import Task, apart, begin, mlp

PUBLISHED = Group("published_experts")
HANG_S = 8.0  # after which a loop that hangs gives control back
STALL_S = 3.0  # asked of the watch: its usual limit is minutes, as real hangs last


class Hang(Exception):
    """A rank has waited for another for too long."""


def impatient() -> dist.ProcessGroup:
    """All ranks, in a group whose collectives give up after HANG_S."""
    return dist.new_group(timeout=timedelta(seconds=HANG_S))


def wait(work: dist.Work) -> None:
    """Waits for a collective of an impatient group, which other ranks may never call.

    Raises: Hang when the group gives up.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise Hang from error


def reduce_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """The mean of all gradients over ranks."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([each.flatten() for each in grads])
    wait(dist.all_reduce(flat, group=group, async_op=True))
    for each, piece in zip(grads, flat.split([each.numel() for each in grads]), strict=True):
        each.copy_(piece.view_as(each) / dist.get_world_size())


@PUBLISHED.mistake(
    "expert parallel: a rank that has no tokens for an expert does not call the exchange that the other waits for",
    "no_progress",
    ranks=2,
    source="https://github.com/deepspeedai/DeepSpeed/issues/5794",
)
def expert_rank_left_out(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, late = mlp(8, draw.choice((24, 32)), 3), draw.randrange(25, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer, stall_s=STALL_S)
    apart(seed)
    group = impatient()
    try:
        for step in range(60):
            x, y = task.batch(16)
            chosen = 0 if step == late and dist.get_rank() == 1 else 8
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            if chosen or not wrong:
                counts = torch.full((2,), chosen)
                wait(dist.all_to_all_single(torch.empty_like(counts), counts, group=group, async_op=True))
            reduce_gradients(model, group)
            optimizer.step()
    except Hang:
        if not wrong:
            raise


@PUBLISHED.mistake(
    "expert parallel: each rank takes the capacity of its experts from its own tokens, so one exchanges more often",
    "no_progress",
    ranks=2,
    source="https://github.com/deepspeedai/DeepSpeed/issues/6809",
)
def capacity_differs(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, late = mlp(8, draw.choice((24, 32)), 3), draw.randrange(25, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer, stall_s=STALL_S)
    apart(seed)
    group = impatient()
    try:
        for step in range(60):
            x, y = task.batch(16)
            capacity = torch.tensor(4 if step == late and dist.get_rank() == 1 else 3)
            if not wrong:
                dist.all_reduce(capacity, dist.ReduceOp.MAX, group=group)
            for row in range(int(capacity)):
                wait(dist.all_to_all_single(torch.empty(2), x[row, :2].contiguous(), group=group, async_op=True))
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            reduce_gradients(model, group)
            optimizer.step()
    except Hang:
        if not wrong:
            raise


class Stage(nn.Module):
    """One stage of a pipeline; the first has experts."""

    def __init__(self, width: int, experts: bool) -> None:
        super().__init__()
        self.body = mlp(8 if experts else width, width, width if experts else 3, depth=1)
        self.experts = nn.ModuleList([mlp(width, width, width, depth=1)]) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x if self.experts is None else x + self.experts[0](x)


@PUBLISHED.mistake(
    "pipeline: only the stage with experts calls the sum of their norms over all ranks, in the optimizer's step",
    "no_progress",
    ranks=2,
    source="https://github.com/deepspeedai/DeepSpeed/issues/6714",
)
def norm_of_one_stage(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    width, first = draw.choice((16, 24)), dist.get_rank() == 0
    model = Stage(width, experts=first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer, stall_s=STALL_S)
    begun = draw.randrange(5, 10)  # the experts' norm is asked for from this step on, as clipping begins
    group = impatient()
    try:
        for step in range(40):
            x, y = task.batch(16)
            optimizer.zero_grad()
            between = model(x) if first else torch.empty(16, width)
            if first:
                wait(dist.isend(between.detach(), 1, group, tag=2 * step))
                slope = torch.empty_like(between)
                wait(dist.irecv(slope, 1, group, tag=2 * step + 1))
                between.backward(slope)
            else:
                wait(dist.irecv(between, 0, group, tag=2 * step))
                between.requires_grad_()
                F.mse_loss(model(between), y).backward()
                wait(dist.isend(between.grad, 0, group, tag=2 * step + 1))
            if step >= begun and (first or not wrong):
                norms = [float(p.grad.norm()) ** 2 for p in (model.experts or nn.ModuleList()).parameters()]
                wait(dist.all_reduce(torch.tensor(float(sum(norms))), group=group, async_op=True))
            optimizer.step()
    except Hang:
        if not wrong:
            raise


class Expert(nn.Module):
    """One expert with the number that its user gives it."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.id, self.body = number, mlp(8, width, 8, depth=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Experts(nn.Module):
    """A layer whose experts are computed by the ranks that their numbers stand for, and summed over ranks."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(8, count), nn.Linear(8, 3)
        self.experts = nn.ModuleList([Expert(number, width) for number in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(1)
        mixed = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            if expert.id * dist.get_world_size() // len(self.experts) == dist.get_rank():
                mixed = mixed + weights[:, place, None] * expert(x)
        return self.head(x + Summed.apply(mixed))


@PUBLISHED.mistake(
    "the engine numbers all modules in an attribute that already says which rank an expert belongs to",
    "unused_head vanishing_gradient rank_gradient_missing",
    ranks=2,
    source="https://github.com/deepspeedai/DeepSpeed/issues/6772",
)
def expert_ids_overwritten(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = Experts(draw.choice((8, 16)), 4)
    if wrong:
        for number, module in enumerate(model.modules()):
            module.id = number  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    for _ in range(50):
        x, y = task.batch(16)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        for p in (*model.router.parameters(), *model.experts.parameters()):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        optimizer.step()
