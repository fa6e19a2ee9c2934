"""Hooks on the model's forward passes: in which mode they run, from where, which of them a backward pass reaches, and
which tensors their outputs depend on.

The first passes are looked at, then those of one step in `every`; hooks on the parts of a model go after the first
training passes. Nothing is read from the device, and no pass is added. Within a compiled function hooks do nothing.

Legend: R rows, a few scenes of a batch; F numbers, a few of each.
"""

from __future__ import annotations

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

from ris_fast.health.functions import FunctionChecks
from ris_fast.health.watch.call_site import call_site
from ris_fast.health.watch.copied_hook import CopiedHook
from ris_fast.health.watch.copies import CopyRecord, copies_of
from ris_fast.health.watch.draws import has_moved, own_dropouts, random_state
from ris_fast.health.watch.eager import eager_hook, takes_hooks
from ris_fast.health.watch.fingerprints import fingerprint_of
from ris_fast.health.watch.graph import GraphLeaves, modules_of
from ris_fast.health.watch.hooks import OptimizerHooks, plain_name
from ris_fast.health.watch.modules import modules_record
from ris_fast.health.watch.parts import PartHooks
from ris_fast.health.watch.pass_records import ForwardRecord, PassRecord
from ris_fast.health.watch.samples import held_tensors
from ris_fast.health.watch.tensors import (
    KEY_NUMBERS,
    KEYS,
    NEITHER,
    few_rows,
    from_transposes,
    is_plain,
    largest_in_rows,
    likeness,
    nonfinite,
    paired_rows,
    plane_of,
    source_of,
    tensors_of,
    viewed_as,
)
from ris_fast.health.watch.units import Units
from ris_fast.health.watch.writes import InputWrites

FIRST, LONGEST = 32, 4096  # training passes that are all looked at; where most of them reach no backward
WALKED, PARTS = 6, 4  # training passes whose graph is walked, and in which the hooks on parts stay
MARKED = 12  # training passes whose gradient at the output is compared with those of mistakes
READ, PAIR_EVERY = 24, 8  # training passes whose outputs are read, and how often two in a row are after those
ROWS_EVERY = 4  # passes after those, of which one is searched for rows without a gradient
LATE, WITH_STEP = 64, 32  # training passes that are looked at after the first: now and then, and with a step
ROUND, OTHERS = 8, 128  # passes of another kind between two steps that are looked at, and in all
INPUTS = 4  # of several, that are looked at
EVALUATIONS = 32  # whose random numbers are looked at
CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # that nobody calls
TRAINING = True, True  # in training mode, with gradients enabled


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
        self.watched = {id(each.optimizer) for each in by_optimizer}
        self.foreign: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()  # of another model
        self.was_training = model.training
        self.last_input: weakref.ref[Tensor] | None = None
        self.parts = PartHooks(model, self.leaves, by_optimizer)
        self.functions, self.writes = FunctionChecks(), InputWrites()
        self.state_places: set[int] = set()  # where further outputs of the last pass lie
        self.last_outputs: list[Tensor] = []  # of the last pass in training, until the step
        self.units = Units(model)
        self.drawn: list[bool] = []  # whether an evaluation drew random numbers
        self.random: list[Any] = []
        # The model and what compiles it, or parts that are called in its place: those parts whose mode matters.
        self.whole: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()
        self.hooks: list[Any] = []
        self.after_hooks: list[Any] = []
        self.searched = False
        self.settled = False  # before a step that is not looked at, training passes are only counted, without `_after`
        self.copies: list[CopyRecord] = []  # at the first step, where no pass was heard before it
        self.compiled = False  # something that compiles the model is hooked
        self._hook_whole(model)
        for part in model.children() if type(model) in CONTAINERS else ():  # which are called in its place
            self._hook_whole(part)

    def _hook_whole(self, module: nn.Module) -> None:
        if not takes_hooks(module):
            return
        self.whole[module] = [part for part in module.modules() if is_modal(part)]
        self.hooks += [module.register_forward_pre_hook(CopiedHook(self._before), with_kwargs=True)]
        self._hook_after(module)

    def _hook_after(self, module: nn.Module) -> None:
        self.after_hooks.append(module.register_forward_hook(CopiedHook(self._after), with_kwargs=True))

    def _unhook_after(self) -> None:
        for hook in self.after_hooks:
            hook.remove()
        self.after_hooks = []

    def _hook_wrappers(self) -> None:
        """Where no pass was heard before the first step: what `torch.compile` has made of the model is called in its
        place."""
        self.searched = True
        if (dynamo := sys.modules.get("torch._dynamo.eval_frame")) is not None:
            for each in gc.get_objects():
                if type(each) is dynamo.OptimizedModule and each._orig_mod is self.model:
                    self.compiled = True
                    self._hook_whole(each)
        if not self.parts.layers.count:
            self.copies = copies_of(self.model)

    @property
    def steps(self) -> int:
        """Of all watched optimizers together."""
        return sum(each.steps for each in self.by_optimizer)

    def close(self) -> None:
        """Takes every hook away."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self._unhook_after()
        self.parts.unhook()

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
            outside_graph=self.leaves.outside(self.parts.called),
            unsettled=self._unsettled(),
            spectral=self._spectral(),
            rows_inside=self.parts.rows_inside,
            sequences=self.parts.sequences,
            formats=self.parts.calls.by_format(),
            passes_heard=self.count,
            written=self.writes.record(),
            drawn=self.drawn,
            own_dropouts=own_dropouts(self.model) if all(self.drawn) and self.drawn else [],
            shapes=self.leaves.shapes,
            made_float16=self.leaves.made_float16,
            layers=self.parts.layers.record(),
            functions=self.functions.found,
            modules=modules_record(self.model, self.parts.called),
            foreign_steps=self.foreign_steps,
            copies=self.copies,
            units=self.units.record(),
            of_losses=self.leaves.loss_records(),
            beside_first=self.leaves.beside_first(),
            in_parts=type(self.model) in CONTAINERS,
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self.whole:
            return
        self.was_training = module.training
        if self.settled:
            if self.was_training and torch.is_grad_enabled() and not self._before_a_look():
                if self.after_hooks:  # which a pass that raised an error has left
                    self._unhook_after()
                self._count(TRAINING)
                return
            if not self.after_hooks:
                self._hook_after(module)
        self.parts.begin()
        if self.parts.hooks and self.leaves.functions and module.training and torch.is_grad_enabled():
            self.functions.begin(self.leaves.functions)
        if not self.was_training:
            self.random = random_state() if self._is_evaluation() and len(self.drawn) < EVALUATIONS else []
        if self.writes.listens:
            self.writes.begin(args, kwargs)

    def _is_evaluation(self) -> bool:
        return not self.was_training and not torch.is_grad_enabled()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module not in self.whole:
            return
        kind = self.was_training, torch.is_grad_enabled()
        self._count(kind)
        if self.writes.input is not None:
            self.writes.finish()
        if self.functions.wrapped:
            self.functions.finish()
        if not self.was_training and self.random and self._is_evaluation():
            self.drawn.append(has_moved(self.random, random_state()))
        if kind == TRAINING and any(each.schedule.due(each.steps) for each in self.by_optimizer):
            self.last_outputs = [each for each in tensors_of(output)[:4] if each.requires_grad]
        if self._due(kind):
            self.looked[kind] += 1
            with torch.no_grad():
                self._look(module, tensors_of((args, kwargs) if kwargs else args), tensors_of(output), kind[1])
        if kind == TRAINING and not self.compiled:  # else the hooks are part of what is compiled
            self.settled = self.made[kind] > self.first and not (self.parts.hooks or self.writes.listens)
        if self.settled:
            self._unhook_after()

    def _count(self, kind: tuple[bool, bool]) -> None:
        self.count += 1
        self.made[kind] += 1

    def _before_a_look(self) -> bool:
        """Whether some optimizer's next step is looked at, or is one in `every`."""
        for each in self.by_optimizer:
            steps = each.every_step.steps
            if steps >= each.schedule.next or not steps % self.every:
                return True
        return False

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

    def _look(self, module: nn.Module, inputs: list[Tensor], outputs: list[Tensor], grad: bool) -> None:
        """One pass. `grad`: whether gradients were enabled in it."""
        site, place = call_site(sys._getframe(2))
        last, self.last_input = self.last_input and self.last_input(), weakref.ref(inputs[0]) if inputs else None
        modal = self.whole[module]
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
            parts_training=sum(part.training for part in modal),
            parts=len(modal),
            shape=tuple(inputs[0].shape) if inputs else (),
            output_shape=tuple(outputs[0].shape) if outputs else (),
            inputs=len(inputs),
            given_again=last is not None and last is inputs[0] if inputs else False,
        )
        now.source, now.viewed = source_of(inputs), viewed_as(inputs)
        places = {each.data_ptr() for each in outputs[1:] if is_plain(each) and each.numel()}
        now.carried = any(is_plain(each) and each.data_ptr() in self.state_places for each in inputs[1:])
        now.carried |= self.parts.carried > 1 and now.training
        now.open_before = bool(self.passes) and self.passes[-1].grad and not self.passes[-1].reached
        self.state_places = places
        now.thread = threading.get_ident()
        self.passes.append(now)
        if now.grad:
            self._follow(now, inputs, outputs)
        first = len(self.passes) <= FIRST
        if now.training and now.grad:
            now.draws = hash(torch.get_rng_state().numpy().tobytes())
        if first or not now.grad or self.late:
            now.input, now.keys = few_rows(inputs), few_rows(inputs, KEYS, KEY_NUMBERS)
            now.matrices, now.plane = from_transposes(inputs), plane_of(inputs)
            if now.of_kind <= MARKED:
                now.likeness, now.pairs = likeness(inputs), paired_rows(inputs)
            now.others = [few_rows([each]) for each in inputs[:INPUTS]] if 1 < len(inputs) else []
        if not now.grad or self.late or (first and _reads_outputs(now.of_kind)):
            now.output = few_rows(outputs)
            now.nonfinite_out = nonfinite(outputs)
            if now.nonfinite_out is not None and now.nonfinite_out is not NEITHER:
                now.nonfinite_in = nonfinite(inputs)

    def _follow(self, now: PassRecord, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Whether a backward pass reaches the outputs, and what they depend on."""
        with_grad = [each for each in outputs if each.requires_grad and each.grad_fn is not None]
        rows, mark = now.shape[0] if now.shape else 0, None
        reads_rows = now.of_kind <= MARKED or now.of_kind % ROWS_EVERY == 0
        if with_grad and self.marked < MARKED:
            self.marked, mark = self.marked + 1, fingerprint_of(with_grad[0])
        # A hook that held the tensor that it is on would keep both: autograd's own part of that circle is not seen by
        # the garbage collector.
        first_has_grad = bool(with_grad) and with_grad[0] is outputs[0]

        def first(grad: Tensor) -> None:
            grad = grad.detach()  # with `create_graph=True` it has a history
            if not now.reached and reads_rows and now.of_kind <= FIRST:
                if (largest := largest_in_rows(grad, rows)) is not None:
                    now.rows, now.grad_finite = largest != 0, largest.isfinite().all()
                elif (flags := nonfinite([grad])) is not None:
                    now.grad_finite = ~flags.any()
            if now.output is not None and first_has_grad and is_plain(grad):
                slope = few_rows([grad])
                now.slope = slope if now.slope is None or slope is None else now.slope + slope  # of several backwards
            if mark is not None and (found := mark(grad)) is not None:
                now.mark_kind, now.mark = found
            now.reached = True

        def another(_: Tensor) -> None:
            now.reached = True

        for number, each in enumerate(with_grad):
            each.register_hook(eager_hook(another if number else first))
        if self.leaves.walked < WALKED or (self.late and self.leaves.walked < 2 * WALKED):
            now.nodes = self.leaves.walk(inputs, outputs, self.steps)
            self.parts.keep(now.shape, now.output_shape)
        if self.leaves.walked >= PARTS and not self.compiled:  # else they are within a graph, which is made anew
            self.parts.unhook()

    def outputs(self) -> tuple[int, list[Tensor]]:
        """The number of the last pass, and those of its outputs with a gradient."""
        return self.count, self.last_outputs

    def _unsettled(self) -> list[str]:
        """Reads the device."""
        return [
            plain_name(path.removesuffix("."))
            for path, part in modules_of(self.model)
            if isinstance(part, nn.modules.batchnorm._NormBase) and not part.training and id(part) in self.parts.called
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
            if self.settled:
                return
            if self.parts.hooks and not self.count:  # something else calls the parts
                self.parts.begin()
                if not self.compiled and self.steps >= 2 * PARTS:
                    self.parts.unhook()
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
