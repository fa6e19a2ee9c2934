"""FusedAdamW: AdamW with norm, clipping, non-finite check, averaging and clearing in two passes, as a torch
Optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import check_flags, check_group, check_options, check_records, host_values
from ris_fast.training.optim.flat_buffers import run_step
from ris_fast.training.optim.state_dict import SavedOptimizer

FIRST_SCALE = 65536.0  # of a dynamic loss scale, as in torch.amp.GradScaler


class FusedAdamW(SavedOptimizer):
    """AdamW on flat buffers: a drop-in for `torch.optim.AdamW` that also clips, checks, averages and reports.

    Parameters are moved into one flat buffer per device and dtype: their `.data` become views, and what shared memory
    with them before (a detached alias, another process) sees no step. Between steps everything is as in torch, or
    refused by an
    error: tests/training/optim/test_optimizer_habits.py is the table. A parameter whose `.grad` is None is left alone; only
    its average moves on towards it. A step with a non-finite gradient changes no weight, moment or average, and is
    counted.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; eps must not be 0. `lr` may be a
        tensor. foreach, fused, capturable: accepted and without effect; there is one implementation and it is all of
        these. amsgrad, differentiable: refused.
        decoupled_weight_decay: False gives Adam with an L2 penalty.
        max_grad_norm: clips the global norm as torch.nn.utils.clip_grad_norm_ does; None: no clipping. `.grad` itself
            stays unclipped and unscaled.
        ema_decay: keeps an exponential moving average of the weights; None: none. It starts from the weights as they
            are at the first step.
        ema_warmup: limits the decay to (1 + t) / (10 + t) after t applied steps, which removes the starting bias.
        loss_scale: None, a number, or "dynamic" (float16): multiply the loss by it with `scale`; steps unscale.
        clear_grads: the step makes `.grad` a view into the flat buffer and leaves it zero; clear with
            `zero_grad(set_to_none=False)`, and a parameter that once had a gradient takes part in every step, as in
            torch after that. Saves one copy of the gradients. Otherwise they stay where and as they are.
        telemetry: measures weight and update norms per tensor (gradient norms are always there).
        records: keeps the telemetry of this many steps on the device, for `records()`; 16 bytes a tensor and step.
        backend: "auto", "native" (C++), "triton" (CUDA) or "reference" (plain torch).
    Raises:
        ValueError, RuntimeError: on arguments or parameters that it cannot serve; says which and what to do.
    Numerics: bias corrections and norms in float64; half-precision parameters have float32 moments and averages.
    CUDA graphs: with `clear_grads`, after one eager step, `step()` can be captured. Change learning rate,
        `max_grad_norm` or `ema_decay` between replays and call `sync_hyperparameters()`. Not yet run on a GPU.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands over grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        loss_scale: float | str | None = None,
        clear_grads: bool = False,
        telemetry: bool = True,
        records: int = 0,
        backend: str = "auto",
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        check_group(defaults)
        check_options(max_grad_norm, ema_decay, loss_scale, backend)
        check_flags(dict(ema_warmup=ema_warmup, clear_grads=clear_grads, telemetry=telemetry))
        check_records(records, telemetry)
        self.max_grad_norm, self._ema_decay, self.ema_warmup = max_grad_norm, ema_decay, ema_warmup
        self.loss_scale, self.clear_grads, self.measure_telemetry = loss_scale, clear_grads, telemetry
        self.wanted_backend, self._record_count = backend, records
        self._reset()
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_group(group)
        self._build()
        if loss_scale is not None:
            for bucket in self._buckets:
                bucket.state[State.SCALE] = FIRST_SCALE if loss_scale == "dynamic" else float(loss_scale)

    def _reset(self) -> None:
        self._built = self._swapped = self._external = False

    def _build(self) -> None:
        super()._build()
        self._pushed: tuple[float, ...] = ()
        self._captured: list[Any] = []

    # ---- the step ------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns what `closure` returned. No host read."""
        if self._swapped:
            raise RuntimeError(
                "FusedAdamW.step: called inside `with optimizer.ema():`. Step outside, on the raw weights."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        if not self._take_gradients():
            warnings.warn(
                "FusedAdamW.step: no parameter has a gradient, so nothing was updated. Was backward called, and does"
                " the optimizer hold the parameters of the model that trains (not of a copy)?",
                RuntimeWarning,
                stacklevel=2,
            )
            return loss
        if not self._capturing():
            self.sync_hyperparameters()
            self._start_average()
        else:
            self._captured.append([bucket.work for bucket in self._buckets])  # a replay reads these tables
        self._take_scaler()
        run_step(self._buckets, self.clear_grads, measured=self._measured == self._versions())
        if self._record_count and self.measure_telemetry:
            for bucket in self._buckets:
                bucket.record()
        self._note_step()
        return loss

    def _note_step(self) -> None:
        """What the host remembers of a step; tells autograd that the weights changed under saved tensors."""
        torch.autograd.graph.increment_version([p for p, live in zip(self._params, self._live, strict=True) if live])
        self._stepped = True
        self._host_attempted += not self._capturing()
        self._measured = []
        self._clear_version = self._versions() if self.clear_grads else []

    # ---- hyperparameters and loss scale ---------------------------------------------------------------------------

    def sync_hyperparameters(self) -> None:
        """Sends what changed of lr, betas, eps, weight decay, clip threshold and EMA decay to the device; no
        waiting."""
        values, on_device = host_values(self)
        if values != self._pushed:
            for bucket in self._buckets:
                bucket.write_hyper(values)
            self._pushed = values
        for slot, tensor in on_device:
            for bucket in self._buckets:
                bucket.hyper[slot].copy_(tensor.squeeze(), non_blocking=True)

    @property
    def ema_decay(self) -> float | None:
        """Decay of the average; can be changed, but not from or to None."""
        return self._ema_decay

    @ema_decay.setter
    def ema_decay(self, value: float | None) -> None:
        if (value is None) != (self._ema_decay is None):
            raise ValueError(
                f"FusedAdamW.ema_decay: cannot change from {self._ema_decay} to {value}. Build the optimizer with or"
                " without an average."
            )
        check_options(None, value, None, "auto")
        self._ema_decay = value

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the current loss scale; call backward on the result."""
        if self.loss_scale is None:
            return loss
        return loss * self._buckets[0].state[State.SCALE].to(loss.device, torch.float32)

    def _take_scaler(self) -> None:
        """Hands the scale and overflow flag of a torch.amp.GradScaler, present only during its step, to the device."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None and not self._external:
            return
        self._external = scale is not None or found is not None
        for bucket in self._buckets:
            for slot, value, neutral in ((State.EXTERNAL_SCALE, scale, 1.0), (State.EXTERNAL_BAD, found, 0.0)):
                (
                    bucket.state[slot].fill_(neutral)
                    if value is None
                    else bucket.state[slot].copy_(value.squeeze(), non_blocking=True)
                )

    # ---- averages and readings -------------------------------------------------------------------------------------

    @contextmanager
    def ema(self) -> Iterator[None]:
        """Averaged weights inside the block; the raw weights come back bit for bit, whatever happens inside.

        They come back where they were: a model that the block moves or casts (`.half()`, `.cuda()`, `.data =`) is back
        on its device and in its dtype afterwards. Loading a state and laying the buffers out again are refused inside.
        """
        if self.ema_decay is None:
            raise RuntimeError("FusedAdamW.ema: there is no average. Build the optimizer with ema_decay=0.999, say.")
        if self._swapped:
            raise RuntimeError("FusedAdamW.ema: the averaged weights are already in.")
        self._follow()
        raw = [bucket.param.clone() for bucket in self._buckets]
        self._swapped = True
        try:
            if self._averaging:
                with torch.no_grad():
                    for bucket in self._buckets:
                        bucket.param.copy_(bucket.ema)
            yield
        finally:
            self._swapped = False
            self._put_back(raw)

    def count_replay(self) -> None:
        """To be called for each replay of a CUDA graph with a step in it: the graph cannot tell the host."""
        self._host_attempted += 1

    def counter_states(self) -> Tensor:
        """What `counters` reads, still on the device: a copy that the next step does not change."""
        return torch.stack([bucket.state.to(self._buckets[0].device) for bucket in self._buckets])

    def counters(self, copied: Tensor | None = None) -> dict[str, Any]:
        """Steps attempted, applied, skipped, clipped; last gradient norm; first bad tensor of the last skipped step.

        One host read; none where `copied`, a copy of `counter_states()` that has reached the host, is given.
        """
        states = (self.counter_states() if copied is None else copied).tolist()
        first = states[0]
        self._known_skipped = int(first[State.SKIPPED])
        if copied is None:
            self._host_attempted = int(first[State.ATTEMPTED])
        bad = [
            members[int(s[State.FIRST_BAD])]
            for s, members in zip(states, self._rows, strict=True)
            if s[State.FIRST_BAD] >= 0
        ]
        return dict(
            attempted=int(first[State.ATTEMPTED]),
            applied=int(first[State.APPLIED]),
            skipped=int(first[State.SKIPPED]),
            clipped=int(first[State.CLIPPED]),
            grad_norm=first[State.NORM],
            loss_scale=first[State.SCALE],
            first_bad_tensor=self.tensor_names[min(bad)] if bad else None,
        )

    def applied_steps(self) -> int:
        """Applied steps without a host read: a step skipped since the last `counters()` counts as applied."""
        return self._host_attempted - self._known_skipped

    def attempted_steps(self) -> int:
        """Attempted steps without a host read, those before a checkpoint that was loaded included."""
        return self._host_attempted

    def telemetry(self) -> Tensor:
        """(T, 4) float32, a row for each of `tensor_names`: gradient norm before clipping, weight norm, update norm,
        non-finite count."""
        if not self.measure_telemetry:
            raise RuntimeError("FusedAdamW.telemetry: switched off. Set optimizer.measure_telemetry = True.")
        return self._by_tensor([bucket.telemetry for bucket in self._buckets])

    def records(self) -> tuple[Tensor, Tensor]:
        """(R, T, 4) float32, `telemetry()` as it was after each of the last R attempted steps, and (R,) float64, their
        numbers.

        R is the option `records`. In no order; number 0: nothing there yet. Copies on the device, without a host read.
        A skipped step has a record too: its gradients as they came, the weights as they stayed, updates of 0.
        """
        return self._by_tensor([bucket.ring for bucket in self._buckets]), self._buckets[0].ring_steps.clone()

    def _by_tensor(self, tables: Sequence[Tensor]) -> Tensor:
        """Tables (..., T of a buffer, 4) as one copy (..., T, 4) in the order of `tensor_names`, on the first buffer's
        device."""
        if len(tables) == 1:
            return tables[0].clone()
        whole = tables[0].new_empty(*tables[0].shape[:-2], len(self._params), tables[0].shape[-1])
        for table, members in zip(tables, self._rows, strict=True):
            whole[..., members, :] = table.to(whole.device)
        return whole

    @torch.no_grad()
    def load_extra_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `extra_state`. Records of the steps made until now are dropped: they are another history's."""
        super().load_extra_state(saved)
        for bucket in self._buckets:
            bucket.ring_steps.zero_()
