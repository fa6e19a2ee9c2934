"""Reads and checks what a user gives FusedAdamW: arguments, groups, names, backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ris_fast.kernels.fused_step.layout import Group, Hyper
from ris_fast.kernels.fused_step.op import backends

GROWTH_INTERVAL = 2000.0
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _refuse(message: str) -> None:
    raise ValueError(f"FusedAdamW: {message}")


def check_kind(group: Mapping[str, Any]) -> None:
    """Raises ValueError on a form of the step that there is none of."""
    if group["amsgrad"]:
        _refuse("amsgrad=True is not supported. Leave it out, or use torch.optim.AdamW.")
    if group["differentiable"]:
        _refuse("differentiable=True is not supported: the step is in place. Use torch.optim.AdamW.")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError on a parameter group's value outside its range, naming it."""
    check_kind(group)
    if group["foreach"] and group["fused"]:
        _refuse(
            "foreach=True and fused=True exclude each other, as in torch. Leave both out: there is one implementation."
        )
    check_flags({key: group[key] for key in ("maximize", "decoupled_weight_decay")})
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        _refuse(f"lr is a tensor of shape {tuple(lr.shape)}. Give one element.")
    if not (isinstance(lr, Tensor) and lr.is_cuda) and not 0 <= _number(lr) < math.inf:
        _refuse(f"lr is {lr!r}. Give a finite number >= 0.")
    if (
        not isinstance(betas, (Sequence, np.ndarray))
        or len(betas) != 2
        or not all(0.0 <= _number(beta) < 1.0 for beta in betas)
    ):
        _refuse(f"betas are {betas!r}. Give two numbers in [0, 1).")
    if not torch.finfo(torch.float32).tiny <= _number(group["eps"]) < math.inf:
        _refuse(
            f"eps is {group['eps']!r}. Give a number from 1.2e-38: without it a gradient that is always zero divides by"
            " zero."
        )
    if not 0 <= _number(group["weight_decay"]) < math.inf:
        _refuse(f"weight_decay is {group['weight_decay']!r}. Give a finite number >= 0.")


def _number(value: Any) -> float:
    """The value as a float; NaN, which is in no range, where it is no number."""
    one = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    return float(value) if one else math.nan


def check_flags(flags: Mapping[str, Any]) -> None:
    """Raises ValueError on a switch that is neither on nor off, naming it."""
    for name, value in flags.items():
        if not isinstance(value, (Real, np.bool_)) or value not in (False, True):
            _refuse(f"{name} is {value!r}. Give True or False.")


def check_records(records: Any, telemetry: bool) -> None:
    """Raises ValueError on a number of records that cannot be kept."""
    if not isinstance(records, int) or records < 0 or (records and not telemetry):
        _refuse(
            f"records is {records!r} with telemetry={telemetry}. Give a whole number >= 0, and telemetry=True where it"
            " is not 0."
        )


def check_options(max_grad_norm: float | None, ema_decay: float | None, loss_scale: Any, backend: str) -> None:
    """Raises ValueError on an option of the whole optimizer outside its range, naming it."""
    if max_grad_norm is not None and not _number(max_grad_norm) > 0:
        _refuse(f"max_grad_norm is {max_grad_norm!r}. Give a number > 0, or None for no clipping.")
    if ema_decay is not None and not 0.0 <= _number(ema_decay) < 1.0:
        _refuse(f"ema_decay is {ema_decay!r}. Give a number in [0, 1); with 1 the average never moves.")
    if not (loss_scale is None or loss_scale == "dynamic" or 0 < _number(loss_scale) < math.inf):
        _refuse(f"loss_scale is {loss_scale!r}. Give None, 'dynamic' or a number > 0.")
    if backend != "auto" and backend not in ("native", "triton", "reference"):
        _refuse(f"backend is {backend!r}. Give 'auto', 'native', 'triton' or 'reference'.")


def check_saved(name: str, like: Tensor, saved: Mapping[Any, Any]) -> None:
    """Raises ValueError where the saved state of a tensor has no moments, or something of another shape."""
    for key in MOMENTS:
        if key not in saved:
            _refuse(
                f"the saved state of {name} has no '{key}' (it has: {', '.join(map(str, saved))}); another kind of"
                " optimizer saved it. Load a state of FusedAdamW or torch.optim.AdamW."
            )
    if torch.as_tensor(saved["step"]).numel() != 1:
        _refuse(f"the saved 'step' of {name} has shape {tuple(saved['step'].shape)}, expected one number.")
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        if key in saved:
            check_shape(key, name, like, saved[key])


def check_shape(key: str, name: str, like: Tensor, saved: Tensor) -> None:
    """Raises ValueError on a moment or an average that would be broadcast."""
    if saved.shape != like.shape:
        _refuse(
            f"the saved '{key}' of {name} has shape {tuple(saved.shape)}, but the parameter has shape"
            f" {tuple(like.shape)}. Load the state of an optimizer over the same model, with its parameters in the same"
            " order."
        )


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for one kind of parameters; only float32 has kernels of its own."""
    best = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
    if dtype != torch.float32 or wanted == "reference":
        return "reference"
    if wanted == "auto":
        return best if best in backends() else "reference"
    if wanted != best or wanted not in backends():
        _refuse(
            f"backend={wanted!r} cannot serve float32 parameters on {device} here (available: {', '.join(backends())})."
            " Use 'auto'."
        )
    return wanted


def refuse_parameters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises ValueError on parameters that cannot live in a flat buffer, naming the first and what to do."""
    for name, p in zip(names, params, strict=True):
        _refuse_kind(name, p)
        if p.numel() > _span(p):
            _refuse(
                f"parameter {name} of shape {tuple(p.shape)} has strides {p.stride()}: several elements are one place"
                " in memory. Clone it (p.clone())."
            )
        if p.device.type == "cpu" and p.is_shared():
            _refuse(
                f"parameter {name} is in memory shared between processes (model.share_memory(), or sent to another"
                " process), and a flat buffer is not. Use torch.optim.AdamW for Hogwild training; send other processes"
                " a copy (copy.deepcopy(model))."
            )
    _refuse_overlap(params, names)


def _refuse_kind(name: str, p: Tensor) -> None:
    if is_lazy(p):
        _refuse(f"parameter {name} has no shape yet. Call the model once (a dry run) before building the optimizer.")
    if p.device.type == "meta":
        _refuse(
            f"parameter {name} is on the meta device, which holds no values. Call model.to_empty(device=...) and"
            " initialise it first."
        )
    if getattr(p, "_fsdp_flattened", False):
        _refuse(
            f"parameter {name} belongs to FSDP, which moves its shards. Use torch.optim.AdamW with FSDP, "
            "or DistributedDataParallel with FusedAdamW."
        )
    if is_traceable_wrapper_subclass(p):
        kind = type(p.data).__name__
        sharded = "FSDP2 (fully_shard) and tensor parallelism make DTensors. " if kind == "DTensor" else ""
        _refuse(
            f"parameter {name} is a {kind}, which has no memory of its own to move into a flat buffer. {sharded}"
            "Use torch.optim.AdamW for it, or DistributedDataParallel with FusedAdamW."
        )
    if p.dtype.is_floating_point and p.dtype.itemsize < 2:
        _refuse(
            f"parameter {name} is {p.dtype}, in which a step is lost to rounding. Keep the parameter in bfloat16 or"
            " float32 and cast a copy for the forward pass."
        )
    if p.layout != torch.strided:
        _refuse(f"parameter {name} is {p.layout}. Use torch.optim.AdamW for parameters that are not dense.")


def _span(p: Tensor) -> int:
    """Places in memory from the first element to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0


def _refuse_overlap(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Moving two parameters that overlap in memory into the buffer would untie them."""
    spans, seen = [], set()
    for name, p in zip(names, params, strict=True):
        if id(p) in seen:
            _refuse(f"parameter {name} is given twice. Give it once.")
        seen.add(id(p))
        if p.numel():
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + _span(p) * p.element_size(), name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in zip(spans, spans[1:], strict=False):
        if device == other_device and begin < end:
            _refuse(
                f"parameters {name} and {other} are different but share memory. "
                "Tie the Parameter itself (a.weight = b.weight), not its data."
            )


def tensor_names(groups: Sequence[Mapping[str, Any]], known: Mapping[Tensor, str] | None = None) -> list[str]:
    """A name per tensor: the one given with it, else group.index.

    known: earlier names of tensors; lists of parameters may have been edited since, and the names beside them not.
    """
    known, names = known or {}, []
    kept = {known[p] for group in groups for p in group["params"] if p in known}
    for g, group in enumerate(groups):
        given = group.get("param_names", ())
        for i, p in enumerate(group["params"]):
            named = known.get(p) or (given[i] if i < len(given) and given[i] not in kept else None)
            names.append(named if given and named else f"group{g}.{i}")
    if len(set(names)) != len(names):
        raise ValueError(
            "FusedAdamW: two parameters have the same name. Give each group's parameters names of their own."
        )
    return names


def host_values(optimizer: Any) -> tuple[tuple[float, ...], list[tuple[int, Tensor]]]:
    """The hyperparameter vector, and (slot, tensor) for learning rates that live on a device."""
    values = [0.0] * Hyper.GROUPS
    values[Hyper.MAX_NORM] = math.inf if optimizer.max_grad_norm is None else float(optimizer.max_grad_norm)
    values[Hyper.EMA_DECAY] = optimizer.ema_decay or 0.0
    values[Hyper.EMA_WARMUP] = float(optimizer.ema_warmup)
    values[Hyper.TELEMETRY] = float(optimizer.measure_telemetry)
    values[Hyper.DYNAMIC] = float(optimizer.loss_scale == "dynamic")
    values[Hyper.GROWTH_INTERVAL] = GROWTH_INTERVAL
    on_device: list[tuple[int, Tensor]] = []
    for group in optimizer.param_groups:
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
