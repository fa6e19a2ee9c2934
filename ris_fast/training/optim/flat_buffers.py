"""Parameters of one device and dtype in flat buffers, and the passes of the fused step over them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from ctypes import CDLL, c_size_t, c_void_p
from itertools import groupby

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import Coefficient, Group, Hyper, State, Telemetry, padded, scratch, tables
from ris_fast.kernels.fused_step.op import backends

PAGE, HUGE, MADV_HUGEPAGE = 4096, 1 << 22, 14  # bytes, bytes, <sys/mman.h>
REMEMBERED = 64  # choices of tensors with a gradient, whose tables are kept
_HALF = (torch.bfloat16, torch.float16)


def flat_zeros(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on Linux CPUs in 2 MB pages if the kernel grants them, since five long buffers overrun the page-table
    caches."""
    flat = torch.empty(elements, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux" and flat.nbytes >= HUGE:
        begin, end = -(-flat.data_ptr() // PAGE) * PAGE, (flat.data_ptr() + flat.nbytes) // PAGE * PAGE
        CDLL(None).madvise(c_void_p(begin), c_size_t(end - begin), MADV_HUGEPAGE)  # advice: refusal does no harm
    return flat.zero_()


def real_dtype(tensor: Tensor) -> torch.dtype:
    """dtype of the real numbers in a real or complex tensor."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def real_numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def view_like(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """View into `flat` from element `start` with the shape and, where dense, the strides of `like`."""
    strides = torch.empty_like(like, device="meta").stride()
    if like.is_complex():
        return flat.view(like.dtype).as_strided(like.shape, strides, start // 2)
    return flat.as_strided(like.shape, strides, start)


def window_like(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """As `view_like`, but with a storage of its own over the same memory.

    Savers (safetensors, Accelerate, transformers) take tensors with a common storage for tied weights and keep one.
    """
    item = flat.element_size()
    storage = flat.untyped_storage()[start * item : (start + real_numel(like)) * item]
    strides = torch.empty_like(like, device="meta").stride()
    dtype = flat.dtype.to_complex() if like.is_complex() else flat.dtype
    return torch.empty(0, dtype=dtype, device=flat.device).set_(storage, 0, like.shape, strides)


def held_elsewhere(tensor: Tensor, among: Sequence[Tensor] = ()) -> bool:
    """Whether tensors besides this one and those of `among` (and, for a window, its buffer) use its storage."""
    storage = tensor.untyped_storage()._cdata
    ours = sum(other.untyped_storage()._cdata == storage for other in among) if among else 1
    return torch._C._storage_Use_Count(storage) - 1 > ours  # the count itself holds it once


def dense(gradient: Tensor, view: Tensor) -> Tensor:
    """A gradient as real numbers one after the other, in the memory order of the parameter's view."""
    lazy = gradient.is_conj() or gradient.is_neg()
    if lazy or gradient.stride() != view.stride() or gradient.dtype not in (view.dtype, torch.bfloat16):
        gradient = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=view.device).copy_(gradient)
    if gradient.is_contiguous() and not gradient.is_complex():
        return gradient
    flat = gradient.as_strided((gradient.numel(),), (1,))
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def _plain(gradient: Tensor) -> bool:
    return gradient.dtype == torch.float32 and gradient.is_contiguous() and not gradient.is_neg()


class Bucket:
    """Flat buffers for T tensors of one device and dtype.

    The buffers of P elements: `param`, `grad`, `exp_avg`, `exp_avg_sq`, and `ema` or None; the last three are float32
    where the parameters are half precision (in float16 (1 - beta2) g^2 is zero for gradients below 5e-3). `state`,
    `hyper`: see layout.py. `ring` (R, T, 4): the telemetry of the last R steps, in the slot (step mod R); `ring_steps`
    (R,) float64: the number of the step in each slot, 0 where there is none yet.
    Nothing here reads from the device.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        groups: Sequence[int],
        group_count: int,
        backend: str,
        with_ema: bool,
        records: int,
    ) -> None:
        device, dtype = like[0].device, real_dtype(like[0])
        self.backend, self._kernels = backend, backends()[backend]
        self._groups = list(groups)
        self.numels = [real_numel(tensor) for tensor in like]
        self._live: tuple[bool, ...] = ()
        self._tables: dict[tuple[bool, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.starts = self._starts()
        elements = sum(padded(n) for n in self.numels)

        def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=kind, device=device)

        wide = torch.float32 if dtype in _HALF else dtype
        self.param, self.grad = (flat_zeros(elements, dtype, device) for _ in range(2))
        self.exp_avg, self.exp_avg_sq = (flat_zeros(elements, wide, device) for _ in range(2))
        self.ema = flat_zeros(elements, wide, device) if with_ema else None
        self.grads = [view_like(self.grad, start, tensor) for start, tensor in zip(self.starts, like, strict=True)]
        self.params, self.moments1, self.moments2, self.averages = (
            (
                []
                if flat is None
                else [window_like(flat, start, tensor) for start, tensor in zip(self.starts, like, strict=True)]
            )
            for flat in (self.param, self.exp_avg, self.exp_avg_sq, self.ema)
        )

        self._sources: tuple[Tensor, ...] = ()
        self._readable = [view.is_contiguous() and not view.is_complex() for view in self.grads]
        self._addresses, self._lengths = array("q", [view.data_ptr() for view in self.grads]), array("q", self.numels)
        tensors = len(self.numels)
        self.steps = zeros(tensors, kind=torch.float32)
        self.sums = zeros(tensors, 2, kind=torch.float64)
        self.telemetry = zeros(tensors, Telemetry.COUNT, kind=torch.float32)
        self.ring, self.ring_steps = (
            zeros(records, tensors, Telemetry.COUNT, kind=torch.float32),
            zeros(records, kind=torch.float64),
        )
        self.coefficients = zeros(
            tensors, Coefficient.COUNT, kind=torch.float64 if dtype == torch.float64 else torch.float32
        )
        self.hyper = zeros(Hyper.GROUPS + Group.COUNT * group_count, kind=torch.float64)
        fresh = [0.0] * State.COUNT
        fresh[State.CLIP] = fresh[State.SCALE] = fresh[State.EXTERNAL_SCALE] = 1.0
        fresh[State.FIRST_BAD] = -1.0
        self.state = torch.tensor(fresh, dtype=torch.float64, device=device)

    def _starts(self) -> list[int]:
        starts, position = [], 0
        for numel in self.numels:
            starts.append(position)
            position += padded(numel)
        return starts

    @property
    def device(self) -> torch.device:
        return self.param.device

    def attached(self) -> bool:
        """Whether every view for gradients is still over the buffer; moving a module points `.grad.data` elsewhere."""
        return array("q", [view.data_ptr() for view in self.grads]) == self._addresses

    def reattach(self, slot: int) -> None:
        """Brings a view for gradients, with what is in it now, back over the buffer."""
        view = self.grads[slot]
        if view.data_ptr() != self._addresses[slot] or view.dtype != self.params[slot].dtype:
            place = view_like(self.grad, self.starts[slot], self.params[slot])
            view.data = place.copy_(view)

    def set_live(self, live: Sequence[bool]) -> None:
        """Names the tensors that have a gradient; tables of earlier choices are kept, so alternating is cheap."""
        self._live = tuple(live)
        if self._live not in self._tables:
            if len(self._tables) == REMEMBERED:
                self._tables.clear()
            segments, chunks = tables(self.numels, self._groups, live, self._kernels.chunk)
            made = (segments, chunks, *scratch(segments, chunks))
            self._tables[self._live] = tuple(t.to(self.device) for t in made)  # type: ignore[assignment]
        self.work = self.segments, self.chunks, self.partial, self.tickets = self._tables[self._live]

    def write_hyper(self, values: Sequence[float]) -> None:
        """Copies the host's values to the device without waiting for it."""
        host = torch.tensor(values, dtype=torch.float64)
        if self.device.type == "cuda":
            host = host.pin_memory()
        self.hyper.copy_(host, non_blocking=True)

    def accumulate(self, gradients: list[Tensor], scale: float, overwrite: bool, norm: bool) -> None:
        """grad <- (0 or grad) + scale * gradients, `dense` ones, empty where there is none; `norm`: with pass one."""
        self._kernels.accumulate(
            gradients, self.starts, self.grad, self.chunks, self.segments, self.partial, self.sums, self.state, self.tickets,
            scale, overwrite, norm,
        )  # fmt: skip

    def take(self, gradients: Sequence[Tensor | None], in_place: bool) -> bool:
        """Where the next step finds the gradients, one for each tensor; True if it reads any outside the buffer.

        in_place: gradients outside are left there. Only the C++ reads them so, and only in the buffer's memory order
        and dtype; others are copied.
        """
        self._sources = ()
        if not gradients:
            return False
        outside = [
            i for i, (g, view) in enumerate(zip(gradients, self.grads, strict=True)) if g is not None and g is not view
        ]
        if in_place and self.backend == "native":
            copied = [i for i in outside if not (self._readable[i] and _plain(gradients[i]))]
        else:
            copied = outside
        if copied:
            torch._foreach_copy_([self.grads[i] for i in copied], [gradients[i] for i in copied])
        if len(copied) == len(outside):
            return False
        at, copied_too = self._addresses[:], set(copied)
        for i in outside:
            if i not in copied_too:
                at[i] = gradients[i].data_ptr()
        self._sources = (torch.frombuffer(at + self._lengths, dtype=torch.int64).view(2, -1),)
        return True

    def measure(self, finish: bool) -> None:
        """Pass one; with `finish` also the decision, else only the totals in `state`."""
        self._kernels.measure(
            self.grad, self.chunks, self.segments, self.hyper, self.partial, self.sums, self.telemetry,
            self.steps, self.coefficients, self.state, self.tickets, finish, *self._sources,
        )  # fmt: skip

    def decide(self) -> None:
        """Norm, skip, clip, counters and coefficients from the totals in `state`."""
        self._kernels.decide(
            self.segments, self.hyper, self.sums, self.telemetry, self.steps, self.coefficients, self.state
        )

    def apply(self, clear: bool) -> None:
        """Pass two."""
        self._kernels.apply(
            self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.ema, self.chunks, self.segments, self.hyper,
            self.partial, self.telemetry, self.coefficients, self.state, self.tickets, clear, *self._sources,
        )  # fmt: skip

    def average_rest(self) -> None:
        """The average of tensors without a gradient, which no pass reads, goes on towards their weights."""
        if self.ema is None or all(self._live) or not self.ema.is_floating_point():
            return
        weight = (self.state[State.EMA_WEIGHT] * (1 - self.state[State.SKIP])).to(self.ema.dtype)
        for begin, end in self._rest():
            self.ema[begin:end].lerp_(self.param[begin:end].to(self.ema.dtype), weight)

    def _rest(self) -> Iterator[tuple[int, int]]:
        """First and last element of each run of neighbours without a gradient."""
        ends = [start + padded(numel) for start, numel in zip(self.starts, self.numels, strict=True)]
        for live, run in groupby(range(len(ends)), key=self._live.__getitem__):
            if not live:
                members = list(run)
                yield self.starts[members[0]], ends[members[-1]]

    def record(self) -> None:
        """Copies the telemetry of the step that was just made into the ring. Its slot comes from the device's own count
        of steps, so that every replay of a CUDA graph finds its own."""
        step = self.state[State.ATTEMPTED : State.ATTEMPTED + 1]
        slot = step.remainder(len(self.ring)).long()
        self.ring.index_copy_(0, slot, self.telemetry[None])
        self.ring_steps.index_copy_(0, slot, step)


def run_step(buckets: Sequence[Bucket], clear: bool, measured: bool) -> None:
    """One step over all buckets, with one norm and one decision for all of them, and no host read.

    measured: pass one was folded into the last accumulation, so only the decision is left.
    """
    alone = len(buckets) == 1
    for bucket in buckets:
        if not measured:
            bucket.measure(finish=alone)
    if not alone:
        _share_totals(buckets)
    if measured or not alone:
        for bucket in buckets:
            bucket.decide()
    for bucket in buckets:
        bucket.apply(clear)
        bucket.average_rest()


def _share_totals(buckets: Sequence[Bucket]) -> None:
    """Every bucket gets the sum of squares and the non-finite count over all of them."""
    totals = slice(State.SUMSQ, State.BAD + 1)
    first = buckets[0].device
    total = torch.stack([bucket.state[totals].to(first, non_blocking=True) for bucket in buckets]).sum(0)
    for bucket in buckets:
        bucket.state[totals].copy_(total, non_blocking=True)
