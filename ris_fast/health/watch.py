"""Learning health in anyone's loop: `watch(model, optimizer)` for plain PyTorch, with `report()` on request.

Hooks run on a few steps only: on a tensor's gradient after it was accumulated, and around the optimizer's step. They read
nothing from the device until `report()`, and are not part of a compiled model; a compiled `optimizer.step` is parted at them.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.finding import Finding, ranked
from ris_fast.training.telemetry import changed, norms

DENSE, EVERY, KEPT = 8, 100, 64
SCALER_STEPS = 24          # a loss scale halves its way to one that fits in fewer


@dataclass
class Seen:
    """One optimizer step: names (T,) of its tensors, and norms (T,) float32 that stay where they are.

    came: gradients after backward; given: as the optimizer found them; before, after: weights; previous: weights after the
    step before, where that was looked at too. heard: tensors whose gradient was listened for; missing: those without one.
    scaled: a loss scaler takes care of gradients that are not finite.
    """

    step: int
    names: list[str]
    before: Tensor
    previous: Tensor | None
    scaled: bool
    came: Tensor | None = None
    given: Tensor | None = None
    after: Tensor | None = None
    heard: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def on_host(self) -> "Seen":
        return Seen(**{name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()})


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
        previous = self.records[-1] if self.records and self.records[-1].step == self.steps - 1 else None
        same = previous is not None and previous.names == list(own)
        self.now = Seen(self.steps, list(own), _weights(own), previous.after if same else None,
                        scaler is not None or getattr(self.optimizer, "loss_scale", None) == "dynamic")
        if any(callable(each) and not isinstance(each, Optimizer) for each in (*args, *kwargs.values())):
            self.arrived.clear()              # a closure: gradients come within the step
        else:
            self._gradients(own, given=True)

    def _gradients(self, own: dict[str, Tensor], given: bool) -> None:
        """What came, and what the optimizer was given; without `given` the same, since the step may have cleared it."""
        came, found = [self.arrived.get(id(p)) for p in own.values()], [p.grad for p in own.values()]
        heard = {id(p) for p in self.listening}
        self.now.heard = tuple(name for name, p in own.items() if id(p) in heard)
        self.now.missing = tuple(name for (name, p), each in zip(own.items(), came) if each is None and id(p) in heard)
        present = iter(norms([_part(grad) for grad in found if grad is not None]))
        zero = torch.zeros((), device=self.now.before.device)
        reached = [zero if grad is None else next(present) for grad in found]
        self.now.came = _row([seen if each is None and id(p) not in heard else zero if each is None else each
                              for p, each, seen in zip(own.values(), came, reached)], zero)
        self.now.given = _row(reached, zero) if given else self.now.came

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self.now is not None:
            own = self.own()
            own = {name: own[name] for name in self.now.names if name in own}
            if self.now.came is None:
                self._gradients(own, given=False)
            self.now.after = _weights(own)
            self.records, self.now = [*self.records[-KEPT:], self.now], None
        self.arrived.clear()
        self.steps += 1
        if self.listening or self._due():
            self.listen()

    def close(self) -> None:
        for hook in (*self.step_hooks, *self.hooks):
            hook.remove()
        self.listening, self.hooks = [], []


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
        every: after the first eight steps of an optimizer, one step in this many is looked at.
    Parameters may be frozen, freed, added and replaced on the way. With a closure it is not seen what happens to gradients
    between backward and the update. A torch.amp.GradScaler may skip steps and divide by powers of two.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], every: int = EVERY) -> None:
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if not self.optimizers or every < 1:
            raise ValueError(f"watch: {len(self.optimizers)} optimizers and every={every}. Give at least one optimizer, and every >= 1.")
        self.followers = [Follower(model, each, every) for each in self.optimizers]

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
        return ranked([*self._membership(), *(found for follower in self.followers for found in _told(follower))])

    def _membership(self) -> list[Finding]:
        """The parameters as they are now, against the optimizers'."""
        own = {id(p): name.replace("_orig_mod.", "") for name, p in self.model.named_parameters()}
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        held = Counter(id(p) for group in groups for p in group["params"])
        trained = {id(p): p.requires_grad for p in self.model.parameters()}
        wrong = {"frozen_parameters": [name for key, name in own.items() if not trained[key]],
                 "missing_from_optimizer": [name for key, name in own.items() if trained[key] and key not in held],
                 "stale_optimizer_parameters": ["a tensor of the optimizer" for key in held if key not in own],
                 "duplicate_parameters": [own.get(key, "?") for key, count in held.items() if count > 1],
                 "zero_learning_rate": [f"group {n}" for n, group in enumerate(groups) if self.steps > 1 and not float(group["lr"]) > 0]}
        return [Finding(cause, f"{len(names)}: {', '.join(names[:3])}.", self.steps) for cause, names in wrong.items() if names]


def _told(follower: Follower) -> list[Finding]:
    """What one optimizer's steps say."""
    if not follower.steps:
        bad = sum(not bool(norm.isfinite()) for norm in follower.arrived.values())
        skipped = f" {bad} of them are not finite: a loss scaler or a check may skip every step." if bad else ""
        return [Finding("step_never_called", f"{len(follower.arrived)} tensors have received gradients and the optimizer has made no "
                        f"step.{skipped}")] if follower.arrived else []
    records = [record.on_host() for record in follower.records]
    found = [finding for record in records for finding in _judge(record, next(r for r in records if r.names == record.names))]
    heard, missing = (Counter(name for record in records for name in getattr(record, which)) for which in ("heard", "missing"))
    if never := [name for name, count in missing.items() if count == heard[name]]:
        found.append(Finding("unused_head", f"{len(never)} of {len(heard)} trainable tensors never received a gradient: "
                             f"{', '.join(never[:3])}.", records[-1].step))
    if records and records[-1].step >= SCALER_STEPS and all(record.scaled and not _finite(record.given) for record in records):
        found.append(Finding("scaler_skips_all", f"the gradients of all {len(records)} steps that were looked at are not finite.",
                             records[-1].step))
    return found


def _judge(seen: Seen, first: Seen) -> list[Finding]:
    """One step: what arrived, what the optimizer was given, what moved; `first`: the first step of the same tensors."""
    arrived, passed = float(seen.came.norm()), float(seen.given.norm())
    found = []
    if not _finite(seen.came) and _finite(seen.given):
        found.append(("sanitised_gradients", f"{int((~seen.came.isfinite()).sum())} tensors' gradients arrive non-finite and reach the "
                      f"optimizer finite."))
    elif not _finite(seen.given) and not seen.scaled:
        found.append(("nonfinite_gradients", f"{int((~seen.given.isfinite()).sum())} of {len(seen.given)} tensors."))
    elif arrived > 0 and passed == 0:
        found.append(("gradients_cleared_before_step", f"norm {arrived:.3g} arrives and the optimizer finds zero."))
    elif arrived > 0 and passed < 1e-4 * arrived and not _unscaled(arrived, passed):
        found.append(("clip_too_small", f"norm {arrived:.3g} arrives and {passed:.3g} reaches the optimizer."))
    if seen.previous is not None and changed(seen.previous, seen.before):
        found.append(("weights_reset", f"{changed(seen.previous, seen.before)} tensors changed between two steps."))
    grown = float(seen.after.norm()) / max(float(first.before.norm()), 1e-30)
    if not math.isfinite(grown) or grown > 10.0:
        found.append(("learning_rate_too_large", f"the weights' norm has grown by a factor of {grown:.3g}."))
    return [Finding(cause, evidence, seen.step + 1) for cause, evidence in found]


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _unscaled(arrived: float, passed: float) -> bool:
    """Whether a loss scale was taken out on the way: these are powers of two, and dividing by one leaves no rounding."""
    powers = math.log2(arrived / passed)
    return abs(powers - round(powers)) < 1e-5


def watch(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], every: int = EVERY) -> Watch:
    """Begins to watch a plain PyTorch loop; call before training, and `report()` when you want to know."""
    return Watch(model, optimizer, every)
