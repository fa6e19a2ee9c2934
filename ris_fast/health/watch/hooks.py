"""Hooks around one optimizer's steps, which record what `watch` reports on.

They run on a few steps: on a tensor's gradient after it was accumulated, and around the optimizer's step; in the others
they only note which tensors are frozen and which have a gradient. They read nothing from the device, and are not part
of a compiled model; a compiled `optimizer.step` is parted at them.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.watch.eager import eager_hook
from ris_fast.health.watch.records import OptimizerRecord, StepRecord, TensorRecord
from ris_fast.health.watch.samples import (
    Origin,
    ParameterSample,
    StaleGradientProbe,
    compare,
    few_numbers,
    has_norm,
    held_tensors,
    local_values,
)
from ris_fast.training.telemetry.step_telemetry import norms

DENSE, KEPT = 8, 64


class OptimizerHooks:
    """Hooks around one optimizer's steps and on the gradients of the tensors that it holds."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self.records: list[StepRecord] = []
        self.arrived: dict[int, tuple[Tensor, Tensor]] = {}  # since the last step: norm and a few numbers
        # Before the first step: arrivals at each tensor, those that found the gradient before gone, the last gradient.
        self.passes: dict[int, tuple[int, int, weakref.ref[Tensor] | None]] = {}
        self.origin = Origin(optimizer)
        self.frozen: set[int] = set()  # at the last step
        self.with_grad: set[int] = set()  # at the last step
        self.hooked: list[Tensor] = []
        self.grad_hooks: list[Any] = []
        self.gradient_hook = _gradient_hook(self)
        self.current: StepRecord | None = None
        self.sample: ParameterSample | None = None
        self.stale_probe: StaleGradientProbe | None = None
        self.step_hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._hook_gradients()

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer holds now; without those that have no norm (lazy, meta,
        integers)."""
        ids = {id(p) for p in held_tensors(self.optimizer)}
        return {plain_name(n): p for n, p in self.model.named_parameters() if id(p) in ids and has_norm(p)}

    def record(self, tensors: Mapping[int, TensorRecord]) -> OptimizerRecord:
        """All that was seen; `tensors`: a record of each tensor, by id. Reads the device."""
        parameters = self.parameters()
        return OptimizerRecord(
            kinds=frozenset(kind.__name__ for kind in type(self.optimizer).__mro__),
            groups=[g | {"params": [tensors[id(p)] for p in g["params"]]} for g in self.optimizer.param_groups],
            steps=self.steps,
            records=[record.on_host() for record in self.records],
            weight_norms=dict(zip(parameters, _weight_norms(parameters).tolist())),
            trained={tensors[key] for key in self.origin.trained()},
            frozen={tensors[key] for key in self.frozen & tensors.keys()},
            with_grad={tensors[key] for key in self.with_grad & tensors.keys()},
            arrived=[float(norm) for norm, _ in self.arrived.values()],
            passes=max((count for count, _, _ in self.passes.values()), default=0),
            cleared=max((count for _, count, _ in self.passes.values()), default=0),
        )

    def close(self) -> None:
        """Takes every hook away."""
        for hook in (*self.step_hooks, *self.grad_hooks, *([self.stale_probe.hook] if self.stale_probe else [])):
            hook.remove()
        self.hooked, self.grad_hooks, self.stale_probe = [], [], None

    def _due(self) -> bool:
        """Whether the next step is looked at."""
        return self.steps < DENSE or self.steps % self.every == 0

    def _hook_gradients(self) -> None:
        """Hooks on gradients for the next step, if it is one that is looked at."""
        wanted = [p for p in self.parameters().values() if p.requires_grad] if self._due() else []
        if [id(p) for p in wanted] == [id(p) for p in self.hooked]:
            return
        for hook in self.grad_hooks:
            hook.remove()
        self.hooked = wanted
        self.grad_hooks = [p.register_post_accumulate_grad_hook(self.gradient_hook) for p in wanted]

    def _arrive(self, parameter: Tensor) -> None:
        """After backward has added to a gradient."""
        norm = norms([local_values(parameter.grad)])[0]
        self.arrived[id(parameter)] = norm, few_numbers([parameter.grad])
        if not self.steps:
            self._count_pass(parameter)
        if self.stale_probe is not None and self.stale_probe.parameter is parameter:
            self.stale_probe.arrive(norm)

    def _count_pass(self, parameter: Tensor) -> None:
        """Before the first step: backward adds to the same tensor unless it was set to None or its graph is kept."""
        (passes, cleared, last), grad = self.passes.get(id(parameter), (0, 0, None)), parameter.grad
        gone = last is not None and last() is not grad and not grad.requires_grad and grad.layout == torch.strided
        self.passes[id(parameter)] = passes + 1, cleared + gone, weakref.ref(grad)

    @torch.compiler.disable
    @torch.no_grad()
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = held_tensors(self.optimizer)
        self.frozen = {id(p) for p in tensors if not p.requires_grad}
        self.with_grad = {id(p) for p in tensors if p.grad is not None}
        if not self._due():
            return
        self.origin.note()
        parameters = self.parameters()
        closure = any(callable(each) and not isinstance(each, Optimizer) for each in (*args, *kwargs.values()))
        self.current = self._begin(parameters, closure)
        last, self.sample = self.sample, ParameterSample(self.steps, parameters)
        self.current.reset = last and self.sample.is_reset(last)
        if closure:
            self.arrived.clear()
        else:
            self._record_gradients(parameters)

    def _begin(self, parameters: dict[str, Tensor], closure: bool) -> StepRecord:
        rates = [group.get("lr", 1.0) for group in self.optimizer.param_groups]
        return StepRecord(
            step=self.steps,
            names=list(parameters),
            usual_norms=[p.shape[0] ** 0.5 if p.ndim > 1 else 1.0 for p in parameters.values()],
            rates=[rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates],
            weights_before=_weight_norms(parameters),
            closure=closure,
            scaled=getattr(self.optimizer, "found_inf", None) is not None
            or getattr(self.optimizer, "loss_scale", None) == "dynamic",
        )

    def _record_gradients(self, parameters: dict[str, Tensor]) -> None:
        """What came, and what the optimizer found: with a closure what came, or what is left of it, since the step may
        clear it."""
        record, hooked = self.current, {id(p) for p in self.hooked if p.requires_grad}
        at_step, arrived = self._grad_norms(parameters), {n: self.arrived.get(id(p)) for n, p in parameters.items()}
        record.hooked = tuple(name for name, p in parameters.items() if id(p) in hooked)
        record.no_grad = tuple(name for name, p in parameters.items() if p.grad is None)
        record.none_grads = tuple(name for name in record.hooked if arrived[name] is None)
        record.grad_change = None if record.closure else self._grad_change(parameters)
        unheard = [None if id(p) in hooked else norm for p, norm in zip(parameters.values(), at_step)]
        record.grad_after_backward = self._row([a[0] if a else u for a, u in zip(arrived.values(), unheard)])
        record.grad_at_step = torch.maximum(record.grad_after_backward, at_step) if record.closure else at_step

    def _grad_change(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """See `StepRecord.grad_change`; of the tensors that were hooked and have a gradient in the same layout."""
        with_both = [p for p in parameters.values() if id(p) in self.arrived and p.grad is not None]
        both = [(self.arrived[id(p)][1], few_numbers([p.grad])) for p in with_both]
        both = [(arrived, at_step) for arrived, at_step in both if arrived.shape == at_step.shape]
        return compare(*zip(*both)) if both else None

    def _grad_norms(self, parameters: dict[str, Tensor]) -> Tensor:
        """(T,) norms of the gradients as they are; zero for none."""
        present = iter(norms([local_values(p.grad) for p in parameters.values() if p.grad is not None]))
        return self._row([None if p.grad is None else next(present) for p in parameters.values()])

    def _row(self, values: Sequence[Tensor | None]) -> Tensor:
        """(T,) on the device of the record's weights; zero for None."""
        zero = torch.zeros((), device=self.current.weights_before.device)
        moved = [zero if value is None else value.to(zero.device, non_blocking=zero.is_cuda) for value in values]
        return torch.stack(moved) if moved else zero[None][:0]

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        uncleared, self.stale_probe = self.stale_probe and self.stale_probe.close(), None
        self.steps += 1
        # With a closure gradients come within the step.
        self.with_grad = self.with_grad or {id(p) for p in held_tensors(self.optimizer) if p.grad is not None}
        if self.current is not None:
            self._finish(self.current, uncleared)
        self.arrived.clear()
        self._hook_gradients()

    def _finish(self, record: StepRecord, uncleared: Tensor | None) -> None:
        now = self.parameters()
        parameters = {name: now[name] for name in record.names if name in now}
        record.uncleared = uncleared
        if record.closure:
            self._record_gradients(parameters)
        record.weights_after, record.update_ratio = _weight_norms(parameters), self.sample.finish(parameters)
        if self.steps < DENSE:
            record.grad_after_step = self._grad_norms(parameters)
            plain = (p for p in parameters.values() if p.requires_grad and p.grad is not None)
            self.stale_probe = next((StaleGradientProbe(p) for p in plain if p.grad is local_values(p.grad)), None)
        self.records = [*self.records[:DENSE], *self.records[DENSE:][-KEPT:], record]
        self.current = None


def _gradient_hook(hooks: OptimizerHooks) -> Callable[[Tensor], None]:
    """Called after backward has added to a gradient. One function for all tensors and steps: compiled autograd would
    take another for another graph."""
    me = weakref.ref(hooks)

    @eager_hook
    def arrived(parameter: Tensor) -> None:
        if (hooks := me()) is not None and parameter.grad is not None:
            hooks._arrive(parameter)

    return arrived


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _weight_norms(parameters: dict[str, Tensor]) -> Tensor:
    """(T,)"""
    return norms([local_values(tensor) for tensor in parameters.values()])
