"""Learning health in anyone's loop: `watch(model, optimizer)` for plain PyTorch, with `report()` on request.

Hooks run on a few steps only: on a tensor's gradient after it was accumulated, and around the optimizer's step. They read
nothing from the device until `report()`, and are not part of a compiled graph.

Legend: T tensors.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding, ranked
from ris_fast.training.telemetry import changed, norms

DENSE, EVERY, KEPT = 8, 100, 64


class Watch:
    """Watches a model and its optimizer from outside. `report()` returns findings, most certain first.

    Args: every: after the first eight steps, one step in this many is looked at.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = EVERY) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.model, self.optimizer, self.every = model, optimizer, every
        self.parameters = list(model.parameters())
        self.live = [p for p in self.parameters if p.requires_grad]
        self.steps, self.backwards, self.seconds = 0, 0, 0.0
        self.records: list[dict[str, Any]] = []
        self.arrived: dict[int, Tensor] = {}
        self.handles: list[Any] = []
        self.gradient_hooks: list[Any] = []
        self.last: Tensor | None = None
        self.step_handles = [optimizer.register_step_pre_hook(self._timed(self._before)),
                             optimizer.register_step_post_hook(self._timed(self._after))]
        self._listen()

    def _timed(self, hook: Callable[[], None]) -> Callable[..., None]:
        def timed(*_: Any) -> None:
            began = time.perf_counter()
            hook()
            self.seconds += time.perf_counter() - began
        return timed

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        return self.steps < DENSE or self.steps % self.every == 0

    def _listen(self) -> None:
        """Hooks on gradients for the next step, if it is one that is looked at."""
        due = self._due()
        if due and not self.gradient_hooks:
            me = weakref.ref(self)

            def arrived(parameter: Tensor) -> None:
                watch = me()
                if watch is not None and parameter.grad is not None:
                    watch.arrived[id(parameter)] = parameter.grad.detach().norm()
            self.gradient_hooks = [p.register_post_accumulate_grad_hook(arrived) for p in self.live]
        elif not due:
            for handle in self.gradient_hooks:
                handle.remove()
            self.gradient_hooks = []

    def _before(self) -> None:
        if not self._due():
            return
        grads = [p.grad for p in self.live]
        came = [self.arrived.get(id(p)) for p in self.live]
        zero = torch.zeros((), device=self.live[0].device) if self.live else torch.zeros(())
        self.now = {"step": self.steps, "missing": [self.names[id(p)] for p, each in zip(self.live, came) if each is None],
                    "came": torch.stack([zero if each is None else each.float() for each in came] or [zero]),
                    "given": torch.stack([zero if each is None else each.detach().norm().float() for each in grads] or [zero]),
                    "before": norms(self.parameters)}

    def _after(self) -> None:
        if self._due():
            self.records = [*self.records[-KEPT:], self.now | {"after": norms(self.parameters), "previous": self.last}]
            self.last = self.records[-1]["after"]
        else:
            self.last = None
        self.arrived.clear()
        self.steps += 1
        self._listen()

    def close(self) -> None:
        """Takes every hook away."""
        for handle in (*self.step_handles, *self.gradient_hooks):
            handle.remove()

    # ---- what it comes to --------------------------------------------------------------------------------------------

    def report(self) -> list[Finding]:
        """What has been seen so far. Reads the device."""
        found = self._membership()
        if not self.steps:
            if self.arrived:
                found.append(Finding("step_never_called", f"{len(self.arrived)} tensors have received gradients and the optimizer has "
                                     f"made no step."))
            return ranked(found)
        for record in self.records:
            found += self._record({name: value.cpu() if isinstance(value, Tensor) else value for name, value in record.items()})
        missing = Counter(name for record in self.records for name in record["missing"])
        never = [name for name, count in missing.items() if count == len(self.records)]
        if never:
            found.append(Finding("unused_head", f"{len(never)} of {len(self.live)} trainable tensors never received a gradient: "
                                 f"{', '.join(never[:3])}.", self.records[-1]["step"]))
        return ranked(found)

    def _membership(self) -> list[Finding]:
        """The parameters as they are now, against the optimizer's."""
        found, own = [], {id(p): name for name, p in self.model.named_parameters()}
        held = Counter(id(p) for group in self.optimizer.param_groups for p in group["params"])
        for cause, names in (("frozen_parameters", [name for name, p in self.model.named_parameters() if not p.requires_grad]),
                             ("missing_from_optimizer", [name for name, p in self.model.named_parameters()
                                                         if p.requires_grad and id(p) not in held]),
                             ("stale_optimizer_parameters", ["a tensor of the optimizer" for key in held if key not in own]),
                             ("duplicate_parameters", [own.get(key, "?") for key, count in held.items() if count > 1]),
                             ("zero_learning_rate", [f"group {n}" for n, g in enumerate(self.optimizer.param_groups)
                                                     if not float(g["lr"]) > 0 and self.steps > 1])):
            if names:
                found.append(Finding(cause, f"{len(names)}: {', '.join(names[:3])}.", self.steps))
        return found

    def _record(self, seen: dict[str, Any]) -> list[Finding]:
        """One step: what arrived, what the optimizer was given, what moved."""
        step, came, given = seen["step"] + 1, seen["came"], seen["given"]
        arrived, passed = float(came.norm()), float(given.norm())
        found = []
        if not bool(came.isfinite().all()) and bool(given.isfinite().all()):
            found.append(("sanitised_gradients", f"{int((~came.isfinite()).sum())} tensors' gradients arrive non-finite and reach the "
                          f"optimizer finite."))
        elif not bool(given.isfinite().all()):
            found.append(("nonfinite_gradients", f"{int((~given.isfinite()).sum())} of {len(given)} tensors."))
        elif arrived > 0 and passed == 0:
            found.append(("gradients_cleared_before_step", f"norm {arrived:.3g} arrives and the optimizer finds zero."))
        elif arrived > 0 and passed < 1e-4 * arrived:
            found.append(("clip_too_small", f"norm {arrived:.3g} arrives and {passed:.3g} reaches the optimizer."))
        if seen["previous"] is not None and changed(seen["previous"], seen["before"]):
            found.append(("weights_reset", f"{changed(seen['previous'], seen['before'])} tensors changed between two steps."))
        grown = float(seen["after"].norm()) / max(float(self.records[0]["before"].norm()), 1e-30)
        if not math.isfinite(grown) or grown > 10.0:
            found.append(("learning_rate_too_large", f"the weights' norm has grown by a factor of {grown:.3g}."))
        return [Finding(cause, evidence, step) for cause, evidence in found]


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, every: int = EVERY) -> Watch:
    """Begins to watch a plain PyTorch loop; call before training, and `report()` when you want to know."""
    return Watch(model, optimizer, every)
