"""Hooks on the model's forward passes: in which mode they run, from where, which of them a backward pass reaches, and
which tensors their outputs depend on.

The first passes are looked at, then those of one step in `every`; hooks on the parts of a model go after the first
training passes. Nothing is read from the device, and no pass is added. Within a compiled function hooks do nothing.

Legend: R rows, a few scenes of a batch; F numbers, a few of each.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim import Optimizer

from ris_fast.health.watch.any_step import listen, stop_listening
from ris_fast.health.watch.call_site import call_site
from ris_fast.health.watch.copies import CopyRecord, copies_of
from ris_fast.health.watch.draws import has_moved, own_dropouts, random_state
from ris_fast.health.watch.eager import eager_hook, takes_hooks
from ris_fast.health.watch.fingerprints import fingerprint_of
from ris_fast.health.watch.functions import FunctionChecks
from ris_fast.health.watch.graph import GraphLeaves, comes_of_parameters_only, modules_of
from ris_fast.health.watch.guard import guarded
from ris_fast.health.watch.hooks import OptimizerHooks, plain_name
from ris_fast.health.watch.layers import Layers
from ris_fast.health.watch.modules import modules_record, uniform_matrices
from ris_fast.health.watch.parts import PartCalls
from ris_fast.health.watch.records import ForwardRecord, PassRecord
from ris_fast.health.watch.samples import held_tensors
from ris_fast.health.watch.tensors import (
    KEY_NUMBERS,
    KEYS,
    few_rows,
    is_plain,
    nonfinite,
    rows_with_gradient,
    source_of,
    tensors_of,
)
from ris_fast.health.watch.writes import InputWrites

FIRST, LONGEST = 32, 4096  # training passes that are all looked at; where most of them reach no backward
WALKED, PARTS = 6, 4  # training passes whose graph is walked, and in which the hooks on parts stay
MARKED = 12  # training passes whose gradient at the output is compared with those of mistakes
READ, PAIR_EVERY = 24, 8  # training passes whose outputs are read, and how often two in a row are after those
ROWS_EVERY = 4  # passes after those, of which one is searched for rows without a gradient
LATE, WITH_STEP = 64, 32  # training passes that are looked at after the first: now and then, and with a step
ROUND, OTHERS = 8, 128  # passes of another kind between two steps that are looked at, and in all
INPUTS = 4  # of several, that are looked at
EVALUATIONS, CALLS = 32, 4096  # whose random numbers are looked at; of parts within a pass
is_compiling, is_tracing, peek_interpreter_stack, current_graph_task = (
    torch.compiler.is_compiling,
    torch._C._is_tracing,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._current_graph_task_id,
)
TRAINING = True, True  # in training mode, with gradients enabled


class CopiedHook:
    """A hook that does nothing within a compiled function, and nothing of ours in a copy of the model, pickled or not.

    What is called for a copy takes any arguments and returns None.
    """

    def __init__(self, call: Any, again: Any = None) -> None:
        """`call`: a method; `again`: the one of the same object that is called instead where a backward pass computes a
        part once more."""
        self.owner, self.function = weakref.ref(call.__self__), call.__func__
        self.again = again.__func__ if again is not None else None

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if is_compiling() or is_tracing() or peek_interpreter_stack():
            return
        function = self.function if current_graph_task() == -1 else self.again
        if function is not None and (owner := self.owner()) is not None:
            guarded(function, owner, module, *given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class ForwardHooks:
    """Hooks on a model and, at first, on its parts; and on any optimizer's step, to know who trains which tensor."""

    def __init__(self, model: nn.Module, by_optimizer: Sequence[OptimizerHooks], every: int) -> None:
        self.model, self.by_optimizer, self.every = model, by_optimizer, every
        self.passes: list[PassRecord] = []
        self.first = FIRST
        self.count = self.late = self.with_step = self.foreign_steps = self.marked = 0
        # By mode and whether gradients are enabled: passes, those looked at, and the step and passes since it.
        self.made: Counter[tuple[bool, bool]] = Counter()
        self.looked: Counter[tuple[bool, bool]] = Counter()
        self.rounds: dict[tuple[bool, bool], tuple[int, int]] = {}
        self.leaves = GraphLeaves(model)
        self.called: set[int] = set()  # ids of parts
        self.watched = {id(each.optimizer) for each in by_optimizer}
        self.foreign: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()  # of another model
        self.modal = [part for part in model.modules() if is_modal(part)]
        self.was_training = model.training
        self.last_input: weakref.ref[Tensor] | None = None
        self.names = {id(part): plain_name(path.removesuffix(".")) for path, part in modules_of(model)}
        self.inside: list[tuple[str, int]] = []  # layers of the pass that runs, and the rows that they are given
        self.rows_inside: list[tuple[int, int, list[tuple[str, int]]]] = []
        self.part_calls, self.writes = PartCalls(), InputWrites()
        self.state_places: set[int] = set()  # where further outputs of the last pass lie
        self.layers, self.functions = Layers(), FunctionChecks()
        self.last_outputs: list[Tensor] = []  # of the last pass in training, until the step
        self.uniform = uniform_matrices(model)
        self.sequences: list[tuple[tuple[int, ...], tuple[int, ...], list[tuple[str, int, int]]]] = []
        self.drawn: list[bool] = []  # whether an evaluation drew random numbers
        self.random: list[Any] = []
        self.whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the model and what compiles it
        self.hooks: list[Any] = []
        self.searched = False
        self.copies: list[CopyRecord] = []  # at the first step, where no pass was heard before it
        self._hook_whole(model)
        listen(self)
        of_part = CopiedHook(self._part, self._part_again)
        parts = (
            [] if _compiled(model) else [part for part in model.modules() if part is not model and takes_hooks(part)]
        )
        self.part_hooks = [part.register_forward_hook(of_part) for part in parts]

    def _hook_whole(self, module: nn.Module) -> None:
        if not takes_hooks(module):
            return
        self.whole.add(module)
        self.hooks += [
            module.register_forward_pre_hook(CopiedHook(self._before), with_kwargs=True),
            module.register_forward_hook(CopiedHook(self._after), with_kwargs=True),
        ]

    def _hook_wrappers(self) -> None:
        """Where no pass was heard before the first step: what `torch.compile` has made of the model is called in its
        place."""
        self.searched = True
        if (dynamo := sys.modules.get("torch._dynamo.eval_frame")) is not None:
            for each in gc.get_objects():
                if type(each) is dynamo.OptimizedModule and each._orig_mod is self.model:
                    self._hook_whole(each)
        if not self.layers.count:
            self.copies = copies_of(self.model)

    @property
    def steps(self) -> int:
        """Of all watched optimizers together."""
        return sum(each.steps for each in self.by_optimizer)

    def close(self) -> None:
        """Takes every hook away."""
        for hook in (*self.hooks, *self.part_hooks):
            hook.remove()
        self.hooks, self.part_hooks = [], []
        stop_listening(self)

    def record(self) -> ForwardRecord:
        """All that was seen. Reads the device."""
        return ForwardRecord(
            passes=[each.on_host() for each in self.passes],
            first=self.first,
            made=self.made[TRAINING],
            steps=self.steps,
            together=len({each.steps for each in self.by_optimizer}) == 1,
            leaves=self.leaves.records(),
            walked=self.leaves.walked,
            outside_graph=self.leaves.outside(self.called),
            unsettled=self._unsettled(),
            spectral=self._spectral(),
            rows_inside=self.rows_inside,
            sequences=self.sequences,
            formats=self.part_calls.by_format(),
            passes_heard=self.count,
            written=self.writes.record(),
            drawn=self.drawn,
            own_dropouts=own_dropouts(self.model) if all(self.drawn) and self.drawn else [],
            shapes=self.leaves.shapes,
            layers=self.layers.record(),
            functions=self.functions.found,
            modules=modules_record(self.model, self.called),
            foreign_steps=self.foreign_steps,
            copies=self.copies,
            uniform=[name for name, flag in self.uniform.items() if bool(flag)],
            of_losses=self.leaves.loss_records(),
            beside_first=self.leaves.beside_first(),
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model and module not in self.whole:
            return
        self.was_training = module.training
        if self.inside or self.part_calls.sequences:
            self.inside, self.part_calls.sequences = [], []
        self.layers.begin()
        if self.part_hooks and self.leaves.functions and module.training and torch.is_grad_enabled():
            self.functions.begin(self.leaves.functions)
        if not self.was_training:
            self.random = random_state() if self._is_evaluation() and len(self.drawn) < EVALUATIONS else []
        if self.writes.listens:
            self.writes.begin(args, kwargs)

    def _is_evaluation(self) -> bool:
        return not self.was_training and not torch.is_grad_enabled()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not self.model and module not in self.whole:
            return
        self.count += 1
        if self.writes.input is not None:
            self.writes.finish()
        if self.functions.wrapped:
            self.functions.finish()
        if not self.was_training and self.random and self._is_evaluation():
            self.drawn.append(has_moved(self.random, random_state()))
        if self.was_training and torch.is_grad_enabled() and any(e.schedule.due(e.steps) for e in self.by_optimizer):
            self.last_outputs = [each for each in tensors_of(output)[:4] if each.requires_grad]
        kind = self.was_training, torch.is_grad_enabled()
        self.made[kind] += 1
        if self._due(kind):
            self.looked[kind] += 1
            with torch.no_grad():
                self._look(tensors_of((args, kwargs) if kwargs else args), tensors_of(output), kind[1])

    def _due(self, kind: tuple[bool, bool]) -> bool:
        """Whether a pass is looked at: the first in training, then those of some steps; of others some between two
        steps."""
        made = self.made[kind]
        if kind == TRAINING:
            if self.late > LATE or compiles_backward():  # which would compile anew for each pass's hooks
                return False
            if made == FIRST and 2 * sum(not each.reached for each in self.passes) > len(self.passes):
                self.first = LONGEST
            if made <= self.first:
                return True
            regular = self.late < LATE and not max(each.steps for each in self.by_optimizer) % self.every
            early = self.with_step < WITH_STEP and any(each.schedule.due(each.steps) for each in self.by_optimizer)
            self.late, self.with_step = self.late + (regular or early), self.with_step + early
            return regular or early
        step, since = self.rounds.get(kind, (-1, 0))
        self.rounds[kind] = self.steps, since + 1 if step == self.steps else 1
        return self.rounds[kind][1] <= ROUND and self.looked[kind] < OTHERS

    def _look(self, inputs: list[Tensor], outputs: list[Tensor], grad: bool) -> None:
        """One pass. `grad`: whether gradients were enabled in it."""
        site, place = call_site(sys._getframe(2))
        last, self.last_input = self.last_input and self.last_input(), weakref.ref(inputs[0]) if inputs else None
        now = PassRecord(
            number=self.count,
            of_kind=self.made[self.was_training, grad],
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
            given_again=last is not None and last is inputs[0] if inputs else False,
        )
        now.source = source_of(inputs)
        places = {each.data_ptr() for each in outputs[1:] if is_plain(each) and each.numel()}
        now.carried = any(is_plain(each) and each.data_ptr() in self.state_places for each in inputs[1:])
        now.open_before = bool(self.passes) and self.passes[-1].grad and not self.passes[-1].reached
        self.state_places = places
        now.thread = threading.get_ident()
        self.passes.append(now)
        if now.grad:
            self._follow(now, inputs, outputs)
        first = len(self.passes) <= FIRST
        if now.training and first:
            now.draws = hash(torch.get_rng_state().numpy().tobytes())
        if first or not now.grad or self.late:
            now.input, now.keys = few_rows(inputs), few_rows(inputs, KEYS, KEY_NUMBERS)
            now.others = [few_rows([each]) for each in inputs[:INPUTS]] if 1 < len(inputs) else []
        if not now.grad or self.late or (first and _reads_outputs(now.of_kind)):
            now.output = few_rows(outputs)
            now.nonfinite_out = nonfinite(outputs)
            if now.nonfinite_out is not None and (now.nonfinite_out.device.type != "cpu" or now.nonfinite_out.any()):
                now.nonfinite_in = nonfinite(inputs)

    def _follow(self, now: PassRecord, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Whether a backward pass reaches the outputs, and what they depend on."""
        with_grad = [each for each in outputs if each.requires_grad and each.grad_fn is not None]
        rows, mark = now.shape[0] if now.shape else 0, None
        reads_rows = now.of_kind <= MARKED or now.of_kind % ROWS_EVERY == 0
        if with_grad and self.marked < MARKED:
            self.marked, mark = self.marked + 1, fingerprint_of(with_grad[0])

        def first(grad: Tensor) -> None:
            if not now.reached and reads_rows and now.of_kind <= FIRST:
                now.rows = rows_with_gradient(grad, rows)
                now.grad_finite = grad.detach().isfinite().all() if is_plain(grad) else None
            if now.output is not None and with_grad[0] is outputs[0] and is_plain(grad):
                now.slope = few_rows([grad])
            if mark is not None and (found := mark(grad)) is not None:
                now.mark_kind, now.mark = found
            now.reached = True

        def another(_: Tensor) -> None:
            now.reached = True

        for number, each in enumerate(with_grad):
            each.register_hook(eager_hook(another if number else first))
        if self.leaves.walked < WALKED or (self.late and self.leaves.walked < 2 * WALKED):
            now.nodes = self.leaves.walk(inputs, outputs, self.steps)
            if self.inside and now.output_shape:
                self.rows_inside.append((rows, now.output_shape[0], self.inside))
            if self.part_calls.sequences:
                self.sequences.append((now.shape, now.output_shape, self.part_calls.sequences))
        if self.leaves.walked >= PARTS and len(self.whole) == 1:  # else they are within a graph, which is made anew
            self._unhook_parts()

    def _unhook_parts(self) -> None:
        for hook in self.part_hooks:
            hook.remove()
        self.part_hooks = []
        self.layers.begin()

    def _part(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.called.add(id(module))
        name = self.names.get(id(module), "?")
        self.layers.note(name, module, args, output, self.steps, module.training and torch.is_grad_enabled())
        if args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            self.part_calls.note(name, module, args[0], output)
            if not module._modules and len(self.inside) < CALLS and not self._of_parameters_only(args[0]):
                self.inside.append((name, args[0].shape[0]))

    def _of_parameters_only(self, given: Tensor) -> bool:
        """Whether what a part is given has other rows than the part before it, and is made of parameters, as learned
        tokens and the weights that a parametrization makes."""
        if self.inside and self.inside[-1][1] == given.shape[0]:
            return False
        own = self.leaves.own_parameters()
        return id(given) in own or (given.grad_fn is not None and comes_of_parameters_only(given.grad_fn, own.keys()))

    def _part_again(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.layers.note_again(self.names.get(id(module), "?"), args, output)

    def outputs(self) -> tuple[int, list[Tensor]]:
        """The number of the last pass, and those of its outputs with a gradient."""
        return self.count, self.last_outputs

    def _unsettled(self) -> list[str]:
        """Reads the device."""
        return [
            plain_name(path.removesuffix("."))
            for path, part in modules_of(self.model)
            if isinstance(part, nn.modules.batchnorm._NormBase) and not part.training and id(part) in self.called
            if part.weight is None or part.weight.requires_grad  # else a backbone that is kept as it is
            if part.running_mean is not None and not part.running_mean.any() and bool((part.running_var == 1).all())
        ]

    def _spectral(self) -> list[str]:
        """The old kind: that of `nn.utils.parametrizations` settles when it is made."""
        return [
            plain_name(path.removesuffix("."))
            for path, part in modules_of(self.model)
            if any(isinstance(hook, SpectralNorm) for hook in part._forward_pre_hooks.values())
        ]

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer: one that holds tensors of other models is foreign."""
        if not self.count and not self.searched:
            self._hook_wrappers()
        if id(optimizer) in self.watched:
            self.last_outputs = []
            if self.part_hooks and not self.count:
                self.layers.begin()
            if self.part_hooks and not self.count and len(self.whole) == 1 and self.steps >= 2 * PARTS:
                self._unhook_parts()  # something else calls the parts
            return
        if optimizer not in self.foreign:
            own = self.leaves.own_parameters()
            self.foreign[optimizer] = any(id(p) not in own for p in held_tensors(optimizer))
        self.foreign_steps += self.foreign[optimizer]


def _reads_outputs(number: int) -> bool:
    """Whether the outputs of a training pass are read: of the first, then of two in a row now and then."""
    return number <= READ or number % PAIR_EVERY < 2


def compiles_backward() -> bool:
    """Whether backward passes are compiled now, by torch's compiled autograd."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled is not None and bool(compiled.compiled_autograd_enabled)


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
