"""Bucket: the tensors of one device and dtype in flat buffers, and the passes of the fused step over them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby

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
        self._active: tuple[bool, ...] = ()
        self.tables: dict[tuple[bool, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
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

    def write_hyper(self, values: Sequence[float]) -> None:
        """Copies the host's hyperparameters to the device without waiting for it."""
        host = torch.tensor(values, dtype=torch.float64)
        if self.device.type == "cuda":
            host = host.pin_memory()
        self.hyper.copy_(host, non_blocking=True)

    def write_scaler(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Hands scale and overflow flag of a torch.amp.GradScaler to the step; None where there is none."""
        for slot, value, neutral in ((State.EXTERNAL_SCALE, scale, 1.0), (State.EXTERNAL_BAD, found_inf, 0.0)):
            if value is None:
                self.state[slot].fill_(neutral)
            else:
                self.state[slot].copy_(value.squeeze(), non_blocking=True)

    def accumulate(self, gradients: list[Tensor], scale: float, overwrite: bool, norm: bool) -> None:
        """grad <- (0 if overwrite else grad) + scale * gradients, one `dense` tensor each, empty where there is none.

        norm: computes the sums of pass one as well.
        """
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
        """Moves the average of tensors without a gradient, which no pass reads, towards their weights."""
        if self.ema is None or all(self._active) or not self.ema.is_floating_point():
            return
        weight = (self.state[State.EMA_WEIGHT] * (1 - self.state[State.SKIP])).to(self.ema.dtype)
        for begin, end in self._rest():
            self.ema[begin:end].lerp_(self.param[begin:end].to(self.ema.dtype), weight)

    def _rest(self) -> Iterator[tuple[int, int]]:
        """First and last element of each run of neighbours without a gradient."""
        ends = [start + padded(numel) for start, numel in zip(self.starts, self.numels, strict=True)]
        for active, run in groupby(range(len(ends)), key=self._active.__getitem__):
            if not active:
                members = list(run)
                yield self.starts[members[0]], ends[members[-1]]

    def record(self) -> None:
        """Copies the telemetry of the last step into the ring.

        The slot comes from the device's own count of steps, so each replay of a CUDA graph writes a slot of its own.
        """
        step = self.state[State.ATTEMPTED : State.ATTEMPTED + 1]
        slot = step.remainder(len(self.ring)).long()
        self.ring.index_copy_(0, slot, self.telemetry[None])
        self.ring_steps.index_copy_(0, slot, step)


def _plain(gradient: Tensor) -> bool:
    return gradient.dtype == torch.float32 and gradient.is_contiguous() and not gradient.is_neg()
