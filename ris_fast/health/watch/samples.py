"""What `watch` keeps of tensors from one step to the next: a few of their numbers, whether a gradient stays, and what
tensors were before the first step.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.training.telemetry.step_telemetry import norms

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
    def begin(last: ParameterSample | None, step: int, parameters: dict[str, Tensor]) -> ParameterSample:
        """Before a step, with what was kept of the last one."""
        now = few_numbers(list(parameters.values()))
        grads = [_zeros(p) if p.grad is None or p.grad.layout != p.layout else p.grad for p in parameters.values()]
        sample = ParameterSample(list(parameters), now, step, now, few_numbers(grads))
        if last is not None and last.after is not None and last.names == sample.names and last.after.shape == now.shape:
            sample.first = last.first
            sample.reset = sample._is_reset(last)
        return sample

    def _is_reset(self, last: ParameterSample) -> Tensor:
        """(), whether an earlier state is here again although the last step left another.

        Further apart than one step, weights at rest may come round by their rounding: there they must have been away.
        """
        again, away = (self.before == self.first).all(), (self.before - last.after).norm()
        if last.step == self.step - 1:
            return (again | (self.before == last.before).all()) & (away > 0)
        return again & (away > 1e-4 * self.before.norm())

    def finish(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """After the step: (), norm of the update over that of the weights. None for formats of 16 bits, whose weights
        may be copies, and where shapes have changed."""
        self.after = few_numbers(list(parameters.values()))
        narrow = any(p.element_size() < 4 for p in parameters.values())
        if narrow or not self.after.shape == self.before.shape == self.gradient.shape:
            return None
        moved = self.gradient != 0
        return ((self.after - self.before) * moved).norm() / (self.before * moved).norm()


def few_numbers(tensors: list[Tensor]) -> Tensor:
    """(S,) of all tensors, on one device."""
    flat = [torch.view_as_real(each) if each.is_complex() else each for each in map(local_values, tensors)]
    some = [each.reshape(-1)[:: max(1, each.numel() // FEW) | 1] for each in flat]
    device = next((each.device for each in some if each.device.type != "cpu"), torch.device("cpu"))
    return torch.cat([each.to(device, non_blocking=True) for each in some]) if some else torch.zeros(0)


def compare(arrived: Sequence[Tensor], at_step: Sequence[Tensor]) -> Tensor:
    """(4,) of gradients as backward left them against what the optimizer finds: the cosine, the share of negative zeros
    in the latter, and the spread over the size of each."""
    device = arrived[0].device
    wide = {"device": device, "dtype": torch.float32, "non_blocking": device.type == "cuda"}
    before, now = (torch.cat([each.to(**wide) for each in side]) for side in (arrived, at_step))
    cosine = torch.nn.functional.cosine_similarity(before, now, dim=0)
    spreads = [(each - each.mean()).norm() / each.norm() for each in (before, now)]
    return torch.stack([cosine, (now.signbit() & (now == 0)).float().mean(), *spreads])


def _zeros(tensor: Tensor) -> Tensor:
    """As many as the tensor has numbers, in the memory of one."""
    values = local_values(tensor.detach())
    return values.new_zeros(()).expand(values.shape)


def usual_norm(tensor: Tensor) -> float:
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
        plain = (p for p in parameters if p.requires_grad and p.grad is not None and p.grad is local_values(p.grad))
        return next(map(StaleGradientProbe, plain), None)

    @torch.no_grad()
    def _found(self, _: Tensor) -> None:
        """Before backward adds what came."""
        grad = self.parameter.grad
        self.same = self.same & (norms([grad])[0] == self.norm) if grad is not None else torch.zeros_like(self.same)

    def arrive(self, norm: Tensor) -> None:
        """After backward has added what came."""
        self.norm, self.arrivals = norm, self.arrivals + 1

    def close(self) -> Tensor | None:
        """(), or None where nothing came."""
        self.hook.remove()
        return self.same if self.arrivals else None


def local_values(tensor: Tensor) -> Tensor:
    """The stored numbers of a sparse tensor, this rank's of a sharded one; any other tensor as it is."""
    if tensor.layout != torch.strided:
        return tensor._values() if tensor.is_sparse else tensor.values()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor, whose import takes half a second


def has_norm(tensor: Tensor) -> bool:
    """Not lazy, on a device, and of numbers that can be trained."""
    return not is_lazy(tensor) and tensor.device.type != "meta" and (tensor.is_floating_point() or tensor.is_complex())


def held_tensors(optimizer: Optimizer) -> list[Tensor]:
    """All tensors of an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Origin:
    """What an optimizer's tensors and their moments were before the first step that saw them: those that differ later
    were trained.

    So training shows without a look at each step, whatever was frozen, freed or used in between.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.weights: dict[int, Tensor] = {}
        self.moments: dict[int, Tensor] = {}

    def note(self) -> None:
        """Keeps tensors that are new, before a step."""
        now = {id(p): p for p in held_tensors(self.optimizer) if has_norm(p)}
        for kept in (self.weights, self.moments):
            for key in kept.keys() - now.keys():  # whose id another tensor may take
                del kept[key]
        for key in now.keys() - self.weights.keys():
            self.weights[key] = few_numbers([now[key]])
            if (moments := self._moments(now[key])) is not None:
                self.moments[key] = moments

    def _moments(self, tensor: Tensor) -> Tensor | None:
        """(), norm of what the optimizer keeps of it, without its count of steps, which zeros advance too."""
        kept = [
            local_values(value)
            for name, value in self.optimizer.state.get(tensor, {}).items()
            if name != "step" and isinstance(value, Tensor) and has_norm(value)
        ]
        return norms(kept).norm() if kept else None

    def trained(self) -> set[int]:
        """Ids of tensors whose moments differ; of those without moments whose weights do. Reads the device."""
        flags = {id(p): self._differs(p) for p in held_tensors(self.optimizer) if id(p) in self.weights}
        return {key for key, flag in zip(flags, _host(flags.values())) if flag}

    def _differs(self, tensor: Tensor) -> Tensor:
        """(), whether a step has changed it."""
        was, moments = self.weights[id(tensor)], self._moments(tensor)
        if moments is not None:
            before = self.moments.get(id(tensor), torch.zeros_like(moments)).to(moments.device)
            return (moments - before).abs() > 1e-6 * before  # another place in memory may be added up in another order
        now = few_numbers([tensor.detach()])
        return (now != was.to(now.device)).any() if now.shape == was.shape else torch.ones((), dtype=torch.bool)


def _host(flags: Iterable[Tensor]) -> list[bool]:
    """With one copy from each device."""
    flags = list(flags)
    devices = {flag.device for flag in flags}
    read = {device: iter(torch.stack([each for each in flags if each.device == device]).tolist()) for device in devices}
    return [next(read[flag.device]) for flag in flags]
