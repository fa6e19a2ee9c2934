"""Gradients on their way to a step that is looked at: as backward left them, and as the optimizer finds them.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ris_fast.health.watch.eager import eager_hook
from ris_fast.health.watch.records import StepRecord
from ris_fast.health.watch.samples import PLAIN, ParameterSample, StaleGradientProbe, compare, few_numbers, local_values
from ris_fast.training.telemetry.step_telemetry import norms


class GradientWatch:
    """Hooks on the gradients of the tensors of a step that is looked at."""

    def __init__(self) -> None:
        self.arrived: dict[int, tuple[Tensor, Tensor]] = {}  # since the last step: norm and a few numbers
        # Before the first step: arrivals at each tensor, those that found the gradient before gone, the last gradient.
        self.passes: dict[int, tuple[int, int, weakref.ref[Tensor] | None]] = {}
        self.counts_passes = True
        self.hooked: list[Tensor] = []
        self.hooks: list[Any] = []
        self.stale_probe: StaleGradientProbe | None = None
        self.arrival = arrival_hook(self)
        self.first_arrival: Callable[[], None] | None = None  # called once for each step that is looked at

    def hook(self, wanted: Sequence[Tensor]) -> None:
        """Hooks these tensors, and no others."""
        if list(map(id, wanted)) == list(map(id, self.hooked)):
            return
        for hook in self.hooks:
            hook.remove()
        self.hooked = list(wanted)
        self.hooks = [p.register_post_accumulate_grad_hook(self.arrival) for p in wanted]

    def _arrive(self, parameter: Tensor) -> None:
        """After backward has added to a gradient."""
        grad = parameter.grad
        if not self.arrived and self.first_arrival is not None:
            self.first_arrival()
        norm, few = _norm(grad), few_numbers([grad.detach()])
        self.arrived[id(parameter)] = norm, few
        if self.counts_passes:
            self._count_pass(parameter)
        if self.stale_probe is not None and self.stale_probe.parameter is parameter:
            self.stale_probe.arrive(norm)

    def _count_pass(self, parameter: Tensor) -> None:
        """Before the first step: backward adds to the same tensor unless it was set to None or its graph is kept."""
        (passes, cleared, last), grad = self.passes.get(id(parameter), (0, 0, None)), parameter.grad
        gone = last is not None and last() is not grad and not grad.requires_grad and grad.layout == torch.strided
        self.passes[id(parameter)] = passes + 1, cleared + gone, weakref.ref(grad)

    def fill(self, record: StepRecord, parameters: dict[str, Tensor], sample: ParameterSample) -> None:
        """What came, and what the optimizer found: with a closure what came, or what is left of it, since the step may
        clear it."""
        hooked = {id(p) for p in self.hooked if p.requires_grad}
        at_step, arrived = grad_norms(record, parameters), {n: self.arrived.get(id(p)) for n, p in parameters.items()}
        record.hooked = tuple(name for name, p in parameters.items() if id(p) in hooked)
        record.no_grad = tuple(name for name, p in parameters.items() if p.grad is None)
        record.none_grads = tuple(name for name in record.hooked if arrived[name] is None)
        record.grad_change = None if record.closure else self._change(parameters, sample)
        unheard = [None if id(p) in hooked else norm for p, norm in zip(parameters.values(), at_step)]
        record.grad_after_backward = _row(record, [a[0] if a else u for a, u in zip(arrived.values(), unheard)])
        record.grad_at_step = torch.maximum(record.grad_after_backward, at_step) if record.closure else at_step

    def _change(self, parameters: dict[str, Tensor], sample: ParameterSample) -> Tensor | None:
        """See `StepRecord.grad_change`; of the tensors that were hooked and have a gradient in the same layout."""
        if sum(sample.sizes) != len(sample.gradient):  # sparse ones among them
            return None
        found = zip(parameters.values(), sample.gradient.split(sample.sizes))
        both = [(self.arrived[id(p)][1], few) for p, few in found if id(p) in self.arrived and p.grad is not None]
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


class Listener(Protocol):
    """Hears of gradients."""

    def _arrive(self, parameter: Tensor) -> None: ...


def arrival_hook(listener: Listener) -> Callable[[Tensor], None]:
    """Called after backward has added to a gradient. One function for all tensors and steps: compiled autograd would
    take another for another graph."""
    me = weakref.ref(listener)

    @eager_hook
    def arrived(parameter: Tensor) -> None:
        if (listener := me()) is not None and parameter.grad is not None:
            listener._arrive(parameter)

    return arrived


def grad_norms(record: StepRecord, parameters: dict[str, Tensor]) -> Tensor:
    """(T,) norms of the gradients as they are; zero for none."""
    present = iter(norms([local_values(p.grad) for p in parameters.values() if p.grad is not None]))
    return _row(record, [None if p.grad is None else next(present) for p in parameters.values()])


def _norm(grad: Tensor) -> Tensor:
    """(), float32."""
    if type(grad) in PLAIN and grad.layout == torch.strided and grad.dtype == torch.float32:
        return torch.linalg.vector_norm(grad.detach())
    return norms([local_values(grad)])[0]


def _row(record: StepRecord, values: Sequence[Tensor | None]) -> Tensor:
    """(T,) on the device of the record's weights; zero for None."""
    zero = torch.zeros((), device=record.weights_before.device)
    moved = [zero if value is None else value.to(zero.device, non_blocking=zero.is_cuda) for value in values]
    return torch.stack(moved) if moved else zero[None][:0]
