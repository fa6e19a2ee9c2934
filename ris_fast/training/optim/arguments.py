"""Checks the arguments and the saved states that a user gives FusedAdamW, and reads the hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.kernels.fused_step.layout import Group, Hyper
from ris_fast.kernels.fused_step.op import backends

FIRST_SCALE, GROWTH_INTERVAL = 65536.0, 2000.0  # of a dynamic loss scale, as in torch.amp.GradScaler
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def refuse_if(wrong: bool, message: str) -> None:
    """Raises ValueError on a bad argument."""
    if wrong:
        raise ValueError(f"FusedAdamW: {message}")


def check_kind(group: Mapping[str, Any]) -> None:
    """Raises ValueError on a variant of the step that is not implemented."""
    refuse_if(group["amsgrad"], "amsgrad=True is not supported. Leave it out, or use torch.optim.AdamW.")
    wrong = group["differentiable"]
    refuse_if(wrong, "differentiable=True is not supported: the step is in place. Use torch.optim.AdamW.")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError on a parameter group's value outside its range, naming it."""
    check_kind(group)
    clash = "foreach=True and fused=True exclude each other, as in torch."
    refuse_if(group["foreach"] and group["fused"], f"{clash} Leave both out: there is one implementation.")
    check_flags({key: group[key] for key in ("maximize", "decoupled_weight_decay")})
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor):
        refuse_if(lr.numel() != 1, f"lr is a tensor of shape {tuple(lr.shape)}. Give one element.")
    if not (isinstance(lr, Tensor) and lr.is_cuda):  # else reading it would wait for the device
        refuse_if(not 0 <= _number(lr) < math.inf, f"lr is {lr!r}. Give a finite number >= 0.")
    pair = isinstance(betas, (Sequence, np.ndarray)) and len(betas) == 2
    wrong = not pair or not all(0.0 <= _number(beta) < 1.0 for beta in betas)
    refuse_if(wrong, f"betas are {betas!r}. Give two numbers in [0, 1).")
    tiny, why = torch.finfo(torch.float32).tiny, "without it a gradient that is always zero divides by zero."
    refuse_if(not tiny <= _number(eps) < math.inf, f"eps is {eps!r}. Give a number from 1.2e-38: {why}")
    refuse_if(not 0 <= _number(decay) < math.inf, f"weight_decay is {decay!r}. Give a finite number >= 0.")


def _number(value: Any) -> float:
    """The value as a float; NaN, which is in no range, where it is no number."""
    one = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    return float(value) if one else math.nan


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raises ValueError on a switch that is neither on nor off, naming it."""
    for name, value in flags.items():
        wrong = not isinstance(value, (Real, np.bool_)) or value not in (False, True)
        refuse_if(wrong, f"{name} is {value!r}. Give True or False.")


def check_options(
    max_grad_norm: float | None, ema_decay: float | None, ema_warmup: bool, loss_scale: Any, clear_grads: bool,
    telemetry: bool, records: Any, backend: str,
) -> None:  # fmt: skip
    """Raises ValueError on an option of the whole optimizer outside its range, naming it."""
    wrong = max_grad_norm is not None and not _number(max_grad_norm) > 0
    refuse_if(wrong, f"max_grad_norm is {max_grad_norm!r}. Give a number > 0, or None for no clipping.")
    check_ema_decay(ema_decay, ema_decay)
    wrong = not (loss_scale is None or loss_scale == "dynamic" or 0 < _number(loss_scale) < math.inf)
    refuse_if(wrong, f"loss_scale is {loss_scale!r}. Give None, 'dynamic' or a number > 0.")
    wrong = backend not in ("auto", "native", "triton", "reference")
    refuse_if(wrong, f"backend is {backend!r}. Give 'auto', 'native', 'triton' or 'reference'.")
    check_flags(dict(ema_warmup=ema_warmup, clear_grads=clear_grads, telemetry=telemetry))
    refuse_if(
        not isinstance(records, int) or records < 0 or (records > 0 and not telemetry),
        f"records is {records!r} with telemetry={telemetry}. Give a whole number >= 0, and telemetry=True where it is"
        " not 0.",
    )


def check_ema_decay(before: float | None, after: float | None) -> None:
    """Raises ValueError on a decay out of range, or where there would be an average from now on, or none any more."""
    if (before is None) != (after is None):
        raise ValueError(
            f"FusedAdamW.ema_decay: cannot change from {before} to {after}. Build the optimizer with or without an"
            " average."
        )
    wrong = after is not None and not 0.0 <= _number(after) < 1.0
    refuse_if(wrong, f"ema_decay is {after!r}. Give a number in [0, 1); with 1 the average never moves.")


def check_saved(name: str, like: Tensor, saved: Mapping[Any, Any]) -> None:
    """Raises ValueError where the saved state of a tensor has no moments, or something of another shape."""
    for key in MOMENTS:
        refuse_if(
            key not in saved,
            f"the saved state of {name} has no '{key}' (it has: {', '.join(map(str, saved))}); another kind of"
            " optimizer saved it. Load a state of FusedAdamW or torch.optim.AdamW.",
        )
    step = torch.as_tensor(saved["step"])
    refuse_if(step.numel() != 1, f"the saved 'step' of {name} has shape {tuple(step.shape)}, expected one number.")
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        check_shape(key, name, like, saved.get(key, like))


def check_shape(key: str, name: str, like: Tensor, saved: Tensor) -> None:
    """Raises ValueError on a moment or an average that would be broadcast."""
    refuse_if(
        saved.shape != like.shape,
        f"the saved '{key}' of {name} has shape {tuple(saved.shape)}, but the parameter has shape {tuple(like.shape)}."
        " Load the state of an optimizer over the same model, with its parameters in the same order.",
    )


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for one kind of parameters; only float32 has kernels of its own."""
    best = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
    if dtype != torch.float32 or wanted == "reference":
        return "reference"
    if wanted == "auto":
        return best if best in backends() else "reference"
    refuse_if(
        wanted != best or wanted not in backends(),
        f"backend={wanted!r} cannot serve float32 parameters on {device} here (available: {', '.join(backends())})."
        " Use 'auto'.",
    )
    return wanted


def host_values(
    groups: Sequence[Mapping[str, Any]], max_grad_norm: float | None, ema_decay: float | None, ema_warmup: bool,
    telemetry: bool, loss_scale: Any,
) -> tuple[tuple[float, ...], list[tuple[int, Tensor]]]:  # fmt: skip
    """The hyperparameter vector, and (slot, tensor) for learning rates that live on a device."""
    slots = {
        Hyper.MAX_NORM: math.inf if max_grad_norm is None else max_grad_norm,
        Hyper.EMA_DECAY: ema_decay or 0.0,
        Hyper.EMA_WARMUP: ema_warmup,
        Hyper.TELEMETRY: telemetry,
        Hyper.DYNAMIC: loss_scale == "dynamic",
        Hyper.GROWTH_INTERVAL: GROWTH_INTERVAL,
    }
    values = [float(slots.get(slot, 0.0)) for slot in range(Hyper.GROUPS)]
    on_device: list[tuple[int, Tensor]] = []
    for group in groups:
        check_kind(group)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.is_cuda:
            on_device.append((len(values) + Group.LR, lr))
            lr = 0.0
        beta1, beta2 = group["betas"]
        sign = -1.0 if group["maximize"] else 1.0
        decoupled = float(group["decoupled_weight_decay"])
        values += [float(lr), float(beta1), float(beta2), group["eps"], group["weight_decay"], sign, decoupled, 0.0]
    return tuple(values), on_device
