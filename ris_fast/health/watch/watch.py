"""Learning health in anyone's loop: `watch(model, optimizer)` for plain PyTorch, with `report()` on request.

Hooks run on a few steps only: on a tensor's gradient after it was accumulated, and around the optimizer's step; in the
others it is only noted which tensors are frozen and which have a gradient. They read nothing from the device until
`report()`, and are not part of a compiled model; a compiled `optimizer.step` is parted at them. What was trained in
steps that were not looked at shows in weights and moments that differ from those before the first step.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.names import check_beginnings
from ris_fast.health.watch.arguments import all_optimizers, beginnings, check_every, check_model
from ris_fast.health.watch.records import Origin, ParameterSample, StaleGradientProbe, few, has_norm, held, part, usual
from ris_fast.health.watch.rules import told
from ris_fast.training.telemetry.step_telemetry import norms

DENSE, EVERY, KEPT = 8, 100, 64


@dataclass
class StepRecord:
    """One optimizer step: names (T,) of its tensors, and norms (T,) float32 that stay where they are.

    sizes: what a layer's usual initial norm is, about; rates: learning rates of the groups; grad_after_backward: gradients after
        backward;
    grad_at_step: as the optimizer found them; before, after: weights. closure: gradients came within the step. scaled: a loss
    scaler takes care of gradients that are not finite. hooked: tensors with a hook on their gradient; none_grads: those
    without one.
    reset: (), whether the weights are bit for bit those of an earlier step, and were others in between;
    moved: (), norm of the update over that of the weights, where there was a gradient; of a few numbers of each tensor.
    uncleared: (), whether one gradient of the step before was added to; left: gradients after the step, of the first
        steps.
    no_grad: tensors whose gradient is None at the step.
    touched: (4,), of a few numbers of each gradient, as backward left it beside what the optimizer is grad_at_step: the
    cosine, the share of negative zeros, and the spread over the size of both. None where nothing was heard.
    """

    step: int
    names: list[str]
    sizes: list[float]
    rates: list[float | Tensor]
    before: Tensor
    closure: bool
    scaled: bool
    reset: Tensor | None = None
    grad_after_backward: Tensor | None = None
    grad_at_step: Tensor | None = None
    after: Tensor | None = None
    moved: Tensor | None = None
    uncleared: Tensor | None = None
    left: Tensor | None = None
    touched: Tensor | None = None
    no_grad: tuple[str, ...] = ()
    hooked: tuple[str, ...] = ()
    none_grads: tuple[str, ...] = ()

    def on_host(self) -> StepRecord:
        host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return StepRecord(**host | {"rates": [float(rate) for rate in self.rates]})


class OptimizerHooks:
    """Hooks around one optimizer's steps and on the gradients of the tensors that it holds."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self.records: list[StepRecord] = []
        self.arrived: dict[int, Tensor] = {}
        self.samples: dict[int, Tensor] = {}
        self.passes: Counter[int] = Counter()  # arrivals at each tensor, before the first step
        self.cleared: Counter[int] = Counter()  # those of them that found the gradient of the one before gone
        self.summed: dict[int, weakref.ref[Tensor]] = {}
        self.origin = Origin(optimizer)
        self.frozen: set[int] = set()  # at the last step
        self.fed: set[int] = set()  # those with a gradient at the last step
        self.listening: list[Tensor] = []
        self.hooks: list[Any] = []
        self.now: StepRecord | None = None
        self.few: ParameterSample | None = None
        self.left: StaleGradientProbe | None = None
        self.step_hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self.listen()

    def _due(self) -> bool:
        return self.steps < DENSE or self.steps % self.every == 0

    def own(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer holds now; without those that have no norm (lazy, meta,
        integers)."""
        ids = {id(p) for p in self.held()}
        return {
            name.replace("_orig_mod.", ""): p
            for name, p in self.model.named_parameters()
            if id(p) in ids and has_norm(p)
        }

    def held(self) -> list[Tensor]:
        """All tensors of the optimizer, the model's or not."""
        return held(self.optimizer)

    def listen(self) -> None:
        """Hooks on gradients for the next step, if it is one that is looked at."""
        wanted = [p for p in self.own().values() if p.requires_grad] if self._due() else []
        if [id(p) for p in wanted] == [id(p) for p in self.listening]:
            return
        for hook in self.hooks:
            hook.remove()
        me = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            if (hooks := me()) is not None and parameter.grad is not None:
                hooks.arrived[id(parameter)] = norm = norms([part(parameter.grad)])[0]
                hooks.samples[id(parameter)] = few([parameter.grad])
                if not hooks.steps:
                    hooks._count(parameter)
                if hooks.left is not None and hooks.left.parameter is parameter:
                    hooks.left.came(norm)

        self.listening, self.hooks = wanted, [p.register_post_accumulate_grad_hook(arrived) for p in wanted]

    def _count(self, parameter: Tensor) -> None:
        """A pass before the first step: backward adds to the same tensor unless it was set to None, or a graph of it is
        kept."""
        key, grad = id(parameter), parameter.grad
        last = self.summed.get(key)
        self.passes[key] += 1
        self.cleared[key] += (
            last is not None and last() is not grad and not grad.requires_grad and grad.layout == torch.strided
        )
        self.summed[key] = weakref.ref(grad)

    @torch.compiler.disable
    @torch.no_grad()
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = self.held()
        self.frozen = {id(p) for p in tensors if not p.requires_grad}
        self.fed = {id(p) for p in tensors if p.grad is not None}
        if not self._due():
            return
        self.origin.note()
        own, scaler = self.own(), getattr(self.optimizer, "found_inf", None)
        closure = any(callable(each) and not isinstance(each, Optimizer) for each in (*args, *kwargs.values()))
        rates = [
            rate.detach().clone() if isinstance(rate, Tensor) else rate
            for rate in (group.get("lr", 1.0) for group in self.optimizer.param_groups)
        ]
        self.now = StepRecord(
            self.steps,
            list(own),
            [usual(p) for p in own.values()],
            rates,
            _weights(own),
            closure,
            scaler is not None or getattr(self.optimizer, "loss_scale", None) == "dynamic",
        )
        self.few = ParameterSample.follow(self.few, self.steps, own)
        self.now.reset = self.few.reset
        if closure:
            self.arrived.clear()
            self.samples.clear()
        else:
            self._gradients(own)

    def _gradients(self, own: dict[str, Tensor]) -> None:
        """What came, and what the optimizer was given: with a closure what came, or what is left of it, since the step
        may clear it."""
        came, zero = [self.arrived.get(id(p)) for p in own.values()], torch.zeros((), device=self.now.before.device)
        heard, reached = {id(p) for p in self.listening if p.requires_grad}, self._reached(own)
        self.now.hooked = tuple(name for name, p in own.items() if id(p) in heard)
        self.now.none_grads = tuple(
            name for (name, p), each in zip(own.items(), came) if each is None and id(p) in heard
        )
        self.now.touched = self._touched(own)
        self.now.no_grad = tuple(name for name, p in own.items() if p.grad is None)
        self.now.grad_after_backward = _row(
            [
                reached[n] if each is None and id(p) not in heard else zero if each is None else each
                for n, (p, each) in enumerate(zip(own.values(), came))
            ],
            zero,
        )
        self.now.grad_at_step = torch.maximum(self.now.grad_after_backward, reached) if self.now.closure else reached

    def _touched(self, own: dict[str, Tensor]) -> Tensor | None:
        """See `StepRecord.touched`; of the tensors that were heard and have a gradient in the same layout."""
        both = [
            (self.samples[id(p)], few([p.grad])) for p in own.values() if id(p) in self.samples and p.grad is not None
        ]
        both = [pair for pair in both if pair[0].shape == pair[1].shape]
        if not both or self.now.closure:
            return None
        device = both[0][0].device
        wide = {"device": device, "dtype": torch.float32, "non_blocking": device.type == "cuda"}
        came, given = (torch.cat([each.to(**wide) for each in side]) for side in zip(*both))
        cosine = torch.nn.functional.cosine_similarity(came, given, dim=0)
        spreads = [(each - each.mean()).norm() / each.norm() for each in (came, given)]
        return torch.stack([cosine, (given.signbit() & (given == 0)).float().mean(), *spreads])

    def _reached(self, own: dict[str, Tensor]) -> Tensor:
        """(T,) norms of the gradients as they are; zero for none."""
        zero = torch.zeros((), device=self.now.before.device)
        present = iter(norms([part(p.grad) for p in own.values() if p.grad is not None]))
        return _row([zero if p.grad is None else next(present) for p in own.values()], zero)

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        uncleared, self.left = self.left and self.left.close(), None
        self.steps += 1
        self.summed.clear()
        self.fed = self.fed or {
            id(p) for p in self.held() if p.grad is not None
        }  # with a closure they come within the step
        if self.now is not None:
            own = self.own()
            own = {name: own[name] for name in self.now.names if name in own}
            if self.now.closure:
                self._gradients(own)
            self.now.after, self.now.moved, self.now.uncleared = _weights(own), self.few.finish(own), uncleared
            if self.steps < DENSE:
                self.now.left, self.left = self._reached(own), StaleGradientProbe.among(list(own.values()))
            self.records, self.now = [*self.records[:DENSE], *self.records[DENSE:][-KEPT:], self.now], None
        self.arrived.clear()
        self.samples.clear()
        if self.listening or self._due():
            self.listen()

    def close(self) -> None:
        for hook in (*self.step_hooks, *self.hooks, *([self.left.hook] if self.left else [])):
            hook.remove()
        self.listening, self.hooks, self.left = [], [], None


def _weights(own: dict[str, Tensor]) -> Tensor:
    """(T,) norms."""
    return norms([part(tensor) for tensor in own.values()])


def _row(values: Sequence[Tensor], zero: Tensor) -> Tensor:
    """(T,) on one device."""
    return (
        torch.stack([value.to(zero.device, non_blocking=zero.is_cuda) for value in values])
        if values
        else zero[None][:0]
    )


class Watch:
    """Watches a model and its optimizers from outside. `report()` returns findings, most certain first.

    Args: optimizer: one, or all of them, so that each parameter is looked for where it is;
        every: after the first eight steps of an optimizer, one step in this many is looked at;
        frozen: beginnings of names of parameters that are not meant to be trained.
    Raises: ValueError for an argument of another kind; ConfigError, which is one, for the beginning of no parameter's
    name. Parameters may be frozen, freed, added and replaced on the way. With a closure it is not seen what happens to
    gradients between backward and the update. A torch.amp.GradScaler may skip steps and divide by powers of two.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        every: int = EVERY,
        frozen: Sequence[str] = (),
    ) -> None:
        check_model(model)
        self.model, self.optimizers, self.frozen = model, all_optimizers(optimizer), beginnings(frozen)
        check_every(every, len(self.optimizers))
        check_beginnings(self.frozen, [name for name, _ in model.named_parameters()], "watch: frozen")
        self.all_hooks = [OptimizerHooks(model, each, every) for each in self.optimizers]
        self.still = {id(p) for p in model.parameters() if not p.requires_grad}  # from the beginning

    @property
    def steps(self) -> int:
        """Steps made, by the optimizer that has made most."""
        return max(hooks.steps for hooks in self.all_hooks)

    @property
    def records(self) -> list[StepRecord]:
        """What was seen, one optimizer after the other."""
        return [record for hooks in self.all_hooks for record in hooks.records]

    def close(self) -> None:
        """Takes every hook away."""
        for hooks in self.all_hooks:
            hooks.close()

    def report(self) -> list[Finding]:
        """What has been seen so far. Reads the device."""
        return told(self)


def watch(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], every: int = EVERY, frozen: Sequence[str] = ()
) -> Watch:
    """Begins to watch a plain PyTorch loop; call before training, and `report()` when you want to know."""
    return Watch(model, optimizer, every, frozen)
