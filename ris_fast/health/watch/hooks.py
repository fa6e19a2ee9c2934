"""Hooks around one optimizer's steps, which record what `watch` reports on.

They run on a few steps only: on a tensor's gradient after it was accumulated, and around the optimizer's step; in the
others they only note which tensors are frozen and which have a gradient. They read nothing from the device, and are not
part of a compiled model; a compiled `optimizer.step` is parted at them. What was trained in steps that were not looked
at shows in weights and moments that differ from those before the first step.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.watch.records import GroupRecord, OptimizerRecord, StepRecord, TensorRecord
from ris_fast.health.watch.samples import (
    Origin,
    ParameterSample,
    StaleGradientProbe,
    compare,
    few_numbers,
    has_norm,
    held_tensors,
    local_values,
    usual_norm,
)
from ris_fast.training.telemetry.step_telemetry import norms

DENSE, KEPT = 8, 64


class OptimizerHooks:
    """Hooks around one optimizer's steps and on the gradients of the tensors that it holds."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self.records: list[StepRecord] = []
        self.arrived: dict[int, Tensor] = {}  # norms of gradients that came since the last step
        self.arrived_few: dict[int, Tensor] = {}  # a few of their numbers
        self.passes: Counter[int] = Counter()  # arrivals at each tensor, before the first step
        self.cleared: Counter[int] = Counter()  # those of them that found the gradient of the one before gone
        self.last_grads: dict[int, weakref.ref[Tensor]] = {}
        self.origin = Origin(optimizer)
        self.frozen: set[int] = set()  # at the last step
        self.with_grad: set[int] = set()  # at the last step
        self.hooked: list[Tensor] = []
        self.grad_hooks: list[Any] = []
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
        ids = {id(p) for p in self.tensors()}
        return {plain_name(n): p for n, p in self.model.named_parameters() if id(p) in ids and has_norm(p)}

    def tensors(self) -> list[Tensor]:
        """All tensors of the optimizer, the model's or not."""
        return held_tensors(self.optimizer)

    def record(self, tensors: Mapping[int, TensorRecord]) -> OptimizerRecord:
        """All that was seen; `tensors`: a record of each tensor, by id. Reads the device."""
        parameters = self.parameters()
        return OptimizerRecord(
            kinds=frozenset(kind.__name__ for kind in type(self.optimizer).__mro__),
            groups=tuple(
                GroupRecord(
                    tuple(tensors[id(p)] for p in group["params"]), {k: v for k, v in group.items() if k != "params"}
                )
                for group in self.optimizer.param_groups
            ),
            steps=self.steps,
            records=[record.on_host() for record in self.records],
            weight_norms=dict(zip(parameters, _weight_norms(parameters).tolist())),
            trained={tensors[key] for key in self.origin.trained()},
            frozen={tensors[key] for key in self.frozen & tensors.keys()},
            with_grad={tensors[key] for key in self.with_grad & tensors.keys()},
            arrived=[float(norm) for norm in self.arrived.values()],
            passes=max(self.passes.values(), default=0),
            cleared=max(self.cleared.values(), default=0),
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
        me = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            if (hooks := me()) is not None and parameter.grad is not None:
                hooks._arrive(parameter)

        self.hooked, self.grad_hooks = wanted, [p.register_post_accumulate_grad_hook(arrived) for p in wanted]

    def _arrive(self, parameter: Tensor) -> None:
        """After backward has added to a gradient."""
        key = id(parameter)
        self.arrived[key] = norm = norms([local_values(parameter.grad)])[0]
        self.arrived_few[key] = few_numbers([parameter.grad])
        if not self.steps:
            self._count_pass(parameter)
        if self.stale_probe is not None and self.stale_probe.parameter is parameter:
            self.stale_probe.arrive(norm)

    def _count_pass(self, parameter: Tensor) -> None:
        """A pass before the first step: backward adds to the same tensor unless it was set to None, or a graph of it is
        kept."""
        key, grad = id(parameter), parameter.grad
        last = self.last_grads.get(key)
        self.passes[key] += 1
        self.cleared[key] += (
            last is not None and last() is not grad and not grad.requires_grad and grad.layout == torch.strided
        )
        self.last_grads[key] = weakref.ref(grad)

    @torch.compiler.disable
    @torch.no_grad()
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = self.tensors()
        self.frozen = {id(p) for p in tensors if not p.requires_grad}
        self.with_grad = {id(p) for p in tensors if p.grad is not None}
        if not self._due():
            return
        self.origin.note()
        parameters = self.parameters()
        closure = any(callable(each) and not isinstance(each, Optimizer) for each in (*args, *kwargs.values()))
        self.current = self._begin(parameters, closure)
        self.sample = ParameterSample.begin(self.sample, self.steps, parameters)
        self.current.reset = self.sample.reset
        if closure:
            self.arrived.clear()
            self.arrived_few.clear()
        else:
            self._record_gradients(parameters)

    def _begin(self, parameters: dict[str, Tensor], closure: bool) -> StepRecord:
        rates = [group.get("lr", 1.0) for group in self.optimizer.param_groups]
        scaler = getattr(self.optimizer, "found_inf", None)
        return StepRecord(
            step=self.steps,
            names=list(parameters),
            usual_norms=[usual_norm(p) for p in parameters.values()],
            rates=[rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates],
            weights_before=_weight_norms(parameters),
            closure=closure,
            scaled=scaler is not None or getattr(self.optimizer, "loss_scale", None) == "dynamic",
        )

    def _record_gradients(self, parameters: dict[str, Tensor]) -> None:
        """What came, and what the optimizer found: with a closure what came, or what is left of it, since the step may
        clear it."""
        record, hooked = self.current, {id(p) for p in self.hooked if p.requires_grad}
        at_step, zero = self._grad_norms(parameters), torch.zeros((), device=record.weights_before.device)
        arrived = [self.arrived.get(id(p)) for p in parameters.values()]
        record.hooked = tuple(name for name, p in parameters.items() if id(p) in hooked)
        record.no_grad = tuple(name for name, p in parameters.items() if p.grad is None)
        record.none_grads = tuple(
            name for (name, p), norm in zip(parameters.items(), arrived) if norm is None and id(p) in hooked
        )
        record.grad_change = None if record.closure else self._grad_change(parameters)
        unheard = [zero if id(p) in hooked else at_step[n] for n, p in enumerate(parameters.values())]
        record.grad_after_backward = _row([u if norm is None else norm for norm, u in zip(arrived, unheard)], zero)
        record.grad_at_step = torch.maximum(record.grad_after_backward, at_step) if record.closure else at_step

    def _grad_change(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """See `StepRecord.grad_change`; of the tensors that were hooked and have a gradient in the same layout."""
        both = [
            (self.arrived_few[id(p)], few_numbers([p.grad]))
            for p in parameters.values()
            if id(p) in self.arrived_few and p.grad is not None
        ]
        both = [(arrived, at_step) for arrived, at_step in both if arrived.shape == at_step.shape]
        return compare(*zip(*both)) if both else None

    def _grad_norms(self, parameters: dict[str, Tensor]) -> Tensor:
        """(T,) norms of the gradients as they are; zero for none."""
        zero = torch.zeros((), device=self.current.weights_before.device)
        present = iter(norms([local_values(p.grad) for p in parameters.values() if p.grad is not None]))
        return _row([zero if p.grad is None else next(present) for p in parameters.values()], zero)

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        uncleared, self.stale_probe = self.stale_probe and self.stale_probe.close(), None
        self.steps += 1
        self.last_grads.clear()
        # With a closure gradients come within the step.
        self.with_grad = self.with_grad or {id(p) for p in self.tensors() if p.grad is not None}
        if self.current is not None:
            self.current.uncleared = uncleared
            self._finish(self.current)
        self.arrived.clear()
        self.arrived_few.clear()
        if self.hooked or self._due():
            self._hook_gradients()

    def _finish(self, record: StepRecord) -> None:
        now = self.parameters()
        parameters = {name: now[name] for name in record.names if name in now}
        if record.closure:
            self._record_gradients(parameters)
        record.weights_after, record.update_ratio = _weight_norms(parameters), self.sample.finish(parameters)
        if self.steps < DENSE:
            record.grad_after_step = self._grad_norms(parameters)
            self.stale_probe = StaleGradientProbe.among(list(parameters.values()))
        self.records = [*self.records[:DENSE], *self.records[DENSE:][-KEPT:], record]
        self.current = None


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _weight_norms(parameters: dict[str, Tensor]) -> Tensor:
    """(T,)"""
    return norms([local_values(tensor) for tensor in parameters.values()])


def _row(values: Sequence[Tensor], zero: Tensor) -> Tensor:
    """(T,) on one device."""
    moved = [value.to(zero.device, non_blocking=zero.is_cuda) for value in values]
    return torch.stack(moved) if moved else zero[None][:0]
