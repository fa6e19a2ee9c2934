"""Hooks around one optimizer's steps, which record what `watch` reports on.

Of every step they note what costs nothing: who has a gradient, who is frozen, rates, version counters. In steps that
are looked at they read tensors' norms and a few of their numbers, on both sides of the step. They read nothing from the
device, and are not part of a compiled model; a compiled `optimizer.step` is parted at them.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ris_fast.health.watch.changes import OutsideWatch
from ris_fast.health.watch.eager import eager
from ris_fast.health.watch.every_step import EveryStep
from ris_fast.health.watch.gradients import GradientWatch, grad_norms
from ris_fast.health.watch.histories import GradientNumbers
from ris_fast.health.watch.passes import PassCounter
from ris_fast.health.watch.records import OptimizerRecord, StepRecord, TensorRecord
from ris_fast.health.watch.rivals import Rivals
from ris_fast.health.watch.samples import ParameterSample, WeightSamples, has_norm, held_tensors, local_values
from ris_fast.health.watch.schedule import DENSE, LookSchedule
from ris_fast.health.watch.start import Origin
from ris_fast.health.watch.state import denominators, steps_of
from ris_fast.training.telemetry.step_telemetry import norms

KEPT = 64
READ_EVERY = 4  # looks after the first, of which one reads the weights' norms
AGAIN = 8  # looks from one search through the model to the next


class OptimizerHooks:
    """Hooks around one optimizer's steps and on the gradients of the tensors that it holds."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int, rivals: Rivals) -> None:
        self.model, self.optimizer, self.rivals = model, optimizer, rivals
        self.schedule = LookSchedule(every)
        self.records: list[StepRecord] = []
        self.origin = Origin(optimizer)
        self.every_step, self.gradients = EveryStep(optimizer), GradientWatch()
        self.passes, self.outside = PassCounter(), OutsideWatch()
        self.live: Tensor | None = None  # which of the sampled numbers have had a gradient other than zero
        self.samples = WeightSamples()
        self.current: StepRecord | None = None
        self.sample: ParameterSample | None = None
        self.depth, self.closure = 0, False
        self.helpers_like: Callable[[Tensor], dict[str, Tensor]] | None = None  # who has these numbers
        self.cost_s, self.rival_steps, self.loads, self.loads_before, self.resets = 0.0, 0, 0, 0, 0
        self.reloads, self.loaded = 0, (-1, -1)  # loads that went back, and the last: how far its state was, and when
        self.handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        self.found = self.parameters()  # at the last look
        self.names: list[str] = []  # of these
        self.weights: tuple[list[str], Tensor] | None = None  # names and norms, as they were read last
        self.usual_norms: list[float] = []
        self.held: list[Tensor] = []
        self.missing: set[int] = set()  # ids of those to which no gradient came
        self._hook_gradients()

    @property
    def steps(self) -> int:
        return self.every_step.steps

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer holds now; without those that have no norm (lazy, meta,
        integers)."""
        ids = {id(p) for p in held_tensors(self.optimizer)}
        return {plain_name(n): p for n, p in self.model.named_parameters() if id(p) in ids and has_norm(p)}

    def record(self, tensors: Mapping[int, TensorRecord]) -> OptimizerRecord:
        """All that was seen; `tensors`: a record of each tensor, by id. Reads the device."""
        parameters, plain = self.parameters(), self.every_step.record()
        frozen = {key for key, free in zip(self.every_step.ids, self.every_step.free) if not free}
        ids = {id(p) for p in held_tensors(self.optimizer)}
        with_grad = {key for key, present in zip(self.every_step.ids, self.every_step.present) if present}
        return OptimizerRecord(
            kinds=frozenset(kind.__name__ for kind in type(self.optimizer).__mro__),
            groups=[g | {"params": [tensors[id(p)] for p in g["params"]]} for g in self.optimizer.param_groups],
            steps=self.steps,
            records=[record.on_host() for record in self.records],
            weight_norms=dict(zip(parameters, norms(list(map(local_values, parameters.values()))).tolist())),
            trained={tensors[key] for key in self.origin.trained()},
            frozen={tensors[key] for key in frozen & tensors.keys()},
            with_grad={tensors[key] for key in with_grad & tensors.keys()},
            arrived=[float(norm) for norm in self.gradients.norms_of_arrived().values()],
            passes=max((count for count, _, _ in self.gradients.passes.values()), default=0),
            cleared=max((count for _, count, _ in self.gradients.passes.values()), default=0),
            histories={tensors[key]: each for key, each in plain.tensors.items() if key in tensors},
            plain=plain,
            between=self.passes.record(),
            numbers=self.origin.numbers(parameters, self.live, self.sample),
            outside=[each.on_host() for each in self.outside.changes],
            denominators=denominators(self.optimizer, parameters),
            rivals=[each for each in self.rivals.rivals if each.shared & ids],
            loads=self.loads,
            reloads=self.reloads,
            span=self.rivals.span(self.optimizer),
            gradient=self.sample.gradient_numbers() if self.sample else GradientNumbers(),
        )

    def close(self) -> None:
        """Takes every hook away."""
        for handle in self.handles:
            handle.remove()
        self.gradients.close()
        self.passes.close()

    def _loaded(self, *_: Any) -> None:
        """A state that has made as many steps as the one loaded before, although steps were made since, is the same."""
        self.loads += 1
        made = steps_of(self.optimizer)
        self.reloads += made is not None and made == self.loaded[0] and self.steps > self.loaded[1]
        self.loaded = -1 if made is None else made, self.steps

    def _hook_gradients(self) -> None:
        """Hooks on gradients for the next step, if it is one that is looked at."""
        due = self.schedule.due(self.steps)
        wanted = [p for p in self.found.values() if p.requires_grad] if due else []
        self.gradients.hook(wanted)
        if wanted and (not self.passes.heard or not self.passes.parameter.requires_grad):
            came = self.gradients.norms_of_arrived()
            self.passes.follow(next((p for p in reversed(wanted) if id(p) in came), wanted[-1]))

    @eager
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step within a step, of a class that calls its base's, is part of it; what raised an error is forgotten."""
        if self.depth and not self.passes.passes:
            self.depth += 1
            return
        self.depth, self.rivals.inside = 1, self.optimizer
        self.closure = (len(args) > 1 or bool(kwargs)) and has_closure(*args, *kwargs.values())
        every_step = self.every_step
        every_step.before(self.closure)
        if self.passes.passes:
            self.passes.before()
        if every_step.written or self.outside.waiting is not None:
            self._compare_outside()
        if every_step.steps >= self.schedule.next:
            began = thread_time()
            self._look_before()
            self.cost_s += thread_time() - began
        elif self.outside.armed:
            self.outside.begin_light(self.steps, self.schedule.step_s)

    def _compare_outside(self) -> None:
        """With what the step before left, if that was looked at or something has been written to since."""
        if self.outside.wants_to_compare(self.every_step.written):
            began, rival_steps = thread_time(), self.rivals.steps_on(self.optimizer, self.every_step.ids)
            state_reset = self.loads > self.loads_before or self.every_step.state_is_lost
            change = self.outside.compare(self.steps, rival_steps > self.rival_steps, state_reset)
            if change is not None and self.helpers_like is not None:
                change.like = self.helpers_like(change.later)
            self.cost_s += thread_time() - began

    @torch.no_grad()
    def _look_before(self) -> None:
        parameters = self._find_parameters()
        self.origin.note(self.every_step.held)
        last, self.sample = self.sample, ParameterSample(self.steps, parameters, self.samples)
        self.current = self._begin(parameters)
        self.current.reset = None if last is None or self._state_was_reset() else self.sample.is_reset(last)
        if self.closure:
            self.gradients.forget()
        else:
            self.gradients.fill(self.current, parameters, self.sample)
            self.live = self.sample.add_live(self.live)

    def _find_parameters(self) -> dict[str, Tensor]:
        """As at the last look, if the optimizer holds the same tensors and gradients came to the same: to one that has
        left the model none comes. Searched for in some looks at any rate."""
        held, missing = self.every_step.held, self.gradients.missing()
        if self.schedule.looks % AGAIN == 0 or held is not self.held or missing != self.missing:
            self.held, self.missing, self.found = held, missing, self.parameters()
            self.names = list(self.found)
            self.usual_norms = [p.shape[0] ** 0.5 if p.ndim > 1 else 1.0 for p in self.found.values()]
        return self.found

    def _weight_norms(self, parameters: dict[str, Tensor], numbers: Tensor, due: bool) -> Tensor:
        """(T,), read if it is due. Else, on the CPU, those that were read last, as long as the few numbers (S,) that
        are known now are finite."""
        known = not due and self.weights is not None and self.weights[0] is self.names and numbers.device.type == "cpu"
        if not known or not math.isfinite(numbers.sum().item()):
            self.weights = self.names, norms([local_values(tensor) for tensor in parameters.values()])
        return self.weights[1]

    def _begin(self, parameters: dict[str, Tensor]) -> StepRecord:
        return StepRecord(
            step=self.steps,
            names=self.names,
            usual_norms=self.usual_norms,
            rates=rates_of(self.optimizer),
            weights_before=self._weight_norms(parameters, self.sample.before, self.steps == 0),
            closure=self.closure,
            scaled=getattr(self.optimizer, "found_inf", None) is not None
            or getattr(self.optimizer, "loss_scale", None) == "dynamic",
            loss_scale=_loss_scale(),
        )

    def _state_was_reset(self) -> bool:
        """Whether the optimizer's state was loaded or emptied since the last look: weights are meant to be reset."""
        before, self.resets = self.resets, self.loads + self.every_step.state_lost
        return self.resets > before

    @eager
    def _after(self, *_: Any) -> None:
        self.depth -= self.depth > 0
        if self.depth or self.rivals.inside is not self.optimizer:
            return
        self.rivals.inside = None
        self.every_step.after(self.closure)
        if self.passes.passes:
            self.passes.restart()
        if self.current is not None:
            began = thread_time()
            self._finish(self.current)
            self.cost_s += self.gradients.cost_s
            self.schedule.finish_look(self.steps - 1, self.cost_s + thread_time() - began)
            self.cost_s = self.gradients.cost_s = 0.0
            self._hook_gradients()
            self.gradients.forget()
            self.gradients.counts_passes = False
            return
        if self.outside.light is not None:
            self.outside.finish_light()
            self._note_others()
        if self.every_step.steps >= self.schedule.next:
            self._hook_gradients()

    def _note_others(self) -> None:
        """What others have done so far: more, at the start of the next step, was done in between."""
        self.rival_steps, self.loads_before = self.rivals.steps_on(self.optimizer, self.every_step.ids), self.loads

    @torch.no_grad()
    def _finish(self, record: StepRecord) -> None:
        parameters = self.found
        record.uncleared = self.gradients.take_stale()
        if record.closure:
            self.gradients.fill(record, parameters, self.sample)
        record.moved, record.update_ratio = self.sample.finish(parameters)
        due = self.steps <= DENSE or self.schedule.looks % READ_EVERY == 0
        record.weights_after = self._weight_norms(parameters, self.sample.after, due)
        record.sizes = list(self.samples.sizes)
        if self.steps < DENSE:
            as_left = self.gradients.are_as_left(parameters)
            record.grad_after_step = record.grad_at_step if as_left else grad_norms(record, parameters)
            self.gradients.probe_stale(parameters)
        self.records = [*self.records[:DENSE], *self.records[DENSE:][-KEPT:], record]
        self.current = None
        self.outside.wait(self.sample, list(parameters.values()))
        self._note_others()


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def rates_of(optimizer: Optimizer) -> list[float | Tensor]:
    """Learning rates of the groups, as they are now."""
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


def has_closure(*args: Any) -> bool:
    """Whether a step is given a function that computes the loss."""
    return any(callable(each) and not isinstance(each, Optimizer) for each in args)


def _loss_scale() -> float | Tensor | None:
    """The scale of the torch.amp.GradScaler that calls the optimizer's step; None where none does."""
    frame = sys._getframe(1)
    for _ in range(12):
        frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code is GradScaler.step.__code__:
            scale = getattr(frame.f_locals["self"], "_scale", None)  # a scaler that is switched off has none
            return scale.clone() if isinstance(scale, Tensor) else scale
    return None
