"""FusedAdamW: AdamW with norm, clipping, non-finite check, averaging and clearing in two passes, as a torch Optimizer."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.arguments import check_arguments, choose_backend, host_values, tensor_names
from ris_fast.training.flat import Bucket, real_dtype, run_step

_OPTIONS = ("max_grad_norm", "ema_decay", "ema_warmup", "loss_scale", "clear_grads", "measure_telemetry", "wanted_backend")
_EXTRA = "ris_fast"  # key in state_dict that torch.optim.AdamW ignores


class FusedAdamW(Optimizer):
    """AdamW on flat buffers: a drop-in for `torch.optim.AdamW` that also clips, checks, averages and reports.

    Parameters are moved into one flat buffer per device and dtype (their `.data` become views); after its first
    gradient a parameter's `.grad` is a view too. A parameter whose `.grad` is None is left alone, as in torch.
    A step with a non-finite gradient changes no weight, moment or average, and is counted.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW. `lr` may be a tensor.
        foreach, fused, capturable: accepted and without effect; there is one implementation and it is all of these.
        amsgrad, differentiable: refused.
        decoupled_weight_decay: False gives Adam with an L2 penalty.
        max_grad_norm: clips the global norm as torch.nn.utils.clip_grad_norm_ does; None: no clipping. `.grad` itself
            stays unclipped and unscaled.
        ema_decay: keeps an exponential moving average of the weights; None: none. It starts from the weights as they
            are at the first step.
        ema_warmup: limits the decay to (1 + t) / (10 + t) after t applied steps, which removes the starting bias.
        loss_scale: None, a number, or "dynamic" (float16): multiply the loss by it with `scale`; steps unscale.
        clear_grads: the step leaves gradients zero; otherwise they stay, as in torch.
        telemetry: measures weight and update norms per tensor (gradient norms are always there).
        backend: "auto", "native" (C++), "triton" (CUDA) or "reference" (plain torch).
    Raises:
        ValueError, RuntimeError: on arguments or parameters that it cannot serve; says which and what to do.
    Numerics: bias corrections and norms in float64; half-precision parameters are updated in float32 and averaged in float32.
    CUDA graphs: after one eager step, `step()` can be captured. Change learning rate, `max_grad_norm` or `ema_decay`
        between replays and call `sync_hyperparameters()`.
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
        backend: str = "auto",
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        check_arguments(defaults, max_grad_norm, ema_decay, loss_scale, backend)
        self.max_grad_norm, self.ema_decay, self.ema_warmup = max_grad_norm, ema_decay, ema_warmup
        self.loss_scale, self.clear_grads, self.measure_telemetry = loss_scale, clear_grads, telemetry
        self.wanted_backend = backend
        self._built, self._host_applied = False, 0
        super().__init__(params, defaults)
        self._build()

    # ---- buffers -------------------------------------------------------------------------------------------------

    def _build(self, extra: Mapping[str, Tensor] | None = None) -> None:
        """Moves every parameter, with what is known about it, into new flat buffers."""
        extra = self.extra_state() if self._built else (extra or {})
        order = [(p, g) for g, group in enumerate(self.param_groups) for p in group["params"]]
        self._params = [p for p, _ in order]
        self.tensor_names = tensor_names(self.param_groups)
        kinds = list(dict.fromkeys((p.device, real_dtype(p)) for p in self._params))
        rows = [[i for i, p in enumerate(self._params) if (p.device, real_dtype(p)) == kind] for kind in kinds]
        self._buckets = [
            Bucket(
                [self._params[i].detach() for i in members],
                [order[i][1] for i in members],
                len(self.param_groups),
                choose_backend(self.wanted_backend, *kind),
                self.ema_decay is not None,
            )
            for kind, members in zip(kinds, rows, strict=True)
        ]
        self._rows = rows
        self._place = {i: (b, slot) for b, members in zip(self._buckets, rows, strict=True) for slot, i in enumerate(members)}
        self._grad_views = [self._place[i][0].grads[self._place[i][1]] for i in range(len(self._params))]
        with torch.no_grad():
            for i, p in enumerate(self._params):
                self._move_in(i, p)
        self._pointers = [p.data_ptr() for p in self._params]
        self._expected: list[Tensor | None] = [None] * len(self._params)
        self._pushed: tuple[float, ...] = ()
        self._swapped = self._external = False
        self._stepped = self._averaging = False
        self._clear_version: list[int] = []
        self._built = True
        self._write_scale()
        if extra:
            self.load_extra_state(extra)

    def _move_in(self, i: int, p: Tensor) -> None:
        bucket, slot = self._place[i]
        bucket.params[slot].copy_(p)
        p.data = bucket.params[slot]
        saved = self.state.get(p)
        if saved:
            bucket.moments1[slot].copy_(saved["exp_avg"])
            bucket.moments2[slot].copy_(saved["exp_avg_sq"])
            bucket.steps[slot] = float(saved["step"])
            self._expose(i)

    def _expose(self, i: int) -> None:
        """Puts the views of the moments where torch keeps its state."""
        bucket, slot = self._place[i]
        self.state[self._params[i]] = dict(step=bucket.steps[slot], exp_avg=bucket.moments1[slot], exp_avg_sq=bucket.moments2[slot])

    @property
    def backend(self) -> str:
        """Implementation in use; several joined by + where the parameters are of several kinds."""
        return "+".join(dict.fromkeys(bucket.backend for bucket in self._buckets))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Flat buffers are laid out again: capture CUDA graphs afterwards."""
        super().add_param_group(param_group)
        if self.__dict__.get("_built"):
            group = self.param_groups[-1]
            try:
                check_arguments(group, self.max_grad_norm, self.ema_decay, self.loss_scale, self.wanted_backend)
            except Exception:
                self.param_groups.pop()
                raise
            self._build()

    def rebind(self) -> None:
        """Takes the parameters where they are now (after `model.to(...)`), moments and averages with them."""
        self._build()

    # ---- the step ------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns what `closure` returned. No host read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_parameters()
        if not self._take_gradients():
            warnings.warn(
                "FusedAdamW.step: no parameter has a gradient, so nothing was updated. Was backward called, and does the "
                "optimizer hold the parameters of the model that trains (not of a copy)?",
                RuntimeWarning,
                stacklevel=3,
            )
            return loss
        if not self._capturing():
            self.sync_hyperparameters()
            self._start_average()
        self._take_scaler()
        run_step(self._buckets, self.clear_grads)
        torch.autograd.graph.increment_version([p for p, g in zip(self._params, self._expected, strict=True) if g is not None])
        self._stepped = True
        self._host_applied += 1
        self._clear_version = [bucket.grad._version for bucket in self._buckets] if self.clear_grads else []
        return loss

    def _capturing(self) -> bool:
        return any(b.device.type == "cuda" for b in self._buckets) and torch.cuda.is_current_stream_capturing()

    def _check_parameters(self) -> None:
        """Raises if the weights are swapped or no longer in the flat buffers; follows a move before the first step."""
        if self._swapped:
            raise RuntimeError("FusedAdamW.step: called inside `with optimizer.ema():`. Step outside, on the raw weights.")
        if [p.data_ptr() for p in self._params] == self._pointers:
            return
        if not self._stepped:
            self._build()
            return
        moved = [name for name, p, at in zip(self.tensor_names, self._params, self._pointers, strict=True) if p.data_ptr() != at]
        raise RuntimeError(
            f"FusedAdamW.step: {len(moved)} of {len(self._params)} parameters (first: {moved[0]}) left the flat buffer: the model was moved "
            "(.to, .cuda, .half), given to another FusedAdamW, or its .data replaced after the first step. "
            "Move the model before the first step, or call optimizer.rebind()."
        )

    def _take_gradients(self) -> bool:
        """Makes every gradient a view into the flat buffer; False if there is none at all."""
        if all(p.grad is seen for p, seen in zip(self._params, self._expected, strict=True)) and self._expected:
            return any(seen is not None for seen in self._expected)
        if self._capturing():
            missing = [n for n, p, v in zip(self.tensor_names, self._params, self._grad_views, strict=True) if p.requires_grad and p.grad is not v]
            raise RuntimeError(f"FusedAdamW.step: captured while gradients are not in the flat buffer ({', '.join(missing[:3])}). Step once before capturing and use optimizer.zero_grad().")
        foreign: list[tuple[Tensor, Tensor]] = []
        for i, (p, view) in enumerate(zip(self._params, self._grad_views, strict=True)):
            grad = p.grad
            if grad is None or grad is view:
                self._expected[i] = grad
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"FusedAdamW.step: the gradient of {self.tensor_names[i]} is {grad.layout}; sparse gradients are not supported. Use Embedding(sparse=False) or torch.optim.SparseAdam for it.")
            foreign.append((view, grad))
            self._expected[i] = view
        if foreign:
            torch._foreach_copy_([view for view, _ in foreign], [grad for _, grad in foreign])
        self._attach()
        return any(seen is not None for seen in self._expected)

    def _attach(self) -> None:
        """Makes `.grad`, the state that torch shows and the tables of work agree with what `_expected` says."""
        for i, (p, seen) in enumerate(zip(self._params, self._expected, strict=True)):
            p.grad = seen
            if seen is not None and p not in self.state:
                self._expose(i)
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            bucket.set_live([self._expected[i] is not None for i in members])

    def attach_gradients(self) -> None:
        """Gives every trainable parameter its zeroed gradient view now, so that the first backward needs no copy.

        A parameter that no loss reaches then has gradient zero instead of None, and its weight decays.
        """
        for bucket in self._buckets:
            bucket.grad.zero_()
        self._expected = [view if p.requires_grad else None for p, view in zip(self._params, self._grad_views, strict=True)]
        self._attach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients. The views stay in place either way; costs nothing right after a step with `clear_grads`."""
        for p, view in zip(self._params, self._grad_views, strict=True):
            if p.grad is not None and p.grad is not view:
                p.grad = None if set_to_none else torch.zeros_like(p.grad)
        if self._clear_version != [bucket.grad._version for bucket in self._buckets]:
            for bucket in self._buckets:
                bucket.grad.zero_()

    # ---- hyperparameters and loss scale ---------------------------------------------------------------------------

    def sync_hyperparameters(self) -> None:
        """Sends what changed of lr, betas, eps, weight decay, clip threshold and EMA decay to the device; no waiting."""
        values, on_device = host_values(self)
        if values != self._pushed:
            for bucket in self._buckets:
                bucket.write_hyper(values)
            self._pushed = values
        for slot, tensor in on_device:
            for bucket in self._buckets:
                bucket.hyper[slot].copy_(tensor, non_blocking=True)

    def _write_scale(self) -> None:
        if self.loss_scale is not None:
            for bucket in self._buckets:
                bucket.state[State.SCALE] = 65536.0 if self.loss_scale == "dynamic" else float(self.loss_scale)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the current loss scale; call backward on the result."""
        return loss * self._buckets[0].state[State.SCALE].to(loss.device, torch.float32)

    def _take_scaler(self) -> None:
        """Hands the scale and overflow flag of a torch.amp.GradScaler, present only during its step, to the device."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None and not self._external:
            return
        self._external = scale is not None or found is not None
        for bucket in self._buckets:
            bucket.state[State.EXTERNAL_SCALE] = 1.0 if scale is None else scale.to(bucket.device)
            bucket.state[State.EXTERNAL_BAD] = 0.0 if found is None else found.to(bucket.device)

    # ---- averages and readings -------------------------------------------------------------------------------------

    def _start_average(self) -> None:
        if self.ema_decay is not None and not self._averaging:
            for bucket in self._buckets:
                bucket.ema.copy_(bucket.param)
            self._averaging = True

    @contextmanager
    @torch.no_grad()
    def ema(self) -> Iterator[None]:
        """Averaged weights inside the block; the raw weights come back bit for bit, whatever happens inside."""
        if self.ema_decay is None:
            raise RuntimeError("FusedAdamW.ema: there is no average. Build the optimizer with ema_decay=0.999, say.")
        if self._swapped:
            raise RuntimeError("FusedAdamW.ema: the averaged weights are already in.")
        self._start_average()
        raw = [bucket.param.clone() for bucket in self._buckets]
        self._swapped = True
        try:
            for bucket in self._buckets:
                bucket.param.copy_(bucket.ema)
            with torch.enable_grad():
                yield
        finally:
            with torch.no_grad():
                for bucket, saved in zip(self._buckets, raw, strict=True):
                    bucket.param.copy_(saved)
            self._swapped = False

    def counters(self) -> dict[str, Any]:
        """Steps attempted, applied, skipped, clipped; last gradient norm; first bad tensor of the last skipped step."""
        states = torch.stack([bucket.state.to(self._buckets[0].device) for bucket in self._buckets]).tolist()
        first = states[0]
        self._host_applied = int(first[State.APPLIED])
        bad = [members[int(s[State.FIRST_BAD])] for s, members in zip(states, self._rows, strict=True) if s[State.FIRST_BAD] >= 0]
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
        """Applied steps without a host read: exact at the last `counters()`, since then every step counts as applied."""
        return self._host_applied

    def telemetry(self) -> Tensor:
        """(T, 4) float32, a row for each of `tensor_names`: gradient norm before clipping, weight norm, update norm, non-finite count."""
        if not self.measure_telemetry:
            raise RuntimeError("FusedAdamW.telemetry: switched off. Set optimizer.measure_telemetry = True.")
        if len(self._buckets) == 1:
            return self._buckets[0].telemetry.clone()
        device = self._buckets[0].device
        table = torch.empty(len(self._params), 4, dtype=torch.float32, device=device)
        for bucket, members in zip(self._buckets, self._rows, strict=True):
            table[members] = bucket.telemetry.to(device)
        return table

    # ---- saving ----------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Tensor]:
        """What torch's AdamW does not know: "counters" (16,) float64 and "ema.NAME" per tensor; views, not copies."""
        saved = {"counters": self._buckets[0].state}
        if self._averaging:
            saved |= {f"ema.{name}": self._place[i][0].averages[self._place[i][1]] for i, name in enumerate(self.tensor_names)}
        return saved

    @torch.no_grad()
    def load_extra_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `extra_state`; tensors that it does not name keep the average they have."""
        for bucket in self._buckets:
            bucket.state.copy_(saved["counters"])
        self._host_applied = int(saved["counters"][State.APPLIED])
        if self.ema_decay is None or not any(key.startswith("ema.") for key in saved):
            return
        self._start_average()
        for i, name in enumerate(self.tensor_names):
            if f"ema.{name}" in saved:
                self._place[i][0].averages[self._place[i][1]].copy_(saved[f"ema.{name}"])

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything but hyperparameters as {"optimizer": name -> tensor}, for files that hold tensors only."""
        saved = dict(self.extra_state())
        for name, p in zip(self.tensor_names, self._params, strict=True):
            saved |= {f"{key}.{name}": value for key, value in self.state.get(p, {}).items()}
        return {"optimizer": saved}

    @torch.no_grad()
    def load_checkpoint_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `checkpoint_tensors` into an optimizer with the same parameters."""
        saved = groups["optimizer"]
        keys = ("step", "exp_avg", "exp_avg_sq")
        states = {
            i: {key: saved[f"{key}.{name}"] for key in keys} for i, name in enumerate(self.tensor_names) if f"step.{name}" in saved
        }
        self._load_moments({self._params[i]: state for i, state in states.items()})
        self.load_extra_state(saved)

    def _load_moments(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Copies step and moments into the flat buffers; a tensor without any starts from zero."""
        self.state = defaultdict(dict)
        for i, p in enumerate(self._params):
            bucket, slot = self._place[i]
            saved = loaded.get(p)
            if not saved:
                bucket.moments1[slot].zero_(), bucket.moments2[slot].zero_(), bucket.steps[slot].zero_()
                continue
            bucket.moments1[slot].copy_(saved["exp_avg"])
            bucket.moments2[slot].copy_(saved["exp_avg_sq"])
            bucket.steps[slot].copy_(torch.as_tensor(saved["step"]))
            self._expose(i)
        self._stepped = bool(self.state) or self._stepped

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which can load it; the extra state rides along under a key that torch ignores."""
        return super().state_dict() | {_EXTRA: self.extra_state()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of FusedAdamW or torch.optim.AdamW."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("FusedAdamW.load_state_dict: the saved optimizer used amsgrad, which FusedAdamW does not have.")
        super().load_state_dict(state_dict)
        self._load_moments(self.state)
        if _EXTRA in state_dict:
            self.load_extra_state(state_dict[_EXTRA])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_options": {name: getattr(self, name) for name in _OPTIONS}, "_extra": self.extra_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by load_state_dict (without options) and by unpickling and deepcopy (with them)."""
        options, extra = state.pop("_options", None), state.pop("_extra", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if options is not None:
            self.__dict__.update(options)
            self._built, self._host_applied = False, 0
            self._build(extra)
