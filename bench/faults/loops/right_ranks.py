"""Right loops in two ranks: DDP, accumulation without communication, sharded weights, sharded optimizer state."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, apart, begin, falls, mlp

RIGHT = Group("right_ranks")


@RIGHT.right("DDP: each rank has its own samples; the watch is given the wrapped model", ranks=2)
def data_parallel(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    inner = mlp(8, draw.choice((24, 32)), 3)
    model = DistributedDataParallel(inner, bucket_cap_mb=draw.choice((1, 25)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((1e-2, 2e-2)))
    attach(inner if seed % 2 else model, optimizer)
    apart(seed)
    losses = []
    for _ in range(50):
        x, y = task.batch(16)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("DDP with accumulation: all micro-batches but the last are under no_sync", ranks=2)
def without_sync(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, parts = Task(8, 3), draw.choice((2, 4))
    model = DistributedDataParallel(mlp(8, draw.choice((24, 32)), 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((1e-2, 2e-2)))
    attach(model, optimizer)
    apart(seed)
    losses = []
    for _ in range(50):
        for part in range(parts):
            x, y = task.batch(8)
            with contextlib.nullcontext() if part == parts - 1 else model.no_sync():
                loss = F.mse_loss(model(x), y) / parts
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    falls(losses)


class Branches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = mlp(8, width, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 3) for _ in range(3)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](F.relu(self.body(x)))


@RIGHT.right("DDP with find_unused_parameters: the ranks use different heads in a step", ranks=2)
def unused_parameters(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    tasks = [Task(8, 3) for _ in range(3)]
    model = DistributedDataParallel(Branches(draw.choice((24, 32))), find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((1e-2, 2e-2)))
    attach(model, optimizer)
    apart(seed)
    losses = []
    for step in range(50):
        head = (step + dist.get_rank()) % 3
        x, y = tasks[head].batch(16)
        loss = F.mse_loss(model(x, head), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("gradients averaged by hand: no wrapper, one all_reduce of all gradients before the step", ranks=2)
def averaged_by_hand(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.1, 0.2)), momentum=0.9)
    attach(model, optimizer)
    apart(seed)
    losses = []
    for _ in range(50):
        x, y = task.batch(16)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(flat)
        pieces = (flat / dist.get_world_size()).split([p.numel() for p in model.parameters()])
        for p, piece in zip(model.parameters(), pieces, strict=True):
            p.grad.copy_(piece.view_as(p))
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("local SGD: ranks train apart and average their weights every few steps", ranks=2)
def local_steps(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, often = Task(8, 3), draw.choice((4, 8))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.1, 0.2)))
    attach(model, optimizer)
    apart(seed)
    losses = []
    for step in range(48):
        x, y = task.batch(16)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % often == often - 1:
            for p in model.parameters():
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()
    falls(losses)


@RIGHT.right("FSDP2: fully_shard of layers and model, so that each rank holds half of every tensor", ranks=2)
def fully_sharded(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((1e-2, 2e-2)))
    attach(model, optimizer)
    apart(seed)
    losses = []
    for _ in range(40):
        x, y = task.batch(16)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("ZeroRedundancyOptimizer under DDP: a rank steps its part of the tensors and receives the others", ranks=2)
def sharded_optimizer(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = DistributedDataParallel(mlp(8, draw.choice((24, 32)), 3))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=draw.choice((1e-2, 2e-2)))
    attach(model, optimizer)
    apart(seed)
    losses = []
    for _ in range(50):
        x, y = task.batch(16)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right(
    "SyncBatchNorm's place: BatchNorm under DDP with each rank's own statistics, and evaluation on rank 0", ranks=2
)
def evaluation_on_one_rank(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 3), draw.choice((24, 32))
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.05, 0.1)), momentum=0.9)
    attach(model, optimizer)
    apart(seed)
    losses = []
    for step in range(50):
        model.train()
        x, y = task.batch(16)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 30 == 29 and dist.get_rank() == 0:
            model.eval()
            with torch.no_grad():
                model.module(x)
    falls(losses)
