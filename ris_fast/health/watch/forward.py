"""Hooks on the model's forward passes: in which mode they run, from where, which of them a backward pass reaches, and
which tensors their outputs depend on.

The first passes are looked at, then those of one step in `every`; hooks on the parts of a model go after the first
training passes. Nothing is read from the device, and no pass is added. Within a compiled function hooks do nothing.

Legend: R rows, a few scenes of a batch; F numbers, a few of each.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ris_fast.health.watch.call_site import call_site
from ris_fast.health.watch.graph import GraphLeaves
from ris_fast.health.watch.hooks import OptimizerHooks
from ris_fast.health.watch.records import ForwardRecord, PassRecord
from ris_fast.health.watch.samples import held_tensors
from ris_fast.health.watch.tensors import few_rows, has_nan, rows_with_gradient, tensors_of

FIRST, LONGEST = 256, 4096  # passes that are all looked at; where most of them reach no backward
NUMBERS = 48  # passes in training, and as many in evaluation, of which a few numbers are kept
WALKED = 12  # training passes whose graph is walked
PARTS = 4  # training passes in which the hooks on parts stay
LATE = 64  # passes that are looked at after the first


class _Hook:
    """A hook that does nothing within a compiled function, and nothing of ours in a copy of the model, pickled or not.

    What is called for a copy takes any arguments and returns None.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self.call: Any = weakref.WeakMethod(call)

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack():
            return
        if torch._C._current_graph_task_id() == -1 and (call := self.call()) is not None:  # no recomputation
            call(module, *given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class ForwardHooks:
    """Hooks on a model and, at first, on its parts; and on any optimizer's step, to know who trains which tensor."""

    def __init__(self, model: nn.Module, by_optimizer: Sequence[OptimizerHooks], every: int) -> None:
        self.model, self.by_optimizer, self.every = model, by_optimizer, every
        self.passes: list[PassRecord] = []
        self.first = FIRST
        self.count = self.late = self.foreign_steps = 0
        self.kept: Counter[tuple[bool, bool]] = Counter()  # passes with numbers, by mode and whether with gradients
        self.leaves = GraphLeaves(model)
        self.called: dict[int, bool] = {}  # by id of a part: whether gradients were enabled in a call of it
        self.optimizers: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()  # whether foreign
        self.modal = [part for part in model.modules() if is_modal(part)]
        self.was_training = model.training
        before, after = _Hook(self._before), _Hook(self._after)
        self.hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
            register_optimizer_step_post_hook(_StepHook(self)),
        ]
        of_part = _Hook(self._part)
        parts = [] if _compiled(model) else [part for part in model.modules() if part is not model]
        self.part_hooks = [part.register_forward_hook(of_part) for part in parts]

    @property
    def steps(self) -> int:
        """Of all watched optimizers together."""
        return sum(each.steps for each in self.by_optimizer)

    def close(self) -> None:
        """Takes every hook away."""
        for hook in (*self.hooks, *self.part_hooks):
            hook.remove()
        self.hooks, self.part_hooks = [], []

    def record(self) -> ForwardRecord:
        """All that was seen. Reads the device."""
        return ForwardRecord(
            passes=[each.on_host() for each in self.passes],
            first=self.first,
            made=self.count,
            steps=self.steps,
            together=len({each.steps for each in self.by_optimizer}) == 1,
            leaves=self.leaves.records(),
            walked=self.leaves.walked,
            outside_graph=self.leaves.outside(self.called),
        )

    def _before(self, module: nn.Module, *_: Any) -> None:
        if module is self.model:
            self.was_training = module.training

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not self.model:
            return
        self.count += 1
        if self.count == FIRST and 2 * sum(not each.reached for each in self.passes) > FIRST:
            self.first = LONGEST
        if self.count > self.first:
            if self.late >= LATE or max(each.steps for each in self.by_optimizer) % self.every:
                return
            self.late += 1
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            self._look(tensors_of((args, kwargs)), tensors_of(output), grad)

    def _look(self, inputs: list[Tensor], outputs: list[Tensor], grad: bool) -> None:
        """One pass. `grad`: whether gradients were enabled in it."""
        site, place = call_site(sys._getframe(2))
        now = PassRecord(
            number=self.count,
            step=self.steps,
            foreign_steps=self.foreign_steps,
            site=site,
            place=place,
            training=self.was_training,
            training_after=self.model.training,
            grad=grad and any(each.requires_grad for each in outputs),
            parts_training=sum(part.training for part in self.modal),
            parts=len(self.modal),
            shape=tuple(inputs[0].shape) if inputs else (),
            output_shape=tuple(outputs[0].shape) if outputs else (),
            inputs=len(inputs),
        )
        self.passes.append(now)
        if now.grad:
            self._follow(now, inputs, outputs)
        if self.kept[now.training, now.grad] < NUMBERS or self.count > self.first:
            self.kept[now.training, now.grad] += 1
            now.input, now.output = few_rows(inputs), few_rows(outputs)
            now.nan_in, now.nan_out = has_nan(inputs), has_nan(outputs)

    def _follow(self, now: PassRecord, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Whether a backward pass reaches the outputs, and what they depend on."""
        rows = now.shape[0] if now.shape else 0

        def reached(grad: Tensor) -> None:
            if not now.reached and now.number <= NUMBERS:
                now.rows = rows_with_gradient(grad, rows)
            now.reached = True

        for each in outputs:
            if each.requires_grad and each.grad_fn is not None:
                each.register_hook(reached)
        if self.leaves.walked < WALKED or self.count > self.first:
            now.nodes = self.leaves.walk(inputs, outputs, self.steps)
        if self.leaves.walked >= PARTS and self.part_hooks:
            for hook in self.part_hooks:
                hook.remove()
            self.part_hooks = []

    def _part(self, module: nn.Module, *_: Any) -> None:
        self.called[id(module)] = self.called.get(id(module), False) or torch.is_grad_enabled()

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer: one that holds tensors of other models is foreign."""
        if optimizer not in self.optimizers:
            own, watched = self.leaves.own_parameters().keys(), [each.optimizer for each in self.by_optimizer]
            others = any(id(p) not in own for p in held_tensors(optimizer))
            self.optimizers[optimizer] = others and all(optimizer is not each for each in watched)
        self.foreign_steps += self.optimizers[optimizer]


class _StepHook:
    """After a step of any optimizer; nothing once the watch is gone."""

    def __init__(self, forward: ForwardHooks) -> None:
        self.forward = weakref.ref(forward)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling() and (forward := self.forward()) is not None:
            forward.stepped(optimizer)


def is_modal(part: nn.Module) -> bool:
    """Whether a module does something else in training than in evaluation."""
    dropout = getattr(part, "p" if isinstance(part, nn.modules.dropout._DropoutNd) else "dropout", None)
    running = isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats
    return running or (isinstance(dropout, float) and dropout > 0)


def _compiled(model: nn.Module) -> bool:
    """Whether it has a compiled part, which would be compiled again when hooks come or go."""
    optimized = sys.modules.get("torch._dynamo.eval_frame")
    return any(
        part._compiled_call_impl is not None or (optimized and isinstance(part, optimized.OptimizedModule))
        for part in model.modules()
    )
