"""Learning health in anyone's loop: `watch(model, optimizer)` for plain PyTorch, with `report()` on request.

Hooks run on a few steps only: on a tensor's gradient after it was accumulated, and around the optimizer's step. They read
nothing from the device until `report()`, and are not part of a compiled model; a compiled `optimizer.step` is parted at them.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.finding import Finding
from ris_fast.health.watch_rules import told
from ris_fast.training.telemetry import norms

DENSE, EVERY, KEPT = 8, 100, 64
FEW = 256                  # numbers of a tensor, about, that are compared one by one


@dataclass
class Seen:
    """One optimizer step: names (T,) of its tensors, and norms (T,) float32 that stay where they are.

    sizes: what a layer's usual initial norm is, about; rates: learning rates of the groups; came: gradients after backward;
    given: as the optimizer found them; before, after: weights. closure: gradients came within the step. scaled: a loss scaler
    takes care of gradients that are not finite. heard: tensors whose gradient was listened for; missing: those without one.
    reset: (), whether the weights are bit for bit those of an earlier step, and were others in between;
    moved: (), norm of the update over that of the weights, where there was a gradient; of a few numbers of each tensor.
    """

    step: int
    names: list[str]
    sizes: list[float]
    rates: list[float | Tensor]
    before: Tensor
    closure: bool
    scaled: bool
    reset: Tensor | None = None
    came: Tensor | None = None
    given: Tensor | None = None
    after: Tensor | None = None
    moved: Tensor | None = None
    heard: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def on_host(self) -> "Seen":
        host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Seen(**host | {"rates": [float(rate) for rate in self.rates]})


class Follower:
    """Hooks around one optimizer's steps and on the gradients of the tensors that it holds."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self.records: list[Seen] = []
        self.arrived: dict[int, Tensor] = {}
        self.listening: list[Tensor] = []
        self.hooks: list[Any] = []
        self.now: Seen | None = None
        self.few: Few | None = None
        self.step_hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        self.listen()

    def _due(self) -> bool:
        return self.steps < DENSE or self.steps % self.every == 0

    def own(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer holds now; without those that have no norm (lazy, meta, integers)."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name.replace("_orig_mod.", ""): p for name, p in self.model.named_parameters()
                if id(p) in held and not is_lazy(p) and p.device.type != "meta" and (p.is_floating_point() or p.is_complex())}

    def listen(self) -> None:
        """Hooks on gradients for the next step, if it is one that is looked at."""
        wanted = [p for p in self.own().values() if p.requires_grad] if self._due() else []
        if [id(p) for p in wanted] == [id(p) for p in self.listening]:
            return
        for hook in self.hooks:
            hook.remove()
        me = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            if (follower := me()) is not None and parameter.grad is not None:
                follower.arrived[id(parameter)] = norms([_part(parameter.grad)])[0]

        self.listening, self.hooks = wanted, [p.register_post_accumulate_grad_hook(arrived) for p in wanted]

    @torch.compiler.disable
    @torch.no_grad()
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._due():
            return
        own, scaler = self.own(), getattr(self.optimizer, "found_inf", None)
        closure = any(callable(each) and not isinstance(each, Optimizer) for each in (*args, *kwargs.values()))
        rates = [rate.detach().clone() if isinstance(rate, Tensor) else rate
                 for rate in (group.get("lr", 1.0) for group in self.optimizer.param_groups)]
        self.now = Seen(self.steps, list(own), [_usual(p) for p in own.values()], rates, _weights(own), closure,
                        scaler is not None or getattr(self.optimizer, "loss_scale", None) == "dynamic")
        self.few = Few.follow(self.few, self.steps, own)
        self.now.reset = self.few.reset
        if closure:
            self.arrived.clear()
        else:
            self._gradients(own)

    def _gradients(self, own: dict[str, Tensor]) -> None:
        """What came, and what the optimizer was given: with a closure what came, or what is left of it, since the step may clear it."""
        came, found = [self.arrived.get(id(p)) for p in own.values()], [p.grad for p in own.values()]
        heard = {id(p) for p in self.listening}
        self.now.heard = tuple(name for name, p in own.items() if id(p) in heard)
        self.now.missing = tuple(name for (name, p), each in zip(own.items(), came) if each is None and id(p) in heard)
        present = iter(norms([_part(grad) for grad in found if grad is not None]))
        zero = torch.zeros((), device=self.now.before.device)
        reached = [zero if grad is None else next(present) for grad in found]
        self.now.came = _row([seen if each is None and id(p) not in heard else zero if each is None else each
                              for p, each, seen in zip(own.values(), came, reached)], zero)
        reached = _row(reached, zero)
        self.now.given = torch.maximum(self.now.came, reached) if self.now.closure else reached

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self.now is not None:
            own = self.own()
            own = {name: own[name] for name in self.now.names if name in own}
            if self.now.closure:
                self._gradients(own)
            self.now.after, self.now.moved = _weights(own), self.few.finish(own)
            self.records, self.now = [*self.records[:DENSE], *self.records[DENSE:][-KEPT:], self.now], None
        self.arrived.clear()
        self.steps += 1
        if self.listening or self._due():
            self.listen()

    def close(self) -> None:
        for hook in (*self.step_hooks, *self.hooks):
            hook.remove()
        self.listening, self.hooks = [], []


@dataclass
class Few:
    """A few numbers of every tensor, one after the other (S,), around the steps that are looked at."""

    names: list[str]
    first: Tensor
    step: int
    before: Tensor
    gradient: Tensor
    after: Tensor | None = None
    reset: Tensor | None = None

    @staticmethod
    def follow(last: "Few | None", step: int, own: dict[str, Tensor]) -> "Few":
        """Before a step, with what was kept of the last one."""
        now = _few(list(own.values()))
        slopes = [torch.zeros_like(p) if p.grad is None or p.grad.layout != p.layout else p.grad for p in own.values()]
        here = Few(list(own), now, step, now, _few(slopes))
        if last is not None and last.after is not None and last.names == here.names and last.after.shape == now.shape:
            here.first = last.first
            back = (now == here.first).all()
            if last.step == step - 1:              # further apart, weights that swing to and fro may meet
                back = back | (now == last.before).all()
            here.reset = back & (now != last.after).any()
        return here

    def finish(self, own: dict[str, Tensor]) -> Tensor | None:
        """After the step: (), how far it went. None where it cannot be said: formats of 16 bits, whose weights may be copies."""
        self.after = _few(list(own.values()))
        if self.after.shape != self.before.shape or any(p.element_size() < 4 for p in own.values()):
            return None
        here = self.gradient != 0
        return ((self.after - self.before) * here).norm() / (self.before * here).norm()


def _few(tensors: list[Tensor]) -> Tensor:
    """(S,) on one device."""
    flat = [torch.view_as_real(part) if part.is_complex() else part for part in (_part(each.detach()) for each in tensors)]
    parts = [part.reshape(-1)[::max(1, part.numel() // FEW) | 1] for part in flat]
    device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
    return torch.cat([part.to(device, non_blocking=True) for part in parts]) if parts else torch.zeros(0)


def _usual(tensor: Tensor) -> float:
    """Norm of a layer (out, in, ...) whose outputs are as large as its inputs; of a vector of norm one."""
    return float(tensor.shape[0]) ** 0.5 if tensor.ndim > 1 else 1.0


def _part(tensor: Tensor) -> Tensor:
    """The numbers of a sparse tensor as they are stored, and of a sharded one those that lie here; any other as it is."""
    if tensor.layout != torch.strided:
        return tensor._values() if tensor.is_sparse else tensor.values()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor      # DTensor, whose import takes half a second


def _weights(own: dict[str, Tensor]) -> Tensor:
    """(T,) norms."""
    return norms([_part(tensor) for tensor in own.values()])


def _row(values: Sequence[Tensor], zero: Tensor) -> Tensor:
    """(T,) on one device."""
    return torch.stack([value.to(zero.device, non_blocking=zero.is_cuda) for value in values]) if values else zero[None][:0]


class Watch:
    """Watches a model and its optimizers from outside. `report()` returns findings, most certain first.

    Args: optimizer: one, or all of them, so that each parameter is looked for where it is;
        every: after the first eight steps of an optimizer, one step in this many is looked at;
        frozen: beginnings of names of parameters that are not meant to be trained.
    Parameters may be frozen, freed, added and replaced on the way. With a closure it is not seen what happens to gradients
    between backward and the update. A torch.amp.GradScaler may skip steps and divide by powers of two.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], every: int = EVERY,
                 frozen: Sequence[str] = ()) -> None:
        self.model = model
        self.frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if not self.optimizers or every < 1:
            raise ValueError(f"watch: {len(self.optimizers)} optimizers and every={every}. Give at least one optimizer, and every >= 1.")
        self.followers = [Follower(model, each, every) for each in self.optimizers]
        self.still = {id(p) for p in model.parameters() if not p.requires_grad}      # from the beginning

    @property
    def steps(self) -> int:
        """Steps made, by the optimizer that has made most."""
        return max(follower.steps for follower in self.followers)

    @property
    def records(self) -> list[Seen]:
        """What was seen, one optimizer after the other."""
        return [record for follower in self.followers for record in follower.records]

    def close(self) -> None:
        """Takes every hook away."""
        for follower in self.followers:
            follower.close()

    def report(self) -> list[Finding]:
        """What has been seen so far. Reads the device."""
        return told(self)


def watch(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], every: int = EVERY, frozen: Sequence[str] = ()) -> Watch:
    """Begins to watch a plain PyTorch loop; call before training, and `report()` when you want to know."""
    return Watch(model, optimizer, every, frozen)
