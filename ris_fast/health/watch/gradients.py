"""Gradients on their way to a step that is looked at: as backward left them, and as the optimizer finds them.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from time import thread_time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ris_fast.health.watch.eager import eager, eager_hook, is_eager_hook
from ris_fast.health.watch.records import StepRecord
from ris_fast.health.watch.samples import ParameterSample, few_of, joined, local_values
from ris_fast.training.telemetry.step_telemetry import norms

LARGE = 2**17  # numbers of a gradient
WHOLE = 3  # steps in which gradients are read again at the step although their version counters tell of no write
UNCHANGED = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])  # see `StepRecord.grad_change`


@dataclass
class Arrivals:
    """Gradients as one backward pass left them.

    Args: ids: (T,) of the tensors; states: (T,) id and version of each gradient; norms: (T,) float32; few: a few
        numbers of each, one after the other, of `sizes`.
    """

    ids: list[int]
    states: list[tuple[int, int]]
    norms: Tensor
    few: Tensor
    sizes: list[int]


class StaleGradientProbe:
    """Whether one tensor's gradient is still there at the next backward, and all that comes is added to it.

    Its norm after a step must be what backward finds, and that after one backward what the next one finds.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.arrivals = parameter, 0
        self.norm = norms([parameter.grad])[0]
        self.same = self.norm > 0
        self.hook: Any = parameter.register_hook(eager_hook(self._found))

    @torch.no_grad()
    def _found(self, _: Tensor) -> None:
        """Before backward adds what came."""
        grad = self.parameter.grad
        self.same = self.same & (norms([grad])[0] == self.norm) if grad is not None else torch.zeros_like(self.same)

    def arrive(self, norm: Tensor) -> None:
        """After backward has added what came."""
        self.norm, self.arrivals = norm, self.arrivals + 1

    def close(self) -> Tensor | None:
        """(), or None where nothing came."""
        self.hook.remove()
        return self.same if self.arrivals else None


class GradientWatch:
    """Hooks on the gradients of the tensors of a step that is looked at.

    They only tell that a gradient is there; all that came are read at the end of the backward pass. Each is read at
    once where something else may change it by then: hooks of others, or a reduction between ranks.
    """

    def __init__(self) -> None:
        self.batches: list[Arrivals] = []  # since the last step
        # Before the first step: arrivals at each tensor, those that found the gradient before gone, the last gradient.
        self.passes: dict[int, tuple[int, int, weakref.ref[Tensor] | None]] = {}
        self.counts_passes = True
        self.hooked: list[Tensor] = []
        self.hooks: list[Any] = []
        self.stale_probe: StaleGradientProbe | None = None
        self.arrival = arrival_hook(self)
        # Of gradients that came in the backward pass that runs: the norm, where it is read at once.
        self.waiting: dict[int, Tensor | None] = {}
        self.task, self.alone = -1, True
        self.cost_s = 0.0  # of all reading, of this thread's own time: a busy machine does not count
        self.first_arrival: Callable[[], None] | None = None  # called once for each step that is looked at

    def hook(self, wanted: Sequence[Tensor]) -> None:
        """Hooks these tensors, and no others."""
        if len(wanted) == len(self.hooked) and all(map(is_, wanted, self.hooked)):
            return
        for hook in self.hooks:
            hook.remove()
        self.hooked, self.alone = list(wanted), not (dist.is_available() and dist.is_initialized())
        self.hooks = [p.register_post_accumulate_grad_hook(self.arrival) for p in wanted]

    def _arrive(self, parameter: Tensor, grad: Tensor) -> None:
        """After backward has added to a gradient."""
        norm, first = None, not self.waiting and not self.batches and self.first_arrival is not None
        if first or grad.numel() >= LARGE:
            began = thread_time()
            if first:
                self.first_arrival()
            norm = _norm_in_cache(grad)
            self.cost_s += thread_time() - began
        self.waiting[id(parameter)] = norm
        task = torch._C._current_graph_task_id()
        if not self.alone or task == -1 or _is_shared(parameter):
            self.take()
        elif task != self.task:
            self.task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.take)

    @eager
    def take(self) -> None:
        """Reads what came."""
        if not self.waiting:
            return
        began = thread_time()
        self._take()
        self.cost_s += thread_time() - began

    def _take(self) -> None:
        waiting, self.waiting, self.task = self.waiting, {}, -1
        came = [p for p in self.hooked if id(p) in waiting and p.grad is not None]
        if not came:
            return
        with torch.no_grad():
            grads = [p.grad for p in came]
            some = list(map(few_of, grads))
            batch = Arrivals(
                ids=list(map(id, came)),
                states=[(id(grad), grad._version) for grad in grads],
                norms=_norms_of(grads, [waiting[id(p)] for p in came]),
                few=joined(some),
                sizes=list(map(len, some)),
            )
        self._keep(batch)
        if self.counts_passes:
            for each in came:
                self._count_pass(each)
        probe = self.stale_probe
        if probe is not None and id(probe.parameter) in batch.ids:
            probe.arrive(batch.norms[batch.ids.index(id(probe.parameter))])

    def _keep(self, batch: Arrivals) -> None:
        """And those before it in which some tensor came for the last time."""
        kept, later = [batch], set(batch.ids)
        for each in reversed(self.batches):
            if not later.issuperset(each.ids):
                kept.append(each)
                later.update(each.ids)
        self.batches = kept[::-1]

    def forget(self) -> None:
        """What came before is not of the next step."""
        self.batches, self.waiting, self.task = [], {}, -1

    def norms_of_arrived(self) -> dict[int, Tensor]:
        """() each, by id of the tensor."""
        self.take()
        return {key: norm for batch in self.batches for key, norm in zip(batch.ids, batch.norms.unbind())}

    def missing(self) -> set[int]:
        """Ids of hooked tensors that no gradient came to."""
        self.take()
        return set(map(id, self.hooked)).difference(*(batch.ids for batch in self.batches))

    def _count_pass(self, parameter: Tensor) -> None:
        """Before the first step: backward adds to the same tensor unless it was set to None or its graph is kept."""
        (passes, cleared, last), grad = self.passes.get(id(parameter), (0, 0, None)), parameter.grad
        gone = last is not None and last() is not grad and not grad.requires_grad and grad.layout == torch.strided
        self.passes[id(parameter)] = passes + 1, cleared + gone, weakref.ref(grad)

    def fill(self, record: StepRecord, parameters: dict[str, Tensor], sample: ParameterSample) -> None:
        """What came, and what the optimizer found: with a closure what came, or what is left of it, since the step may
        clear it."""
        self.take()
        record.no_grad = tuple(name for name, p in parameters.items() if p.grad is None)
        whole = self.batches[0] if len(self.batches) == 1 and not record.closure else None
        if whole is not None and whole.ids == list(map(id, parameters.values())) and self._holds(whole, sample):
            record.hooked, record.grad_change = tuple(parameters), UNCHANGED
            record.grad_after_backward = whole.norms
            same = record.step >= WHOLE and self.are_as_left(parameters)
            record.grad_at_step = whole.norms if same else grad_norms(record, parameters)
        else:
            self._fill_apart(record, parameters, sample)

    def are_as_left(self, parameters: dict[str, Tensor]) -> bool:
        """Whether one backward pass came to all, and left the gradients as they are, finite; known on the CPU alone."""
        if len(self.batches) != 1 or self.batches[0].norms.device.type != "cpu":
            return False
        states = [(id(p.grad), -1 if p.grad is None else p.grad._version) for p in parameters.values()]
        return states == self.batches[0].states and math.isfinite(self.batches[0].norms.sum().item())

    def _holds(self, batch: Arrivals, sample: ParameterSample) -> bool:
        """Whether a few numbers of each gradient are what they were, where reading is free."""
        return (
            batch.few.device.type == "cpu" and batch.sizes == sample.sizes and torch.equal(batch.few, sample.gradient)
        )

    def _fill_apart(self, record: StepRecord, parameters: dict[str, Tensor], sample: ParameterSample) -> None:
        """Where several passes came, not all tensors had a gradient, or something changed it."""
        hooked = {id(p) for p in self.hooked if p.requires_grad}
        came = self.norms_of_arrived()
        last = set(self.batches[-1].ids) if self.batches else set()
        record.earlier = tuple(name for name, p in parameters.items() if id(p) in came and id(p) not in last)
        at_step, arrived = grad_norms(record, parameters), {n: came.get(id(p)) for n, p in parameters.items()}
        record.hooked = tuple(name for name, p in parameters.items() if id(p) in hooked)
        record.none_grads = tuple(name for name in record.hooked if arrived[name] is None)
        record.grad_change = None if record.closure else self._change(parameters, sample)
        unheard = [None if id(p) in hooked else norm for p, norm in zip(parameters.values(), at_step)]
        record.grad_after_backward = _row(record, [u if a is None else a for a, u in zip(arrived.values(), unheard)])
        record.grad_at_step = torch.maximum(record.grad_after_backward, at_step) if record.closure else at_step

    def _change(self, parameters: dict[str, Tensor], sample: ParameterSample) -> Tensor | None:
        """See `StepRecord.grad_change`; of the tensors that were hooked and have a gradient in the same layout."""
        if sum(sample.sizes) != len(sample.gradient):  # sparse ones among them
            return None
        came = {key: few for batch in self.batches for key, few in zip(batch.ids, batch.few.split(batch.sizes))}
        found = zip(parameters.values(), sample.gradient.split(sample.sizes))
        both = [(came[id(p)], few) for p, few in found if id(p) in came and p.grad is not None]
        both = [(arrived, at_step) for arrived, at_step in both if arrived.shape == at_step.shape]
        return compare(*zip(*both)) if both else None

    def take_stale(self) -> Tensor | None:
        """What the probe of the step before has seen, which ends."""
        probe, self.stale_probe = self.stale_probe, None
        return probe and probe.close()

    def probe_stale(self, parameters: dict[str, Tensor]) -> None:
        """After a step: watches whether a gradient that is there now is added to."""
        plain = (p for p in parameters.values() if p.requires_grad and p.grad is not None)
        self.stale_probe = next((StaleGradientProbe(p) for p in plain if p.grad is local_values(p.grad)), None)

    def close(self) -> None:
        """Takes every hook away."""
        self.hook([])
        self.take_stale()


def compare(arrived: Sequence[Tensor], at_step: Sequence[Tensor]) -> Tensor:
    """(6,) of gradients as backward left them against what the optimizer finds: the cosine, the share of negative zeros
    in the latter, the spread over the size of each, and that of the magnitudes that are not zero."""
    device = arrived[0].device
    before, now = (
        torch.cat([each.to(device, torch.float32, non_blocking=device.type == "cuda") for each in side])
        for side in (arrived, at_step)
    )
    cosine = torch.nn.functional.cosine_similarity(before, now, dim=0)
    spreads = [(each - each.mean()).norm() / each.norm() for each in (before, now)]
    for each in (before.abs(), now.abs()):
        some = each > 0
        spreads.append(((each - each.sum() / some.sum()) * some).norm() / each.norm())
    return torch.stack([cosine, (now.signbit() & (now == 0)).float().mean(), *spreads])


def _norm_in_cache(grad: Tensor) -> Tensor | None:
    """() float32, of a large one, which is read faster right after it was written than later; else None."""
    if grad.numel() < LARGE or grad.dtype != torch.float32 or grad.device.type != "cpu" or type(grad) is not Tensor:
        return None
    return torch.linalg.vector_norm(grad.detach()) if grad.layout == torch.strided else None


def _norms_of(grads: Sequence[Tensor], known: Sequence[Tensor | None]) -> Tensor:
    """(T,) float32, some of which are known."""
    others = norms([local_values(grad) for grad, norm in zip(grads, known) if norm is None])
    if len(others) == len(known):
        return others
    rest = iter(others.unbind())
    return torch.stack([next(rest) if norm is None else norm for norm in known])


def _is_shared(parameter: Tensor) -> bool:
    """Whether hooks of others, which may change the gradient, are on the tensor."""
    hooks = parameter._post_accumulate_grad_hooks
    return len(hooks) > 1 and not all(map(is_eager_hook, hooks.values()))


class Listener(Protocol):
    """Hears of gradients."""

    def _arrive(self, parameter: Tensor, grad: Tensor) -> None: ...


def arrival_hook(listener: Listener) -> Callable[[Tensor], None]:
    """Called after backward has added to a gradient. One function for all tensors and steps: compiled autograd would
    take another for another graph."""
    me = weakref.ref(listener)

    @eager_hook
    def arrived(parameter: Tensor) -> None:
        if (listener := me()) is not None and (grad := parameter.grad) is not None:
            listener._arrive(parameter, grad)

    return arrived


def grad_norms(record: StepRecord, parameters: dict[str, Tensor]) -> Tensor:
    """(T,) norms of the gradients as they are; zero for none."""
    present = iter(norms([local_values(p.grad) for p in parameters.values() if p.grad is not None]))
    return _row(record, [None if p.grad is None else next(present) for p in parameters.values()])


def _row(record: StepRecord, values: Sequence[Tensor | None]) -> Tensor:
    """(T,) on the device of the record's weights; zero for None."""
    zero = torch.zeros((), device=record.weights_before.device)
    moved = [zero if value is None else value.to(zero.device, non_blocking=zero.is_cuda) for value in values]
    return torch.stack(moved) if moved else zero[None][:0]
