"""What `watch` keeps of tensors from one step to the next: a few of their numbers, whether a gradient stays where it
is, and what tensors were before the first step.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.training.telemetry.step_telemetry import norms

EARLY = 8  # steps after which what nothing has reached is not waited for
FEW = 256  # numbers of a tensor, about, that are compared one by one


@dataclass
class ParameterSample:
    """A few numbers of every tensor, one after the other (S,), around the steps that are looked at."""

    names: list[str]
    first: Tensor
    step: int
    before: Tensor
    gradient: Tensor
    after: Tensor | None = None
    reset: Tensor | None = None

    @staticmethod
    def follow(last: ParameterSample | None, step: int, own: dict[str, Tensor]) -> ParameterSample:
        """Before a step, with what was kept of the last one."""
        now = few(list(own.values()))
        slopes = [_zeros(p) if p.grad is None or p.grad.layout != p.layout else p.grad for p in own.values()]
        here = ParameterSample(list(own), now, step, now, few(slopes))
        if last is not None and last.after is not None and last.names == here.names and last.after.shape == now.shape:
            here.first = last.first
            here.reset = here._put_back(last)
        return here

    def _put_back(self, last: ParameterSample) -> Tensor:
        """(), whether an earlier state is here again although the last step left another.

        Further apart than one step, weights at rest may come round by their rounding: there they must have been away.
        """
        again, away = (self.before == self.first).all(), (self.before - last.after).norm()
        if last.step == self.step - 1:
            return (again | (self.before == last.before).all()) & (away > 0)
        return again & (away > 1e-4 * self.before.norm())

    def finish(self, own: dict[str, Tensor]) -> Tensor | None:
        """After the step: (), how far it went. None where it cannot be said: formats of 16 bits, whose weights may be
        copies."""
        self.after = few(list(own.values()))
        if not self.after.shape == self.before.shape == self.gradient.shape or any(
            p.element_size() < 4 for p in own.values()
        ):
            return None
        here = self.gradient != 0
        return ((self.after - self.before) * here).norm() / (self.before * here).norm()


def few(tensors: list[Tensor]) -> Tensor:
    """(S,) on one device."""
    flat = [torch.view_as_real(each) if each.is_complex() else each for each in map(part, tensors)]
    some = [each.reshape(-1)[:: max(1, each.numel() // FEW) | 1] for each in flat]
    device = next((each.device for each in some if each.device.type != "cpu"), torch.device("cpu"))
    return torch.cat([each.to(device, non_blocking=True) for each in some]) if some else torch.zeros(0)


def _zeros(tensor: Tensor) -> Tensor:
    """As many as the tensor has numbers, in the memory of one."""
    here = part(tensor.detach())
    return here.new_zeros(()).expand(here.shape)


def usual(tensor: Tensor) -> float:
    """Norm of a layer (out, in, ...) whose outputs are as large as its inputs; of a vector of norm one."""
    return float(tensor.shape[0]) ** 0.5 if tensor.ndim > 1 else 1.0


class StaleGradientProbe:
    """Whether one tensor's gradient is still there at the next backward, and all that comes is added to it.

    Its norm after a step must be what backward finds, and that after one backward what the next one finds.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.arrivals = parameter, 0
        self.norm = norms([parameter.grad])[0]
        self.same = self.norm > 0
        self.hook: Any = parameter.register_hook(self._found)

    @staticmethod
    def among(parameters: list[Tensor]) -> StaleGradientProbe | None:
        """Of the first that has a gradient now."""
        plain = (p for p in parameters if p.requires_grad and p.grad is not None and p.grad is part(p.grad))
        return next(map(StaleGradientProbe, plain), None)

    @torch.no_grad()
    def _found(self, _: Tensor) -> None:
        """Before backward adds what came."""
        grad = self.parameter.grad
        self.same = self.same & (norms([grad])[0] == self.norm) if grad is not None else torch.zeros_like(self.same)

    def came(self, norm: Tensor) -> None:
        """After backward has added what came."""
        self.norm, self.arrivals = norm, self.arrivals + 1

    def close(self) -> Tensor | None:
        """(), or None where nothing came."""
        self.hook.remove()
        return self.same if self.arrivals else None


def part(tensor: Tensor) -> Tensor:
    """The numbers of a sparse tensor as they are stored, and of a sharded one those that lie here; any other as it
    is."""
    if tensor.layout != torch.strided:
        return tensor._values() if tensor.is_sparse else tensor.values()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor, whose import takes half a second


def has_norm(tensor: Tensor) -> bool:
    """Not lazy, on a device, and of numbers that can be trained."""
    return not is_lazy(tensor) and tensor.device.type != "meta" and (tensor.is_floating_point() or tensor.is_complex())


def held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Origin:
    """What an optimizer's tensors and their moments were before the first step that saw them: those that differ later
    were trained.

    So it shows without a look at each step, whatever was frozen, freed or used in between.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.weights: dict[int, Tensor] = {}
        self.moments: dict[int, Tensor] = {}

    def note(self) -> None:
        """Before a step: tensors that are new."""
        now = {id(p): p for p in held(self.optimizer) if has_norm(p)}
        for kept in (self.weights, self.moments):
            for key in kept.keys() - now.keys():  # whose id another tensor may take
                del kept[key]
        for key in now.keys() - self.weights.keys():
            self.weights[key] = few([now[key]])
            if (moments := self._moments(now[key])) is not None:
                self.moments[key] = moments

    def _moments(self, tensor: Tensor) -> Tensor | None:
        """(), norm of what the optimizer keeps of it, without its count of steps, which zeros advance too."""
        kept = [
            part(value)
            for name, value in self.optimizer.state.get(tensor, {}).items()
            if name != "step" and isinstance(value, Tensor) and has_norm(value)
        ]
        return norms(kept).norm() if kept else None

    def trained(self) -> set[int]:
        """Ids of tensors whose moments differ; of those without moments whose weights do. Reads the device."""
        flags = {id(p): self._differs(p) for p in held(self.optimizer) if id(p) in self.weights}
        return {key for key, flag in zip(flags, _host(flags.values())) if flag}

    def _differs(self, tensor: Tensor) -> Tensor:
        """()"""
        was, moments = self.weights[id(tensor)], self._moments(tensor)
        if moments is not None:
            before = self.moments.get(id(tensor), torch.zeros_like(moments)).to(moments.device)
            return (moments - before).abs() > 1e-6 * before  # another place in memory may be added up in another order
        now = few([tensor.detach()])
        return (now != was.to(now.device)).any() if now.shape == was.shape else torch.ones((), dtype=torch.bool)


def _host(flags: Iterable[Tensor]) -> list[bool]:
    """With one copy from each device."""
    flags = list(flags)
    places = {flag.device for flag in flags}
    read = {place: iter(torch.stack([flag for flag in flags if flag.device == place]).tolist()) for place in places}
    return [next(read[flag.device]) for flag in flags]
