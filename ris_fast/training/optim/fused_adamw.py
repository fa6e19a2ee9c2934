"""FusedAdamW: AdamW with norm, clipping, non-finite check, averaging and clearing in two passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim import state_dict as saving
from ris_fast.training.optim.arguments import FIRST_SCALE, check_ema_decay, check_group, check_options, host_values
from ris_fast.training.optim.bucket import Bucket, adamw_step
from ris_fast.training.optim.flat_buffers import FlatBuffers


class FusedAdamW(Optimizer):
    """AdamW on flat buffers: a drop-in for `torch.optim.AdamW` that also clips, checks, averages and reports.

    Parameters move into one flat buffer per device and dtype: their `.data` become views, and what shared memory with
    them before (a detached alias) sees no step. Changes between steps work as in torch, or raise an error: the table is
    tests/training/optim/test_fused_adamw_habits.py. A parameter whose `.grad` is None is left alone; only its average
    moves towards it. A step with a non-finite gradient changes no weight, moment or average, and is counted.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; eps must not be 0, `lr` may be a
            tensor. foreach, fused, capturable: accepted, without effect. amsgrad, differentiable: refused.
        decoupled_weight_decay: False gives Adam with an L2 penalty.
        max_grad_norm: clips the global norm as torch.nn.utils.clip_grad_norm_ does, or None; `.grad` keeps its values.
        ema_decay: keeps an exponential moving average of the weights, which starts at the first step, or None.
        ema_warmup: limits the decay to (1 + t) / (10 + t) after t applied steps, which removes the starting bias.
        loss_scale: None, a number, or "dynamic" (float16): multiply the loss by it with `scale`; steps unscale.
        clear_grads: makes `.grad` a view into the flat buffer, which the step leaves zero; saves one copy. Clear with
            `zero_grad(set_to_none=False)`: as in torch, what once had a gradient then takes part in every step.
        telemetry: measures weight and update norms per tensor (gradient norms are always there).
        records: keeps the telemetry of this many steps on the device, for `records()`; 16 bytes a tensor and step.
        backend: "auto", "native" (C++), "triton" (CUDA) or "reference" (plain torch).
    Raises: ValueError, RuntimeError: on what it cannot serve; says which argument or parameter, and what to do.
    Numerics: bias corrections and norms in float64; half-precision parameters have float32 moments and averages.
    CUDA graphs: with `clear_grads`, `step()` can be captured after one eager step. Change learning rate,
        `max_grad_norm` or `ema_decay` between replays and call `sync_hyperparameters()`. Not yet run on a GPU.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf for its step

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None,
        capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        decoupled_weight_decay: bool = True, max_grad_norm: float | None = None, ema_decay: float | None = None,
        ema_warmup: bool = False, loss_scale: float | str | None = None, clear_grads: bool = False,
        telemetry: bool = True, records: int = 0, backend: str = "auto",
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        check_group(defaults)
        check_options(max_grad_norm, ema_decay, ema_warmup, loss_scale, clear_grads, telemetry, records, backend)
        self.max_grad_norm, self._ema_decay, self.ema_warmup = max_grad_norm, ema_decay, ema_warmup
        self.loss_scale, self.clear_grads, self.measure_telemetry = loss_scale, clear_grads, telemetry
        self.wanted_backend, self._record_count = backend, records
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_group(group)
        self._build()
        for bucket in self.buckets if loss_scale is not None else ():
            bucket.state[State.SCALE] = FIRST_SCALE if loss_scale == "dynamic" else float(loss_scale)

    def _build(self) -> None:
        options = self.wanted_backend, self._ema_decay is not None, self._record_count
        self.buffers = FlatBuffers(self.param_groups, self.state, *options)

    # ---- the step and its gradients ----------------------------------------------------------------------------------

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns what `closure` returned. No host read."""
        buffers, loss = self.buffers, None
        buffers.refuse_inside_ema("step", "Step outside, on the raw weights.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buffers.follow(self.param_groups, self.state)
        if not buffers.take_gradients(self.state, self.clear_grads):
            return loss
        if not buffers.capturing():
            self.sync_hyperparameters()
            buffers.moments.start_average(self.state)
        for bucket in self.buckets:
            bucket.write_scaler(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        record = bool(self._record_count and self.measure_telemetry)
        adamw_step(self.buckets, self.clear_grads, buffers.gradients.measured(), record)
        buffers.note_step(self.clear_grads)
        return loss

    @torch.no_grad()
    def accumulate(
        self, gradients: Sequence[Tensor | None], scale: float = 1.0, *, overwrite: bool = False, last: bool = False
    ) -> None:
        """`.grad` <- (0 if overwrite else .grad) + scale * gradients, in one launch a bucket: for torch.autograd.grad.

        `.grad` is then a view of the buffer, which later steps write to: clone what you keep. gradients: one for each
        parameter, or None. last: measures the sum too, which saves the next step a pass; change no gradient between."""
        buffers = self.buffers
        buffers.follow(self.param_groups, self.state)
        active = buffers.gradients.present(gradients, overwrite)
        buffers.moments.set_active(self.state, active)
        buffers.gradients.accumulate(gradients, active, scale, overwrite, last)

    @torch.no_grad()
    def flat_gradients(self, having: Sequence[int]) -> list[Tensor]:
        """The gradients in the flat buffers, one tensor a bucket: what is written there is what the next step takes.

        having: tensors, by number, that get a gradient of zeros where they have none. For `clear_grads`."""
        buffers = self.buffers
        buffers.follow(self.param_groups, self.state)
        for i in having:
            if (p := buffers.placement.params[i]).grad is None:
                p.grad = buffers.gradients.views[i].zero_()
        buffers.take_gradients(self.state, self.clear_grads)
        for bucket in self.buckets:
            torch.autograd.graph.increment_version(bucket.grad)  # a collective does not count as a write
        return [bucket.grad for bucket in self.buckets]

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With False, clears gradients in the buffers at once; free right after a `clear_grads` step."""
        if set_to_none or not self.buffers.gradients.zero(self.param_groups):
            super().zero_grad(set_to_none)

    def scale(self, loss: Tensor) -> Tensor:
        """`loss` times the current loss scale; call backward on the result."""
        if self.loss_scale is None:
            return loss
        return loss * self.buckets[0].state[State.SCALE].to(loss.device, torch.float32)

    @property
    def buckets(self) -> list[Bucket]:
        """The flat buffers, one `Bucket` per device and dtype; others once the buffers are laid out again."""
        return self.buffers.placement.buckets

    @property
    def tensor_names(self) -> list[str]:
        """A name for each tensor of all groups in order: the one given with it, else group.index."""
        return self.buffers.placement.names

    @property
    def backend(self) -> str:
        """Implementation in use; several joined by + where the parameters are of several kinds."""
        return "+".join(dict.fromkeys(bucket.backend for bucket in self.buckets))

    @property
    def ema_decay(self) -> float | None:
        """Decay of the average; can be changed, but not from or to None."""
        return self._ema_decay

    @ema_decay.setter
    def ema_decay(self, value: float | None) -> None:
        check_ema_decay(self._ema_decay, value)
        self._ema_decay = value

    def sync_hyperparameters(self) -> None:
        """Sends changed lr, betas, eps, weight decay, clip threshold and EMA decay to the device; does not wait."""
        options = self.max_grad_norm, self.ema_decay, self.ema_warmup, self.measure_telemetry, self.loss_scale
        values, on_device = host_values(self.param_groups, *options)
        for bucket in self.buckets:
            bucket.write_hyper(values, on_device)

    def rebind(self) -> None:
        """Takes the parameters where they are now (after `model.to(...)`), with moments, averages and counters."""
        self.buffers.refuse_inside_ema("rebind")
        self.buffers.rebuild(self.param_groups, self.state)
        self.buffers.stepped = False  # whoever else holds the memory, as before the first step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Flat buffers are laid out again: capture CUDA graphs afterwards."""
        if not hasattr(self, "buffers"):  # torch's constructor adds the first groups
            return super().add_param_group(param_group)
        self.buffers.refuse_inside_ema("add_param_group")
        super().add_param_group(param_group)
        self.buffers.add_last_group(self.param_groups, self.state)

    # ---- averages and readings ---------------------------------------------------------------------------------------

    def ema(self) -> AbstractContextManager[None]:
        """Averaged weights inside the block; afterwards the raw ones, bit for bit, on their device and in their dtype,
        whatever happens inside. Loading a state and laying the buffers out again are refused inside."""
        return self.buffers.averaged_weights(self.param_groups, self.state)

    def count_replay(self) -> None:
        """Call it for each replay of a CUDA graph with a step in it: the graph cannot tell the host."""
        self.buffers.attempted += 1

    def counter_states(self) -> Tensor:
        """What `counters` reads, still on the device: a copy that the next step does not change."""
        return torch.stack([bucket.state.to(self.buckets[0].device) for bucket in self.buckets])

    def counters(self, copied: Tensor | None = None) -> dict[str, Any]:
        """Steps attempted, applied, skipped, clipped; last gradient norm; first bad tensor of the last skipped step.

        One host read; none where `copied`, a copy of `counter_states()` that has reached the host, is given."""
        states = self.counter_states() if copied is None else copied
        counters = self.buffers.placement.counters(states.tolist())
        self.buffers.skipped = counters["skipped"]
        if copied is None:
            self.buffers.attempted = counters["attempted"]
        return counters

    def applied_steps(self) -> int:
        """Applied steps without a host read: a step skipped since the last `counters()` counts as applied."""
        return self.buffers.attempted - self.buffers.skipped

    def attempted_steps(self) -> int:
        """Attempted steps without a host read, those before a checkpoint that was loaded included."""
        return self.buffers.attempted

    def telemetry(self) -> Tensor:
        """(T, 4) float32 by tensor: gradient norm before clipping, weight norm, update norm, non-finite count."""
        if not self.measure_telemetry:
            raise RuntimeError("FusedAdamW.telemetry: switched off. Set optimizer.measure_telemetry = True.")
        return self.buffers.placement.by_tensor([bucket.telemetry for bucket in self.buckets])

    def records(self) -> tuple[Tensor, Tensor]:
        """(R, T, 4) float32, `telemetry()` after each of the last R attempted steps (R: the option `records`), and (R,)
        float64, their numbers, 0 where there is none yet. In no order; copies on the device, no host read. Of a skipped
        step: its gradients as they came, the weights as they stayed, updates of 0."""
        rings = [bucket.ring for bucket in self.buckets]
        return self.buffers.placement.by_tensor(rings), self.buckets[0].ring_steps.clone()

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, which can load it. Averages ("ema") and counters are beside the moments, where
        torch.distributed.checkpoint finds them; averages of tensors without moments under a key that torch ignores."""
        return super().state_dict() | {saving.EXTRA: saving.hidden_extra_state(self.buffers.moments, self.state)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of FusedAdamW or of torch.optim.AdamW, which leaves counters and averages as they are. As
        in torch, a group that decays decoupled here keeps doing so. Averages are dropped, with a warning, if AdamW has
        made steps since. Raises ValueError, and changes nothing, on a state that does not fit."""
        self.buffers.refuse_inside_ema("load_state_dict")
        extra = saving.load_state_dict(super().load_state_dict, self, state_dict, self.buffers)
        if "counters" in extra:
            self.load_extra_state(extra)

    def extra_state(self) -> dict[str, Tensor]:
        """Counters (16,) float64, and "ema.NAME" per tensor once there is an average; views, not copies."""
        return saving.extra_state(self.buffers.moments)

    @torch.no_grad()
    def load_extra_state(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `extra_state`; drops the records of earlier steps, which belong to another run."""
        self.buffers.refuse_inside_ema("load_extra_state")
        saving.load_extra_state(saved, self.buffers.moments, self.state)
        counted = (int(saved["counters"][slot]) for slot in (State.ATTEMPTED, State.SKIPPED))
        self.buffers.attempted, self.buffers.skipped = counted

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything but hyperparameters as {"optimizer": name -> tensor}, for files that hold tensors only."""
        return {"optimizer": saving.checkpoint_tensors(self.buffers.moments, self.state)}

    @torch.no_grad()
    def load_checkpoint_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores `checkpoint_tensors` into an optimizer with the same parameters."""
        self.buffers.refuse_inside_ema("load_checkpoint_tensors")
        saving.load_checkpoint_moments(groups["optimizer"], self.buffers.moments, self.state)
        self.load_extra_state(groups["optimizer"])

    def __getstate__(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in saving.OPTIONS}
        return super().__getstate__() | {"_options": options, "_extra": self.extra_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict (without options), and by unpickling and deepcopy (with them)."""
        state, before = dict(state), self.__dict__.get("param_groups", [])
        options, extra = state.pop("_options", None), state.pop("_extra", None)
        super().__setstate__(state)
        saving.complete_groups(self.param_groups, before, self.defaults)
        if options is not None:
            self.__dict__.update(options)
            self._build()
            self.load_extra_state(extra)
