"""What `watch` keeps of tensors from one step to the next: a few of their numbers, whether a gradient stays, and what
tensors were before the first step.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.watch.eager import eager_hook
from ris_fast.training.telemetry.step_telemetry import norms

FEW = 256  # numbers of a tensor, about, that are compared one by one


class ParameterSample:
    """A few numbers of every tensor, one after the other (S,), around the steps that are looked at."""

    def __init__(self, step: int, parameters: dict[str, Tensor]) -> None:
        values = [local_values(p.detach()) for p in parameters.values()]
        grads = [
            v.new_zeros(()).expand(v.shape) if p.grad is None or p.grad.layout != p.layout else p.grad
            for p, v in zip(parameters.values(), values)
        ]
        self.step, self.names = step, list(parameters)
        self.before = self.first = few_numbers(values)
        self.gradient, self.after = few_numbers(grads), self.before[:0]

    def is_reset(self, last: ParameterSample) -> Tensor | None:
        """(), whether an earlier state is here again although the last step left another. None for other tensors.

        Further apart than one step, weights at rest may come round by their rounding: there they must have been away.
        """
        if last.names != self.names or last.after.shape != self.before.shape:
            return None
        self.first = last.first
        again, away = (self.before == self.first).all(), (self.before - last.after).norm()
        if last.step == self.step - 1:
            return (again | (self.before == last.before).all()) & (away > 0)
        return again & (away > 1e-4 * self.before.norm())

    def finish(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """After the step: (), norm of the update over that of the weights. None for formats of 16 bits, whose weights
        may be copies, and where shapes have changed."""
        self.after = few_numbers(list(parameters.values()))
        same_shapes = self.after.shape == self.before.shape == self.gradient.shape
        if not same_shapes or any(p.element_size() < 4 for p in parameters.values()):
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
    before, now = (
        torch.cat([each.to(device, torch.float32, non_blocking=device.type == "cuda") for each in side])
        for side in (arrived, at_step)
    )
    cosine = torch.nn.functional.cosine_similarity(before, now, dim=0)
    spreads = [(each - each.mean()).norm() / each.norm() for each in (before, now)]
    return torch.stack([cosine, (now.signbit() & (now == 0)).float().mean(), *spreads])


class StaleGradientProbe:
    """Whether one tensor's gradient is still there at the next backward, and all that comes is added to it.

    Its norm after a step must be what backward finds, and that after one backward what the next one finds.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.arrivals = parameter, 0
        self.norm = norms([parameter.grad])[0]
        self.same = self.norm > 0
        self.hook: Any = parameter.register_hook(eager_hook(self._found))

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
        self.kept: dict[int, tuple[Tensor, Tensor | None]] = {}  # a few weights, norm of the moments

    def note(self) -> None:
        """Keeps tensors that are new, before a step; forgets those that are gone, whose id another may take."""
        now = {id(p): p for p in held_tensors(self.optimizer) if has_norm(p)}
        self.kept = {key: self.kept.get(key) or (few_numbers([p]), self._moments(p)) for key, p in now.items()}

    def _moments(self, tensor: Tensor) -> Tensor | None:
        """(), norm of what the optimizer keeps of it, without its count of steps, which zeros advance too."""
        kept = [
            local_values(value)
            for name, value in self.optimizer.state.get(tensor, {}).items()
            if name != "step" and isinstance(value, Tensor) and has_norm(value)
        ]
        return norms(kept).norm() if kept else None

    def trained(self) -> set[int]:
        """Ids of tensors whose moments differ; of those without moments whose weights do. Reads the device once."""
        flags = {id(p): self._differs(p) for p in held_tensors(self.optimizer) if id(p) in self.kept}
        return {key for key, flag in zip(flags, few_numbers(list(flags.values())).tolist()) if flag}

    def _differs(self, tensor: Tensor) -> Tensor:
        """(), whether a step has changed it."""
        (was, moments_before), moments = self.kept[id(tensor)], self._moments(tensor)
        if moments is not None:
            before = torch.zeros_like(moments) if moments_before is None else moments_before.to(moments.device)
            return (moments - before).abs() > 1e-6 * before  # another place in memory may be added up in another order
        now = few_numbers([tensor.detach()])
        return (now != was.to(now.device)).any() if now.shape == was.shape else torch.ones((), dtype=torch.bool)
