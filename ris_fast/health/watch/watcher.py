"""A watched loop: checked arguments, hooks on its optimizers, and the report on what they recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.finding import Finding, ranked
from ris_fast.health.names import check_beginnings
from ris_fast.health.watch.any_step import listen, stop_listening
from ris_fast.health.watch.backward import BackwardLosses
from ris_fast.health.watch.copies import ModelLoads
from ris_fast.health.watch.forward import ForwardHooks
from ris_fast.health.watch.guard import FAILURES, guarded, say_failure, warn
from ris_fast.health.watch.helpers import Helpers
from ris_fast.health.watch.hooks import OptimizerHooks, plain_name
from ris_fast.health.watch.loss import LossHook
from ris_fast.health.watch.ranks import DENSE, RankObserver
from ris_fast.health.watch.records import LoopRecord, StepRecord, TensorRecord
from ris_fast.health.watch.rivals import Rivals
from ris_fast.health.watch.rules import find_mistakes
from ris_fast.health.watch.samples import held_tensors
from ris_fast.health.watch.schedulers import Schedulers, loss_scales
from ris_fast.health.watch.start import Start, as_drawn


class Watcher:
    """Watches a model and its optimizers from outside; see `ris_fast.health.watch` for the arguments.

    Parameters may be frozen, freed, added and replaced on the way. With a closure, what happens to gradients between
    backward and the update is not seen. A torch.amp.GradScaler may skip steps and divide by powers of two.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        every: int,
        frozen: Sequence[str],
        stall_s: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"watch: model is {_shown(model)}. Give the torch.nn.Module that is trained, then its optimizer."
            )
        self.model, self.optimizers, self.frozen = model, list_optimizers(optimizer), list_beginnings(frozen)
        check_every(every, len(self.optimizers))
        check_stall(stall_s)
        check_beginnings(self.frozen, [name for name, _ in model.named_parameters()], "watch: frozen")
        self.left: list[Finding] | None = None  # of a watch that is closed
        self.steps_made = 0  # by it
        self.failures = len(FAILURES)
        self.last_report: tuple[int, list[Finding]] = -1, []  # steps made before it
        self.rivals = Rivals(self.optimizers, lambda: {id(p) for p in model.parameters()})
        self.hooks = [OptimizerHooks(model, each, every, self.rivals) for each in self.optimizers]
        self.start, self.loads, self.schedulers = (
            Start(model, self.optimizers),
            ModelLoads(model),
            Schedulers(self.optimizers),
        )
        self.forward = ForwardHooks(model, self.hooks, every)
        steps = lambda: (self.forward.steps, self.steps)  # noqa: E731
        self.losses = LossHook(self.forward.leaves, steps, lambda: self.forward.count, every)
        self.backwards = BackwardLosses(self.forward.leaves, steps, self.forward.outputs)
        for each in self.hooks:
            each.gradients.first_arrival = self.backwards.note
        self.helpers = Helpers(model, self.hooks)
        for each in self.hooks:
            each.helpers_like = self.helpers.like
        self.ranks = RankObserver(model, self.hooks, every, stall_s)
        listen(self)

    @property
    def steps(self) -> int:
        """Steps made, by the optimizer that has made most."""
        return self.steps_made if self.left is not None else max(hooks.steps for hooks in self.hooks)

    @property
    def records(self) -> list[StepRecord]:
        """Steps that were looked at, one optimizer after the other; none once it is closed."""
        return [] if self.left is not None else [record for hooks in self.hooks for record in hooks.records]

    def loss(self, value: Any, outputs: Any = None, targets: Any = None) -> Any:
        """Looks at a loss in training, on request; reads nothing from the device.

        Args: value: the tensor that `backward()` starts from; outputs, targets: what it was made of, as tensors or in
            tuples, dicts or other objects; the first tensor in each is looked at.
        Returns: value.
        """
        if self.left is None:
            guarded(self.losses.note, value, outputs, targets, self.model.training)
        return value

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer of the process."""
        self.rivals.stepped(optimizer)
        self.forward.stepped(optimizer)
        first = self.hooks[0]
        steps = first.every_step.steps
        if steps >= self.helpers.next and optimizer is first.optimizer:
            self.helpers.look(steps, sys._getframe(1))
        if optimizer is first.optimizer:
            self.forward.units.look(steps)
            self.schedulers.look(steps)
        if steps <= DENSE and not self.ranks.active:
            self.ranks.begin()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, pickled or not, watches nothing: it is closed, with what this one has left if it is closed too."""
        return _closed, (self.steps, self.left or [])

    def close(self) -> None:
        """Ends the watch: takes every hook away and lets go of model and optimizers. `report()` goes on to give what
        was seen. Reads the device."""
        if self.left is not None:
            return
        steps, (reported, left) = self.steps, self.last_report
        try:
            left = left if reported == steps else self.report()
        finally:
            self._take_hooks_away()
        vars(self).clear()
        self.left, self.steps_made = left, steps

    def _take_hooks_away(self) -> None:
        stop_listening(self)
        for hooks in self.hooks:
            hooks.close()
        self.forward.close()
        self.helpers.close()
        self.loads.close()
        self.ranks.close()

    def report(self, wait_s: float | None = None) -> list[Finding]:
        """Findings on the steps so far, most certain first. Reads the device. None after an error of the watch itself,
        which it says in a RuntimeWarning.

        Args: wait_s: with several ranks, seconds to wait for the others to report too; by default 5, and half a second
            once they have not come. Nothing else waits for them: a single rank may report.
        Raises: ValueError for what is no time.
        """
        check_wait(wait_s)
        if self.left is not None:
            return list(self.left)
        found: list[Finding] = []
        try:
            found = ranked([*find_mistakes(self._record(wait_s)), *self.ranks.clock.findings()])
        except Exception as error:
            say_failure(error)
        if len(FAILURES) > self.failures:
            found = []
            warn(FAILURES[self.failures])
        self.last_report = self.steps, list(found)
        return found

    def _record(self, wait_s: float | None = None) -> LoopRecord:
        parameters = {id(p): _record_of(p, plain_name(name)) for name, p in self.model.named_parameters()}
        others = {
            id(p): _record_of(p) for each in self.optimizers for p in held_tensors(each) if id(p) not in parameters
        }
        forward = self.forward.record()
        return LoopRecord(
            parameters=list(parameters.values()),
            optimizers=[hooks.record(parameters | others) for hooks in self.hooks],
            steps=self.steps,
            frozen=self.frozen,
            added={parameters[key] for key in parameters.keys() - self.start.ids},
            frozen_at_start={parameters[key] for key in self.start.frozen & parameters.keys()},
            masters={record for key, record in others.items() if key not in self.start.ids},
            moved_outside={parameters[id(p)] for p in self.model.parameters() if self.start.is_moved(p)},
            with_gradient={parameters[id(p)] for p in self.model.parameters() if p.grad is not None},
            rival_tensors={parameters[key] for each in self.rivals.rivals for key in each.shared & parameters.keys()},
            forward=forward,
            losses=[each.on_host() for each in self.losses.records],
            met=[each.on_host() for each in self.backwards.records],
            schedulers=self.schedulers.records(),
            kept=self.loads.record(),
            helpers=self.helpers.record(),
            aliases=dict(self.helpers.aliases),
            as_drawn=frozenset(parameters[key] for key in as_drawn(self.model) & self.start.frozen & parameters.keys()),
            scales=loss_scales(),
            ranks=self.ranks.record(forward.passes, wait_s),
        )


def _closed(steps: int, left: list[Finding]) -> Watcher:
    """A watch that has ended."""
    watcher = Watcher.__new__(Watcher)
    watcher.left, watcher.steps_made = left, steps
    return watcher


def _record_of(tensor: Tensor, name: str = "") -> TensorRecord:
    shape, size = ((), 0) if is_lazy(tensor) else (tuple(tensor.shape), tensor.numel())
    return TensorRecord(name, shape, size, tensor.dtype, tensor.requires_grad)


def list_optimizers(optimizer: Any) -> list[Optimizer]:
    """One, or all of them, each once, as a list; of a wrapper the one within. Raises: ValueError for anything else."""
    optimizers = [_innermost(each) for each in _all_of(optimizer, Optimizer)]
    wrong = [each for each in optimizers if not isinstance(each, Optimizer)]
    if wrong:
        within = "" if isinstance(optimizer, str) or wrong == [optimizer] else f", with {_shown(wrong[0])} in it"
        raise ValueError(
            f"watch: optimizer is {_shown(optimizer)}{within}. Give a torch.optim.Optimizer, or a list of them, e.g. "
            "watch(model, optimizer); of a wrapper that is none, the torch optimizer within it."
        )
    for each in optimizers:
        if not hasattr(each, "_optimizer_step_pre_hooks"):
            raise ValueError(
                f"watch: optimizer is a {type(each).__name__}, a wrapper that takes no hooks, since it was made without"
                " Optimizer.__init__. Give the torch optimizer within it, the one whose `step` it calls."
            )
    return list({id(each): each for each in optimizers}.values())


def _innermost(optimizer: Any) -> Any:
    """What a wrapper that was made without `Optimizer.__init__`, as accelerate's, has as its `optimizer`."""
    for _ in range(8):
        if not isinstance(optimizer, Optimizer) or hasattr(optimizer, "_optimizer_step_pre_hooks"):
            break
        if not isinstance(within := getattr(optimizer, "optimizer", None), Optimizer):
            break
        optimizer = within
    return optimizer


def check_every(every: Any, optimizers: int) -> None:
    """Raises: ValueError for no optimizer, and for what is no number of steps."""
    if isinstance(every, Optimizer):
        raise ValueError(
            "watch: several optimizers are given, one by one. Give them as one list, e.g. watch(model, [optimizer,"
            " other])."
        )
    if not optimizers or not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(
            f"watch: {optimizers} optimizers and every={_shown(every)}. Give at least one optimizer, and a whole number"
            " of steps from 1 on."
        )


def check_stall(stall_s: Any) -> None:
    """Raises: ValueError for what is no time."""
    if stall_s is not None and (not isinstance(stall_s, (int, float)) or isinstance(stall_s, bool) or not stall_s > 0):
        raise ValueError(
            f"watch: stall_s={_shown(stall_s)}. Give seconds above zero, or math.inf for no clock, e.g. stall_s=600."
        )


def check_wait(wait_s: Any) -> None:
    """Raises: ValueError for what is no time."""
    if wait_s is not None and (not isinstance(wait_s, (int, float)) or isinstance(wait_s, bool) or not wait_s >= 0):
        raise ValueError(f"report: wait_s={_shown(wait_s)}. Give seconds from 0 on, e.g. wait_s=0 for no wait.")


def list_beginnings(frozen: Any) -> tuple[str, ...]:
    """Beginnings of names. Raises: ValueError for anything but texts."""
    names = tuple(_all_of(frozen, str))
    if any(not isinstance(name, str) or not name for name in names):
        raise ValueError(
            f'watch: frozen={_shown(frozen)}. Give beginnings of parameters\' names, e.g. frozen=("encoder.",).'
        )
    return names


def _all_of(value: Any, kind: type) -> list[Any]:
    """What is in it; the value alone where it is of that kind or holds nothing."""
    try:
        return [value] if isinstance(value, kind) else list(value)
    except TypeError:
        return [value]


def _shown(value: Any) -> str:
    """Its repr where that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
