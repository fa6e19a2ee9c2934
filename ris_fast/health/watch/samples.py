"""What `watch` keeps of tensors from one step to the next: a few of their numbers.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from operator import is_

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.watch.histories import GradientNumbers

FEW = 256  # numbers of a tensor, about, that are compared one by one


class WeightSamples:
    """Reads a few numbers of every tensor, one after the other (S,), through views that are kept.

    Views are made anew where a tensor is another one or lies elsewhere. Those that are not plain (sharded, or
    not contiguous) are read without.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # whose views are kept
        self.places: list[int] = []
        self.views: list[Tensor] = []
        self.sizes: list[int] = []
        self.owner: Tensor | None = None  # (S,) the number of the tensor that each comes from

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of the numbers as they are now."""
        if not self._are_known(tensors):
            plain = all(type(p) in PLAIN and p.layout == torch.strided and p.is_contiguous() for p in tensors)
            self.tensors = list(tensors) if plain else []
            self.places = [each.data_ptr() for each in self.tensors]
            # Views of detached tensors: what autograd knows of a parameter stays as it is.
            self.views = [few_of(each.detach()) for each in tensors]
            sizes = [len(each) for each in self.views]
            if sizes != self.sizes or self.owner is None:
                self.sizes, self.owner = sizes, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes).int())
        return joined(self.views)

    def _are_known(self, tensors: Sequence[Tensor]) -> bool:
        """Whether there are views of these, where they lie now."""
        known = self.tensors
        same = len(tensors) == len(known) > 0 and all(map(is_, tensors, known))
        return same and list(map(Tensor.data_ptr, known)) == self.places

    def count(self, flags: Tensor) -> Tensor:
        """(T,) how many of each tensor's numbers are flagged."""
        if self.owner.device != flags.device:
            self.owner = self.owner.to(flags.device)
        return torch.zeros(len(self.sizes), device=flags.device).index_add_(0, self.owner, flags.float())


PLAIN = (Tensor, torch.nn.Parameter)
NOT = torch.zeros((), dtype=torch.bool)


class ParameterSample:
    """A few numbers of every tensor, one after the other (S,), around a step that is looked at."""

    def __init__(self, step: int, parameters: dict[str, Tensor], samples: WeightSamples) -> None:
        values = [local_values(p) for p in parameters.values()]
        grads = [
            v.new_zeros(()).expand(v.shape) if p.grad is None or p.grad.layout != p.layout else p.grad
            for p, v in zip(parameters.values(), values)
        ]
        self.step, self.names, self.samples = step, list(parameters), samples
        self.before = self.first = samples.read(list(parameters.values()))
        self.gradient, self.after = few_numbers(grads), self.before[:0]
        self.sizes = list(samples.sizes)

    def is_reset(self, last: ParameterSample) -> Tensor | None:
        """(), whether an earlier state is here again although the last step left another. None for other tensors.

        Further apart than one step, weights at rest may come round by their rounding: there they must have been away.
        """
        if last.names != self.names or last.after.shape != self.before.shape:
            return None
        self.first = last.first
        if self.before.device.type == "cpu" and not self._is_again(last):  # known at once
            return NOT
        again, away = (self.before == self.first).all(), (self.before - last.after).norm()
        if last.step == self.step - 1:
            return (again | (self.before == last.before).all()) & (away > 0)
        return again & (away > 1e-4 * self.before.norm())

    def _is_again(self, last: ParameterSample) -> bool:
        adjacent = last.step == self.step - 1
        return torch.equal(self.before, self.first) or (adjacent and torch.equal(self.before, last.before))

    def add_live(self, live: Tensor | None) -> Tensor:
        """(S,), which numbers have had a gradient other than zero, `live` or now."""
        now = self.gradient != 0
        return live | now if live is not None and live.shape == now.shape else now

    def gradient_numbers(self) -> GradientNumbers:
        """Reads the device."""
        values = self.gradient.float().abs()
        narrow = (values > 0) & (values < 2.0**-14) & ((values * 2.0**24).frac() == 0)
        zero = values == 0
        sizes = self.sizes if sum(self.sizes) == len(values) else []
        parts = zip(self.names, zero.split(sizes), narrow.split(sizes)) if sizes else ()
        matrices = sum(
            bool((apart | on_grid).all() and on_grid.any())
            for name, apart, on_grid in parts
            if not name.endswith("bias")
        )
        return GradientNumbers(len(values), int(zero.sum()), int(narrow.sum()), matrices)

    def finish(self, parameters: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """After the step: (T,) how many of each tensor's numbers it changed, and (), the norm of the update over that
        of the weights. None where shapes have changed; no norm for formats of 16 bits, whose weights may be copies."""
        self.after = self.samples.read(list(parameters.values()))
        if not self.after.shape == self.before.shape == self.gradient.shape or len(parameters) != len(self.names):
            return None, None
        moved = self.samples.count(self.after != self.before)
        if any(p.element_size() < 4 for p in parameters.values()):
            return moved, None
        used = self.gradient != 0
        sizes = torch._foreach_norm([(self.after - self.before) * used, self.before * used])
        return moved, sizes[0] / sizes[1]


def few_numbers(tensors: Sequence[Tensor]) -> Tensor:
    """(S,) of all tensors, on one device."""
    return joined([few_of(each) for each in tensors])


def few_of(tensor: Tensor) -> Tensor:
    """A view into it, where it is contiguous."""
    values = local_values(tensor)
    values = torch.view_as_real(values) if values.is_complex() else values
    stride = stride_of(values.shape)
    if values.is_contiguous():
        return values.as_strided((-(-values.numel() // stride),), (stride,))
    return values.reshape(-1)[::stride]


@lru_cache(4096)
def stride_of(shape: Sequence[int]) -> int:
    """Places from one number that is read to the next: odd, so that they are not all in one column."""
    return max(1, math.prod(shape) // FEW) | 1


def joined(some: Sequence[Tensor]) -> Tensor:
    if not some:
        return torch.zeros(0)
    devices = {each.device for each in some}
    if len(devices) > 1:
        device = next(each for each in devices if each.type != "cpu")
        some = [each.to(device, non_blocking=True) for each in some]
    return torch.cat(list(some))


def local_values(tensor: Tensor) -> Tensor:
    """The stored numbers of a sparse tensor, this rank's of a sharded one; any other tensor as it is."""
    if tensor.layout != torch.strided:
        return tensor._values() if tensor.is_sparse else tensor.values()
    if type(tensor) in PLAIN:
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # DTensor, whose import takes half a second


def has_norm(tensor: Tensor) -> bool:
    """Not lazy, on a device, and of numbers that can be trained."""
    return not is_lazy(tensor) and tensor.device.type != "meta" and (tensor.is_floating_point() or tensor.is_complex())


def held_tensors(optimizer: Optimizer) -> list[Tensor]:
    """All tensors of an optimizer's groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]
