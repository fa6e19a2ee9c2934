"""Loops of two ranks: right ones of many kinds, and mistakes. Each is called on all ranks with the rank's number, and
returns what is watched; the caller asks for the report."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as Wrapped

from ris_fast.health import watch
from ris_fast.health.watch.watcher import Watcher

ONE = 1  # the rank that has the mistake
STEPS = 12


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def loss_of(model: nn.Module, draws: torch.Generator) -> Tensor:
    inputs = torch.randn(32, 8, generator=draws)
    return (model(inputs) - inputs[:, :4]).square().mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    steps: int = STEPS,
    before: Callable[[int], Any] = lambda step: None,
    after: Callable[[int], Any] = lambda step: None,
    weight: Callable[[int], float] = lambda step: 1.0,
    micro_batches: int = 1,
    held_back: bool = False,
) -> None:
    """before, after: called around the optimizer's step."""
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        for micro_batch in range(micro_batches):
            hold = held_back or micro_batch < micro_batches - 1
            with model.no_sync() if hold else nullcontext():
                (weight(step) * loss_of(model, draws)).backward()
        before(step)
        optimizer.step()
        after(step)


def all_reduce(model: nn.Module, mean: bool = True) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        if mean:
            parameter.grad /= dist.get_world_size()


def average(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            dist.all_reduce(parameter)
            parameter /= dist.get_world_size()


def wrapped(rank: int, seed: int | None = None, given: bool = True, **habits: Any) -> Watcher:
    """DistributedDataParallel; `given`: what is watched is the wrapper, and not the module within."""
    options = {name: habits.pop(name) for name in ("gradient_as_bucket_view", "broadcast_buffers") if name in habits}
    model = Wrapped(network(seed=rank), **options)
    optimizer = sgd(model)
    seen = watch(model if given else model.module, optimizer, every=4)
    habits = {name: habit(model, optimizer) if name in ("before", "after") else habit for name, habit in habits.items()}
    train(model, optimizer, 10 + rank if seed is None else seed, **habits)
    seen.keep = model
    return seen


def by_hand(rank: int, start: int = 0, reduce: Callable[..., Any] = all_reduce, **habits: Any) -> Watcher:
    model = network(start)
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank, before=lambda step: reduce(model), **habits)
    return seen


# ---- right --------------------------------------------------------------------------------------------------------


def right_wrapper(rank: int) -> Watcher:
    return wrapped(rank)


def right_module_within(rank: int) -> Watcher:
    return wrapped(rank, given=False, gradient_as_bucket_view=True)


def right_accumulation(rank: int) -> Watcher:
    return wrapped(rank, micro_batches=3)


def right_clip(rank: int) -> Watcher:
    return wrapped(rank, before=lambda model, _: lambda step: nn.utils.clip_grad_norm_(model.parameters(), 0.1))


def right_clip_by_tensor(rank: int) -> Watcher:
    def each(model: nn.Module, _: Any) -> Callable[[int], Any]:
        return lambda step: [nn.utils.clip_grad_norm_([p], 0.02) for p in model.parameters()]

    return wrapped(rank, before=each)


def right_by_hand(rank: int) -> Watcher:
    return by_hand(rank)


def right_sum_by_hand(rank: int) -> Watcher:
    return by_hand(rank, reduce=lambda model: all_reduce(model, mean=False))


def right_reduced_in_hooks(rank: int) -> Watcher:
    model = network()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def right_local_sgd(rank: int) -> Watcher:
    model = network()
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank, after=lambda step: average(model) if step % 4 == 3 else None, steps=14)
    return seen


def right_local_sgd_within_wrapper(rank: int) -> Watcher:
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(
        model, optimizer, 10 + rank, after=lambda step: average(model) if step % 4 == 3 else None, held_back=True,
        steps=14,
    )  # fmt: skip
    return seen


def right_communication_hook(rank: int) -> Watcher:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = Wrapped(network(seed=rank))
    model.register_comm_hook(None, fp16_compress_hook)
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def right_independent_runs(rank: int) -> Watcher:
    return by_hand(rank, start=rank, reduce=lambda model: None)


def right_running_statistics(rank: int) -> Watcher:
    torch.manual_seed(rank)
    model = Wrapped(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)), broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def right_shards_of_moments(rank: int) -> Watcher:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Wrapped(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def right_shards_of_weights(rank: int) -> Watcher:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def right_fixed_grid(rank: int) -> Watcher:
    """A field that is fitted at the same places on all ranks, to other numbers."""
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    grid = torch.linspace(-1, 1, 64 * 8).view(64, 8)
    draws = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(grid) - torch.randn(64, 4, generator=draws)).square().mean().backward()
        optimizer.step()
    return seen


def right_head_of_its_own(rank: int) -> Watcher:
    """A layer of each rank that the wrapper is told to leave alone."""
    inner = nn.ModuleDict({"body": network(), "head": nn.Linear(4, 4)})
    inner.forward = lambda x: inner["head"](inner["body"](x))
    Wrapped._set_params_and_buffers_to_ignore_for_model(inner, ["head.weight", "head.bias"])
    model = Wrapped(inner)
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def right_empty_batches(rank: int) -> Watcher:
    """Each rank has a batch without a loss now and then."""
    return wrapped(rank, weight=lambda step: 0.0 if step % 4 == 2 * rank else 1.0)


def right_uneven_data(rank: int) -> Watcher:
    """One rank has batches left when the other has none."""
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    with model.join():
        train(model, optimizer, 10 + rank, steps=STEPS + rank)
    seen.wait_s = 0.5
    return seen


def right_pair_of_networks(rank: int) -> Watcher:
    """A generator and a critic in turn, each wrapped, with an optimizer each."""
    pair = nn.ModuleDict({"makes": Wrapped(network(1)), "judges": Wrapped(network(2), broadcast_buffers=False)})
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-3) for each in pair.values()]
    seen = watch(pair, optimizers, every=4)
    draws = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        noise = torch.randn(16, 8, generator=draws)
        fake, true = pair["makes"](noise), torch.randn(16, 4, generator=draws)
        optimizers[1].zero_grad()
        judged = pair["judges"](torch.cat([torch.cat([fake.detach(), true]), torch.zeros(32, 4)], 1))
        (judged[:16].mean() - judged[16:].mean() + judged.square().mean()).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-pair["judges"](torch.cat([fake, torch.zeros(16, 4)], 1)).mean()).backward()
        optimizers[0].step()
    return seen


def right_half_precision_and_dropout(rank: int) -> Watcher:
    torch.manual_seed(rank)
    model = Wrapped(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 4)).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(32, 8).bfloat16()).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
    return seen


def right_scaler(rank: int) -> Watcher:
    """A loss scale, taken out before the step."""
    scaled = lambda model, _: lambda step: [p.grad.div_(1024.0) for p in model.parameters()]  # noqa: E731
    return wrapped(rank, weight=lambda step: 1024.0, before=scaled)


def right_evaluation_between(rank: int) -> Watcher:
    """Rank 0 alone evaluates a copy, and reports alone on the way."""
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    for epoch in range(3):
        train(model, optimizer, 10 * epoch + rank, steps=5)
        if rank == 0:
            copy.deepcopy(model.module).eval()(torch.randn(4, 8))
            seen.alone_says = [(each.cause, each.certain) for each in seen.report(wait_s=0.0)]
    return seen


# ---- wrong --------------------------------------------------------------------------------------------------------


def wrong_bare_module(rank: int) -> Watcher:
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model.module, optimizer, 10 + rank)
    return seen


def wrong_bare_module_watched(rank: int) -> Watcher:
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model.module, optimizer, every=4)
    train(model.module, optimizer, 10 + rank)
    seen.keep = model
    return seen


def wrong_bare_module_clipped(rank: int) -> Watcher:
    model = Wrapped(network())
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(
        model.module, optimizer, 10 + rank, before=lambda _: nn.utils.clip_grad_norm_(model.module.parameters(), 0.05)
    )
    return seen


def wrong_no_wrapper(rank: int) -> Watcher:
    return by_hand(rank, reduce=lambda model: None)


def wrong_no_sync_left_on(rank: int) -> Watcher:
    return wrapped(rank, held_back=True)


def wrong_layer_added_later(rank: int) -> Watcher:
    inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    model = Wrapped(inner)
    torch.manual_seed(5)
    inner.append(nn.Linear(16, 4))
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def wrong_part_by_hand(rank: int) -> Watcher:
    return by_hand(rank, reduce=lambda model: all_reduce(model[0]))


def wrong_zeros_in_the_sum(rank: int) -> Watcher:
    def reduce(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad.mul_(float(rank != ONE))
        all_reduce(model)

    return by_hand(rank, reduce=reduce)


def wrong_clip_on_one(rank: int) -> Watcher:
    def clip(model: nn.Module, _: Any) -> Callable[[int], Any]:
        return lambda step: rank == ONE and nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    return wrapped(rank, before=clip)


def wrong_rate_on_one(rank: int) -> Watcher:
    model = Wrapped(network())
    optimizer = sgd(model, 0.05 if rank != ONE else 0.1)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


def wrong_same_batches(rank: int) -> Watcher:
    return wrapped(rank, seed=7)


def wrong_same_batches_with_dropout(rank: int) -> Watcher:
    model = Wrapped(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)))
    torch.manual_seed(rank)
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 7)
    return seen


def wrong_zeros_in_one_step(rank: int) -> Watcher:
    return wrapped(rank, weight=lambda step: 0.0 if (rank, step) == (ONE, 9) else 1.0, steps=20)


def wrong_zeros_always(rank: int) -> Watcher:
    return wrapped(rank, weight=lambda step: float(rank != ONE))


def wrong_start(rank: int) -> Watcher:
    """Gradients are summed, and ranks begin with other weights."""
    return by_hand(rank, start=rank)


def wrong_bit(rank: int) -> Watcher:
    def flip(model: nn.Module, _: Any) -> Callable[[int], Any]:
        def call(step: int) -> None:
            if (rank, step) == (ONE, 9):
                weight = next(model.parameters()).data.view(-1)[7:8]
                weight.copy_((weight.view(torch.int32) ^ 1).view(torch.float32))

        return call

    return wrapped(rank, after=flip)


def wrong_frozen_on_one(rank: int) -> Watcher:
    def freeze(model: nn.Module, _: Any) -> Callable[[int], Any]:
        def call(step: int) -> None:
            if (rank, step) == (ONE, 5):
                model.module[2].weight.grad = None

        return call

    return wrapped(rank, before=freeze)


def layers_in_parts(rank: int) -> nn.ModuleDict:
    """A layer whose columns are shared out, beside layers that all ranks have whole."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"scale": nn.Linear(8, 8), "out": nn.Linear(4, 4)})
    torch.manual_seed(rank)
    model["part"] = nn.Linear(8, 4, bias=False)
    return model


def train_in_parts(rank: int, before: Callable[[nn.Module, int], Any], lr: float = 0.05) -> Watcher:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            dist.all_reduce(x := x.clone())
            return x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            dist.all_reduce(grad := grad.clone())
            return grad

    model, draws = layers_in_parts(rank), torch.Generator().manual_seed(3)
    optimizer = sgd(model, lr)
    seen = watch(model, optimizer, every=4)
    for step in range(STEPS):
        inputs = torch.randn(32, 8, generator=draws)
        optimizer.zero_grad()
        hidden = Sum.apply(model["part"](Copy.apply(model["scale"](inputs)).tanh()))
        (model["out"](hidden) - inputs[:, :4]).square().mean().backward()
        before(model, step)
        optimizer.step()
    return seen


def right_layer_in_parts(rank: int) -> Watcher:
    return train_in_parts(rank, lambda model, step: None)


def wrong_clip_of_whole_layers_on_one(rank: int) -> Watcher:
    """Layers that all ranks have whole are clipped on one of them: their copies drift apart."""

    def clip(model: nn.Module, step: int) -> None:
        if rank != ONE:
            nn.utils.clip_grad_norm_([*model["scale"].parameters(), *model["out"].parameters()], 0.05)

    return train_in_parts(rank, clip)


def right_stages(rank: int) -> Watcher:
    """Ranks have layers of their own, of the same names in part."""
    torch.manual_seed(rank)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2 + rank)))
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    return seen


def right_members_of_an_ensemble(rank: int) -> Watcher:
    """Independent critics; the gradient of the last offset is the same number in each step."""
    model = network(rank)
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(32, 8)).mean().backward()
        optimizer.step()
    return seen


def wrong_tied_weights(rank: int) -> Watcher:
    """First and last stage have one table of weights, whose gradients are not summed."""
    torch.manual_seed(rank)
    body = nn.Linear(8, 8 + 8 * rank)
    torch.manual_seed(9)
    model = nn.ModuleDict({"table": nn.Linear(8, 8), "body": body})
    optimizer = sgd(model)
    seen = watch(model, optimizer, every=4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(rank))
        model["body"](model["table"](x)).square().mean().backward()
        optimizer.step()
    return seen


def wrong_lost_shard(rank: int) -> Watcher:
    """An optimizer whose moments are shared out, and one rank's weights are not sent to the others."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Wrapped(network())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    optimizer._sync_params = lambda: None
    seen = watch(model, optimizer, every=4)
    train(model, optimizer, 10 + rank)
    return seen


WRONG = {
    wrong_bare_module: "rank_gradient_missing",
    wrong_bare_module_watched: "rank_gradient_missing",
    wrong_bare_module_clipped: "rank_gradient_missing",
    wrong_no_wrapper: "rank_gradient_missing",
    wrong_no_sync_left_on: "rank_gradient_missing",
    wrong_layer_added_later: "rank_gradient_missing",
    wrong_part_by_hand: "rank_gradient_missing",
    wrong_tied_weights: "rank_gradient_missing",
    wrong_zeros_in_the_sum: "rank_gradient_missing",
    wrong_zeros_in_one_step: "rank_gradient_missing",
    wrong_zeros_always: "rank_gradient_missing",
    wrong_clip_on_one: "clipped_apart",
    wrong_clip_of_whole_layers_on_one: "clipped_apart",
    wrong_rate_on_one: "ranks_diverged",
    wrong_start: "ranks_diverged",
    wrong_bit: "ranks_diverged",
    wrong_frozen_on_one: "ranks_diverged",
    wrong_lost_shard: "ranks_diverged",
    wrong_same_batches: "rank_sees_other_data",
    wrong_same_batches_with_dropout: "rank_sees_other_data",
}
RIGHT = [value for name, value in globals().items() if name.startswith("right_")]


def reports(names: list[str], method: str | None = None) -> dict[str, list[tuple[str, bool, str]]]:
    """On one rank: each loop's findings."""
    torch.set_num_threads(1)
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("gloo", init_method=method, **ranks)
    found = {}
    for name in names:
        seen = globals()[name](dist.get_rank())
        found[name] = [(each.cause, each.certain, each.evidence) for each in seen.report(getattr(seen, "wait_s", None))]
        found[name] += [(f"alone: {cause}", certain, "") for cause, certain in getattr(seen, "alone_says", [])]
        seen.close()
    dist.barrier()
    dist.destroy_process_group()
    return found
