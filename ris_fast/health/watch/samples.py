"""What `watch` keeps of tensors from one step to the next: a few of their numbers, whether a gradient stays, and what
tensors were before the first step.

Legend: S numbers, a few of every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.watch.eager import eager_hook
from ris_fast.health.watch.histories import GradientNumbers, NumbersRecord
from ris_fast.training.telemetry.step_telemetry import norms

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
        return GradientNumbers(len(values), int((values == 0).sum()), int(narrow.sum()))

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


def compare(arrived: Sequence[Tensor], at_step: Sequence[Tensor]) -> Tensor:
    """(6,) of gradients as backward left them against what the optimizer finds: the cosine, the share of negative zeros
    in the latter, the spread over the size of each, and that of the magnitudes that are not zero."""
    device = arrived[0].device
    before, now = (
        torch.cat([each.to(device, torch.float32, non_blocking=device.type == "cuda") for each in side])
        for side in (arrived, at_step)
    )
    cosine = torch.nn.functional.cosine_similarity(before, now, dim=0)
    spreads = [(each - each.mean()).norm() / each.norm() for each in (before, now)]
    for each in (before.abs(), now.abs()):
        some = each > 0
        spreads.append(((each - each.sum() / some.sum()) * some).norm() / each.norm())
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
    if type(tensor) in PLAIN:
        return tensor
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
        self.noted: list[Tensor] = []

    def note(self, held: list[Tensor]) -> None:
        """Keeps tensors that are new, before a step; forgets those that are gone, whose id another may take. `held`:
        all of the optimizer's."""
        if held is self.noted and len(self.kept) == len(held):
            return
        self.noted = held
        now = {id(p): p for p in held if has_norm(p)}
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

    def numbers(
        self, parameters: dict[str, Tensor], live: Tensor | None, last: ParameterSample | None
    ) -> dict[str, NumbersRecord]:
        """Of the tensors in the last step that was looked at; `live`: which of its numbers have had a gradient. Reads
        the device."""
        if live is None or last is None:
            return {}
        found, flags = {}, live.cpu().split(last.samples.sizes) if sum(last.samples.sizes) == len(live) else ()
        for name, alive in zip(last.names, flags):
            parameter = parameters.get(name)
            was = self.kept.get(id(parameter), (torch.zeros(0), None))[0].cpu()
            now = few_numbers([parameter.detach()]).cpu() if parameter is not None else was
            if parameter is not None and len(now) == len(was) == len(alive):
                found[name] = _numbers(was, now, alive)
        return found


def _numbers(was: Tensor, now: Tensor, live: Tensor) -> NumbersRecord:
    held = now == was
    narrow = now.float().contiguous().view(torch.int32)
    return NumbersRecord(
        sampled=len(now),
        changed=int((~held).sum()),
        live=int(live.sum()),
        held=int((held & live).sum()),
        short=int(((narrow & 0x1FFF == 0) & now.isfinite()).sum()),
        distinct=len(now.unique()),
        size=float(now.float().abs().mean()) if len(now) else 0.0,
    )
