"""Bucket: the tensors of one device and dtype in flat buffers; adamw_step: the calls of the fused kernels over them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import Coefficient, Group, Hyper, State, Telemetry, padded, scratch, tables
from ris_fast.kernels.fused_step.op import backends
from ris_fast.training.optim.views import flat_zeros, real_dtype, real_numel, view_like, window_like

REMEMBERED = 64  # choices of tensors with a gradient, whose tables are kept
_HALF = (torch.bfloat16, torch.float16)


class Bucket:
    """Flat buffers for T tensors of one device and dtype.

    The buffers of P elements: `param`, `grad`, `exp_avg`, `exp_avg_sq`, and `ema` or None; the last three are float32
    where the parameters are half precision (in float16 (1 - beta2) g^2 is zero for gradients below 5e-3). `state`,
    `hyper`: see layout.py. `ring` (R, T, 4): the telemetry of the last R steps, in the slot (step mod R); `ring_steps`
    (R,) float64: the number of the step in each slot, 0 where there is none yet. Nothing here reads from the device.
    """

    def __init__(
        self, like: Sequence[Tensor], groups: Sequence[int], group_count: int, backend: str, with_ema: bool,
        records: int,
    ) -> None:  # fmt: skip
        self.device, dtype = like[0].device, real_dtype(like[0])
        self.backend, self._kernels, self._groups = backend, backends()[backend], list(groups)
        self.numels = [real_numel(tensor) for tensor in like]
        *self.starts, elements = accumulate(map(padded, self.numels), initial=0)
        self._ends = [*self.starts[1:], elements]
        self.tables: dict[tuple[bool, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._active: tuple[bool, ...] = ()
        self._written: Sequence[float] = ()
        self._had_scaler = True  # so that the first step without one writes the neutral values

        def zeros(*shape: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=kind, device=self.device)

        wide = torch.float32 if dtype in _HALF else dtype
        self.param, self.grad = (flat_zeros(elements, dtype, self.device) for _ in range(2))
        self.exp_avg, self.exp_avg_sq = (flat_zeros(elements, wide, self.device) for _ in range(2))
        self.ema = flat_zeros(elements, wide, self.device) if with_ema else None
        self.grads = [view_like(self.grad, start, tensor) for start, tensor in zip(self.starts, like, strict=True)]
        self.params, self.moments1, self.moments2, self.averages = (
            [window_like(flat, *each) for each in zip(self.starts, like, strict=True) if flat is not None]
            for flat in (self.param, self.exp_avg, self.exp_avg_sq, self.ema)
        )
        self._sources: tuple[Tensor, ...] = ()
        self._readable = [view.is_contiguous() and not view.is_complex() for view in self.grads]
        self._addresses, self._lengths = array("q", [view.data_ptr() for view in self.grads]), array("q", self.numels)
        tensors = len(self.numels)
        self.steps = zeros(tensors, kind=torch.float32)
        self.sums = zeros(tensors, 2, kind=torch.float64)
        self.telemetry = zeros(tensors, Telemetry.COUNT, kind=torch.float32)
        self.ring = zeros(records, tensors, Telemetry.COUNT, kind=torch.float32)
        self.ring_steps = zeros(records, kind=torch.float64)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.coefficients = zeros(tensors, Coefficient.COUNT, kind=exact)
        self.hyper = zeros(Hyper.GROUPS + Group.COUNT * group_count, kind=torch.float64)
        fresh = [0.0] * State.COUNT
        fresh[State.CLIP] = fresh[State.SCALE] = fresh[State.EXTERNAL_SCALE] = 1.0
        fresh[State.FIRST_BAD] = -1.0
        self.state = torch.tensor(fresh, dtype=torch.float64, device=self.device)

    def attached(self) -> bool:
        """Whether every gradient view is still in the buffer; moving a module points `.grad.data` elsewhere."""
        return array("q", [view.data_ptr() for view in self.grads]) == self._addresses

    def reattach(self, slot: int) -> None:
        """Moves a gradient view that `.grad.data =` pointed elsewhere, with its values, back into the buffer."""
        view = self.grads[slot]
        if view.data_ptr() != self._addresses[slot] or view.dtype != self.params[slot].dtype:
            view.data = view_like(self.grad, self.starts[slot], self.params[slot]).copy_(view)

    def set_active(self, active: Sequence[bool]) -> None:
        """Selects the tensors that have a gradient. Tables of earlier choices are kept, so alternating is cheap."""
        self._active = tuple(active)
        if self._active not in self.tables:
            if len(self.tables) == REMEMBERED:
                self.tables.clear()
            segments, chunks = tables(self.numels, self._groups, active, self._kernels.chunk)
            made = (segments, chunks, *scratch(segments, chunks))
            self.tables[self._active] = tuple(t.to(self.device) for t in made)  # type: ignore[assignment]
        self.work = self.segments, self.chunks, self.partial, self.tickets = self.tables[self._active]

    def write_hyper(self, values: Sequence[float], on_device: Sequence[tuple[int, Tensor]]) -> None:
        """Sends `values`, if they changed, and tensors that live on the device, by slot, without waiting for it."""
        if values != self._written:
            host = torch.tensor(values, dtype=torch.float64)
            self.hyper.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)
            self._written = values
        for slot, tensor in on_device:
            self.hyper[slot].copy_(tensor.squeeze(), non_blocking=True)

    def write_scaler(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Hands scale and overflow flag of a torch.amp.GradScaler, present only during its step, to the kernels."""
        has_scaler = scale is not None or found_inf is not None
        if has_scaler or self._had_scaler:
            for slot, value, neutral in ((State.EXTERNAL_SCALE, scale, 1.0), (State.EXTERNAL_BAD, found_inf, 0.0)):
                at = self.state[slot]
                at.fill_(neutral) if value is None else at.copy_(value.squeeze(), non_blocking=True)
        self._had_scaler = has_scaler

    def accumulate(self, gradients: list[Tensor], scale: float, overwrite: bool, norm: bool) -> None:
        """grad <- (0 if overwrite else grad) + scale * gradients, one `dense` tensor each, empty where there is none.

        norm: computes the sums of pass one as well."""
        self._kernels.accumulate(
            gradients, self.starts, self.grad, self.chunks, self.segments, self.partial, self.sums, self.state,
            self.tickets, scale, overwrite, norm,
        )  # fmt: skip

    def take(self, gradients: Sequence[Tensor | None], in_place: bool) -> bool:
        """Notes where the next step reads the gradient of each tensor; True if it reads any outside the buffer.

        in_place: leaves gradients outside the buffer where they are. Only the C++ kernels can read them there, and
        only in the buffer's memory order and dtype; all others are copied into the buffer.
        """
        self._sources = ()
        pairs = enumerate(zip(gradients, self.grads, strict=True))
        outside = [i for i, (grad, view) in pairs if grad is not None and grad is not view]
        direct = in_place and self.backend == "native"
        copied = [i for i in outside if not (direct and self._readable[i] and _plain(gradients[i]))]
        if copied:
            torch._foreach_copy_([self.grads[i] for i in copied], [gradients[i] for i in copied])
        if len(copied) == len(outside):
            return False
        at = self._addresses[:]
        for i in set(outside).difference(copied):
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
        """Moves the average of tensors without a gradient, which no pass reads, towards their weights."""
        if self.ema is None or all(self._active) or not self.ema.is_floating_point():
            return
        weight = (self.state[State.EMA_WEIGHT] * (1 - self.state[State.SKIP])).to(self.ema.dtype)
        for active, run in groupby(range(len(self.starts)), key=self._active.__getitem__):
            if not active:
                neighbours = list(run)
                rest = slice(self.starts[neighbours[0]], self._ends[neighbours[-1]])
                self.ema[rest].lerp_(self.param[rest].to(self.ema.dtype), weight)

    def record(self) -> None:
        """Copies the telemetry of the last step into the ring, to a slot that the device counts: so that each replay of
        a CUDA graph writes its own."""
        step = self.state[State.ATTEMPTED : State.ATTEMPTED + 1]
        slot = step.remainder(len(self.ring)).long()
        self.ring.index_copy_(0, slot, self.telemetry[None])
        self.ring_steps.index_copy_(0, slot, step)


def _plain(gradient: Tensor) -> bool:
    return gradient.dtype == torch.float32 and gradient.is_contiguous() and not gradient.is_neg()


def adamw_step(buckets: Sequence[Bucket], clear: bool, measured: bool, record: bool) -> None:
    """Norm, clipping, AdamW, averaging and clearing in two passes over memory, without a host read.

    Pass one takes the norm of all gradients, and counts elements that are not finite: if there is one, the step is
    skipped. Pass two computes, for every element of tensors with a gradient (t: steps of the tensor so far),

        g <- clip / scale * grad,   negative with maximize   (+ weight_decay * p for Adam)
        exp_avg    <- beta1 exp_avg + (1 - beta1) g
        exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) g^2
        p   <- (1 - lr weight_decay) p - lr exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        ema <- ema_decay ema + (1 - ema_decay) p

    Args:
        clear: leaves the gradients zero.
        measured: the last accumulation did the sums of pass one, so only the decision is left.
        record: copies the telemetry of the step into the ring.
    """
    alone = len(buckets) == 1
    for bucket in () if measured else buckets:
        bucket.measure(finish=alone)
    if not alone:  # every bucket gets the sum of squares and the non-finite count over all of them
        totals, first = slice(State.SUMSQ, State.BAD + 1), buckets[0].device
        total = torch.stack([bucket.state[totals].to(first, non_blocking=True) for bucket in buckets]).sum(0)
        for bucket in buckets:
            bucket.state[totals].copy_(total, non_blocking=True)
    if measured or not alone:
        for bucket in buckets:
            bucket.decide()
    for bucket in buckets:
        bucket.apply(clear)
        bucket.average_rest()
        if record:
            bucket.record()
