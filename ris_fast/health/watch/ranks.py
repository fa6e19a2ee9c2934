"""What `watch` sees where torch.distributed has several ranks: gradients as backward left them on this rank and as the
optimizer finds them, and weights.

Nothing is sent before a report. There each rank leaves what it saw in the store that the process group was made with,
and reads what the others left. That is no collective: a report that one rank alone asks for ends, after a wait, with
what this rank knows.

Legend: T tensors, at most 64 of those that one optimizer holds; S numbers, up to 16 of each, one after the other.
"""

from __future__ import annotations

import gc
import pickle
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from itertools import count, islice
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.watch.clock import Clock
from ris_fast.health.watch.eager import eager
from ris_fast.health.watch.gradients import arrival_hook
from ris_fast.health.watch.hooks import OptimizerHooks, has_closure, rates_of
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.rank_records import RankOptimizer, RankRecord, RanksRecord, RankStep, Wrapper
from ris_fast.health.watch.samples import has_norm, held_tensors, joined

DENSE, KEPT, CHOSEN, NUMBERS, LAST, PASSES = 8, 16, 64, 16, 1024, 128
WAIT_S, SHORT_WAIT_S, POLL_S, TOGETHER_S = 5.0, 0.5, 0.02, 60.0
SHARDED = ("_is_flat_param", "ds_id", "tensor_model_parallel", "_is_sharded")  # FSDP1, DeepSpeed, Megatron, fairscale

_numbers = count()


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class RankHooks:
    """Hooks around one optimizer's steps and on the gradients of some of its tensors; idle in a single process."""

    def __init__(self, model: nn.Module, by: OptimizerHooks, every: int) -> None:
        self.model, self.by, self.optimizer, self.every = model, by, by.optimizer, every
        self.records: list[RankStep] = []
        self.arrived: dict[int, Tensor] = {}  # since the last step: a few numbers of the gradient
        self.held_back = False  # DistributedDataParallel was told not to reduce at the last backward
        self.wrappers: list[nn.parallel.DistributedDataParallel] = []
        self.probe: Tensor | None = None  # a small tensor whose gradient is looked at in every step
        self.any: deque[tuple[int, Tensor]] = deque(maxlen=LAST)  # step, whether the probe's gradient is not all zeros
        self.hooked: list[Tensor] = []
        self.grad_hooks: list[Any] = []
        self.arrival = arrival_hook(self)
        self.wrapper: Wrapper | None = None  # which may be gone when the report comes
        self.step_hooks: list[Any] = []

    @property
    def steps(self) -> int:
        return self.by.steps

    def begin(self) -> None:
        """Several ranks were seen."""
        self.step_hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        self._hook_gradients()

    def close(self) -> None:
        """Takes every hook away."""
        for hook in (*self.step_hooks, *self.grad_hooks):
            hook.remove()
        self.hooked, self.grad_hooks = [], []

    def chosen(self) -> dict[str, Tensor]:
        """(T) trainable tensors of the model that the optimizer holds whole on this rank, evenly spread."""
        ids = {id(p) for p in held_tensors(self.optimizer)}
        mine = [(n, p) for n, p in self.model.named_parameters() if id(p) in ids and p.requires_grad and is_whole(p)]
        stride = max(1, -(-len(mine) // CHOSEN))
        return dict(mine[::stride])

    def record(self) -> RankOptimizer:
        """All that was seen. Reads the device."""
        steps, flags = [step for step, _ in self.any], joined([each[None] for _, each in self.any]).tolist()
        return RankOptimizer(
            kinds=frozenset(kind.__name__ for kind in type(self.optimizer).__mro__),
            steps=self.steps,
            records=[record.on_host() for record in self.records],
            zero_steps=[step for step, flag in zip(steps, flags) if not flag],
            full_steps=[step for step, flag in zip(steps, flags) if flag],
        )

    def is_due(self) -> bool:
        """Whether the next step is looked at: the same steps on all ranks."""
        return self.steps < DENSE or self.steps % self.every == 0

    def _hook_gradients(self) -> None:
        """Hooks on gradients for the next step: on all that are looked at, or on the small one alone."""
        if self.is_due():
            chosen = list(self.chosen().values())
            self.probe = min(chosen, key=lambda p: (p.numel() < NUMBERS, p.numel()), default=None)
            self.wrappers = wrappers_in(self.model)
            if self.steps == DENSE // 2 and several_ranks():
                held = {id(p) for p in held_tensors(self.optimizer)}
                self.wrapper = find_wrapper(
                    self.model, {n: p for n, p in self.model.named_parameters() if id(p) in held}
                )
            wanted = chosen
        else:
            wanted = [] if self.probe is None else [self.probe]
        if [id(p) for p in wanted] != [id(p) for p in self.hooked]:
            for hook in self.grad_hooks:
                hook.remove()
            self.hooked = wanted
            self.grad_hooks = [p.register_post_accumulate_grad_hook(self.arrival) for p in wanted]

    def _arrive(self, parameter: Tensor, grad: Tensor) -> None:
        """After backward has added to a gradient, before DistributedDataParallel has reduced it."""
        if grad.layout != torch.strided:
            return
        if parameter is self.probe:
            if self.any and self.any[-1][0] == self.steps:
                self.any.pop()
            self.any.append((self.steps, grad.any()))
        if self.is_due():
            with torch.no_grad():
                self.arrived[id(parameter)] = few_numbers([grad])
            self.held_back = any(not each.require_backward_grad_sync for each in self.wrappers)

    @eager
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_due() and not has_closure(*args, *kwargs.values()):
            self._look()

    @torch.no_grad()
    def _look(self) -> None:
        chosen = self.chosen()
        heard = [(self.arrived.get(id(p)), p) for p in chosen.values()]
        here = {n: p for (n, p), (a, _) in zip(chosen.items(), heard) if a is not None and _has_strided_grad(p)}
        if not here:
            return
        record = RankStep(
            step=self.steps,
            names=list(here),
            sizes=[count_numbers(p) for p in here.values()],
            arrived=joined([self.arrived[id(p)] for p in here.values()]),
            at_step=few_numbers([p.grad for p in here.values()]),
            weights=few_numbers(list(here.values())),
            rates=rates_of(self.optimizer),
            held_back=self.held_back,
        )
        self.records = [*self.records[:DENSE], *self.records[DENSE:][-KEPT:], record]

    @eager
    def _after(self, *_: Any) -> None:
        if self.arrived or self.is_due():
            self.arrived.clear()
            self._hook_gradients()


def _count_steps(observer: ref[RankObserver]) -> int:
    return sum(each.steps for each in found.hooks) if (found := observer()) is not None else 0


class RankObserver:
    """All optimizers of a watched loop, the clock that tells where ranks stand, and their meeting at a report."""

    def __init__(
        self, model: nn.Module, by_optimizer: Sequence[OptimizerHooks], every: int, stall_s: float | None = None
    ) -> None:
        self.model, self.number = model, next(_numbers)
        self.active = False  # several ranks were seen
        self.hooks = [RankHooks(model, each, every) for each in by_optimizer]
        self.clock = Clock(partial(_count_steps, ref(self)), stall_s)
        if stall_s is not None:
            self.clock.start()
        self.begin()
        self.left: list[str] = []  # keys of this rank in the store
        self.reports, self.alone = 0, False

    def begin(self) -> None:
        """Once there are several ranks, before a step that all of them look at."""
        if all(each.is_due() for each in self.hooks) and several_ranks():
            self.active = True
            self.clock.start()
            for each in self.hooks:
                each.begin()

    def close(self) -> None:
        """Takes every hook away, and ends the clock."""
        self.clock.close()
        for hooks in self.hooks:
            hooks.close()

    def record(self, passes: Sequence[PassRecord], wait_s: float | None = None) -> RanksRecord | None:
        """What this rank saw, and the others whose report at the same step comes in time. None in a single process.
        `passes`: the model's, on the host."""
        if not several_ranks():
            return None
        mine = self._mine(passes)
        wait_s = (SHORT_WAIT_S if self.alone else WAIT_S) if wait_s is None else wait_s
        try:
            others, elsewhere = self._meet(mine, wait_s)
        except (RuntimeError, ValueError, OSError):  # the store is gone, as where rank 0 has ended
            others, elsewhere = [], {}
        self.alone = not others
        return RanksRecord(mine, sorted([mine, *others], key=lambda each: each.rank), dist.get_world_size(), elsewhere)

    def _mine(self, passes: Sequence[PassRecord]) -> RankRecord:
        held = {id(p) for hooks in self.hooks for p in held_tensors(hooks.optimizer)}
        tensors = {n: p for n, p in self.model.named_parameters() if id(p) in held and is_whole(p)}
        hashes = [bits_hash(p) for p in tensors.values()]
        return RankRecord(
            rank=dist.get_rank(),
            device=_device_name(next(iter(tensors.values()), torch.zeros(0)).device),
            names=list(tensors),
            shapes=[tuple(p.shape) for p in tensors.values()],
            trainable=[p.requires_grad for p in tensors.values()],
            hashes=joined([each[None] for each in hashes]).tolist(),
            optimizers=[hooks.record() for hooks in self.hooks],
            wrapper=find_wrapper(self.model, tensors)
            or next((hooks.wrapper for hooks in self.hooks if hooks.wrapper is not None), None),
            inputs=dict(
                islice(((p.number, _hash(p.input)) for p in passes if p.training and p.input is not None), PASSES)
            ),
        )

    def _meet(self, mine: RankRecord, wait_s: float) -> tuple[list[RankRecord], dict[int, int]]:
        """Records of the other ranks, and of those that reported at about this time at another step, with other
        weights, which step."""
        store, place = dist.distributed_c10d._get_default_store(), f"ris_fast/watch/{self.number}"
        self.reports += 1
        self.left.append(f"{place}/{mine.steps}/{mine.rank}")
        store.set(self.left[-1], pickle.dumps(mine))
        store.set(f"{place}/at/{mine.rank}", pickle.dumps((self.reports, mine.steps, time.time(), mine.hashes)))
        for key in self.left[:-2]:
            if key not in self.left[-2:]:
                store.delete_key(key)
        self.left = self.left[-2:]
        missing, found, end = {*range(dist.get_world_size())} - {mine.rank}, [], time.monotonic() + wait_s
        while missing:
            here = {rank for rank in missing if store.check([f"{place}/{mine.steps}/{rank}"])}
            found += [pickle.loads(store.get(f"{place}/{mine.steps}/{rank}")) for rank in sorted(here)]
            missing -= here
            if time.monotonic() >= end:
                break
            if missing:
                time.sleep(POLL_S)
        ats = {r: pickle.loads(store.get(f"{place}/at/{r}")) for r in missing if store.check([f"{place}/at/{r}"])}
        return found, {
            rank: steps
            for rank, (reports, steps, when, hashes) in ats.items()
            if reports == self.reports and abs(time.time() - when) < TOGETHER_S + wait_s and hashes != mine.hashes
        }


def find_wrapper(model: nn.Module, tensors: dict[str, Tensor]) -> Wrapper | None:
    """The DistributedDataParallel that reduces gradients of these tensors: part of the model, or around it."""
    ids = {id(p): n for n, p in tensors.items()}
    inside = wrappers_in(model)
    around = [
        each
        for each in (gc.get_objects() if not inside else [])
        if issubclass(type(each), nn.parallel.DistributedDataParallel)
        and any(id(p) in ids for p in each.module.parameters())
    ]
    wrappers = inside or around
    if not wrappers:
        return None
    managed = {id(p) for each in wrappers for p in each._module_parameters}
    within = {id(p) for each in wrappers for p in each.module.parameters()}
    ignored = {id(p) for each in wrappers for n, p in each.module.named_parameters() if n in each.parameters_to_ignore}
    return Wrapper(
        given=bool(inside),
        managed=[name for key, name in ids.items() if key in managed],
        within=[name for key, name in ids.items() if key in within - ignored],
        ranks=dist.get_process_group_ranks(wrappers[0].process_group),
        own_reduction=any(each._comm_hooks for each in wrappers),
    )


def wrappers_in(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    return [each for each in model.modules() if isinstance(each, nn.parallel.DistributedDataParallel)]


def is_whole(tensor: Tensor) -> bool:
    """Numbers that can be trained, none of them on another rank."""
    plain = has_norm(tensor) and tensor.layout == torch.strided and not hasattr(tensor, "to_local")
    return plain and not any(getattr(tensor, name, False) for name in SHARDED)


def few_numbers(tensors: Sequence[Tensor]) -> Tensor:
    """(S,) of whole tensors, a copy."""
    flat = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
    return joined([each.detach().reshape(-1)[:: _stride(each.numel())] for each in flat])


def count_numbers(tensor: Tensor) -> int:
    """How many numbers `few_numbers` takes of it."""
    numbers = tensor.numel() * (2 if tensor.is_complex() else 1)
    return -(-numbers // _stride(numbers))


def _stride(numbers: int) -> int:
    return -(-numbers // NUMBERS) | 1 if numbers > NUMBERS else 1


def _has_strided_grad(parameter: Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.layout == torch.strided


@torch.no_grad()
def bits_hash(tensor: Tensor, chunk: int = 1 << 22) -> Tensor:
    """() int64: a hash of all bytes, in order; on the device."""
    numbers = tensor.detach().contiguous().view(-1)
    numbers = torch.view_as_real(numbers).reshape(-1) if numbers.is_complex() else numbers
    words = numbers.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[numbers.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), chunk):
        bits = words[start : start + chunk].long()
        place = torch.arange(start + 1, start + 1 + len(bits), device=bits.device)
        total += ((bits ^ (place * 2654435761)) * (2 * place * 40503 + 1)).sum()
    return total


def _hash(few: Tensor) -> str:
    return blake2b(few.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _device_name(device: torch.device) -> str:
    """Ranks on unlike devices may round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
