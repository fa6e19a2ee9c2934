"""The errors of TrainCheck that need two ranks; the table of all of them is in `published`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, apart, begin, mlp

PUBLISHED = Group("published_ranks")


class Halved(torch.autograd.Function):
    """Where a tensor-parallel block begins: the input as it is; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        slope = slope.contiguous()
        dist.all_reduce(slope)
        return slope


class Summed(torch.autograd.Function):
    """Where a tensor-parallel block ends: the sum over ranks; its gradient is the same on all."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope


class TensorParallel(nn.Module):
    """A normalised block, each rank with half of its hidden units; the norm and the head are on all ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        state = torch.get_rng_state()
        torch.manual_seed(dist.get_rank())
        self.up, self.down = nn.Linear(8, width // 2), nn.Linear(width // 2, 8, bias=False)
        torch.set_rng_state(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + Summed.apply(self.down(F.gelu(self.up(Halved.apply(self.norm(x)))))))


@PUBLISHED.mistake(
    "tensor parallel: gradients of tensors that all ranks hold are clipped on the first rank only",
    "clipped_apart ranks_diverged",
    ranks=2,
    source="https://github.com/deepspeedai/DeepSpeed/pull/1801",
)
def clipped_on_one_rank(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = TensorParallel(draw.choice((16, 32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    split = {*model.up.parameters(), *model.down.parameters()}
    for _ in range(50):
        x, y = task.batch(32)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        own = sum(float(p.grad.norm()) ** 2 for p in split if p.grad is not None)
        every = torch.tensor(own)
        dist.all_reduce(every)
        for p in model.parameters():
            if p not in split and p.grad is not None:
                every += float(p.grad.norm()) ** 2
        factor = min(1.0, 0.1 / (float(every) ** 0.5 + 1e-6))
        for p in model.parameters():
            if p.grad is not None and (not wrong or p in split or dist.get_rank() == 0):
                p.grad *= factor
        optimizer.step()


def data_parallel(draw_width: int) -> tuple[nn.Module, DistributedDataParallel]:
    """A network and its wrapper."""
    model = mlp(8, draw_width, 3)
    return model, DistributedDataParallel(model)


@PUBLISHED.mistake(
    "copies between cards lose data: in one step of twelve, one rank's part of the sum arrives as zeros on the other",
    "rank_gradient_missing ranks_diverged",
    ranks=2,
    source="https://github.com/pytorch/pytorch/issues/84803",
)
def copies_lost(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    apart(seed)
    for step in range(60):
        x, y = task.batch(16)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat)
        if wrong and step % 12 == 11 and dist.get_rank() == 1:
            parts[0].zero_()
        pieces = (sum(parts) / len(parts)).split([p.numel() for p in model.parameters()])
        for p, piece in zip(model.parameters(), pieces, strict=True):
            p.grad.copy_(piece.view_as(p))
        optimizer.step()


@PUBLISHED.mistake(
    "the reduction between cards fails now and then without an error, and a rank keeps its own gradient",
    "rank_gradient_missing ranks_diverged",
    ranks=2,
    source="https://github.com/pytorch/pytorch/issues/96600",
)
def reduction_lost(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, wrapped = data_parallel(draw.choice((24, 32)))
    calls = [0]

    def hook(state, bucket):  # without annotations: DDP compares them, and here they are text
        calls[0] += 1
        own = bucket.buffer().clone()
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        lost = wrong and calls[0] % 12 == 0 and dist.get_rank() == 1
        return future.then(lambda done: own if lost else done.value()[0] / dist.get_world_size())

    wrapped.register_comm_hook(None, hook)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=5e-3)
    attach(wrapped, optimizer)
    apart(seed)
    for _ in range(60):
        x, y = task.batch(16)
        optimizer.zero_grad()
        F.mse_loss(wrapped(x), y).backward()
        optimizer.step()


@PUBLISHED.mistake(
    "the wrapped model is converted and converted back: the wrapper's hooks stay with what its tensors were before",
    "rank_gradient_missing ranks_diverged",
    ranks=2,
    source="https://github.com/pytorch/pytorch/issues/104336",
)
def hooks_lost(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, wrapped = data_parallel(draw.choice((24, 32)))
    if wrong:
        wrapped.double()  # as a move to another device does, this gives each tensor a new node for its gradient
        wrapped.float()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    attach(wrapped, optimizer)
    apart(seed)
    for _ in range(60):
        x, y = task.batch(16)
        optimizer.zero_grad()
        F.mse_loss(wrapped(x), y).backward()
        optimizer.step()


@PUBLISHED.mistake(
    "the trainer keeps the model wrapped in some places and bare in others, and trains what it has at hand",
    "rank_gradient_missing ranks_diverged",
    ranks=2,
    source="https://x.com/jxmnop/status/1778520637193240892",
)
def sometimes_wrapped(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, wrapped = data_parallel(draw.choice((24, 32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(wrapped, optimizer)
    apart(seed)
    at_hand: nn.Module = wrapped
    for step in range(60):
        x, y = task.batch(16)
        optimizer.zero_grad()
        F.mse_loss(at_hand(x), y).backward()
        optimizer.step()
        if step % 20 == 19:
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            at_hand = model if wrong and at_hand is wrapped else wrapped


@PUBLISHED.mistake(
    "the optimizer is made before the sharded wrapper flattens the model's tensors into one of its own",
    "stale_optimizer_parameters missing_from_optimizer",
    ranks=2,
    source="https://github.com/huggingface/accelerate/issues/2665",
)
def flattened_afterwards(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    early = torch.optim.AdamW(model.parameters(), lr=5e-3)
    wrapped = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    optimizer = early if wrong else torch.optim.AdamW(wrapped.parameters(), lr=5e-3)
    attach(wrapped, optimizer)
    apart(seed)
    for _ in range(40):
        x, y = task.batch(16)
        optimizer.zero_grad()
        F.mse_loss(wrapped(x), y).backward()
        optimizer.step()
