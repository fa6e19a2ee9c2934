"""Which parameters FusedAdamW takes, which it refuses and why, and what it calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ris_fast.training.optim.arguments import refuse


def listed(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The parameters of all groups in order."""
    return [p for group in groups for p in group["params"]]


def refuse_parameters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises ValueError on parameters that cannot live in a flat buffer, naming the first and what to do."""
    for name, p in zip(names, params, strict=True):
        _refuse_kind(name, p)
        if p.numel() > _span(p):
            refuse(
                f"parameter {name} of shape {tuple(p.shape)} has strides {p.stride()}: several elements are one place"
                " in memory. Clone it (p.clone())."
            )
        if p.device.type == "cpu" and p.is_shared():
            refuse(
                f"parameter {name} is in memory shared between processes (model.share_memory(), or sent to another"
                " process), and a flat buffer is not. Use torch.optim.AdamW for Hogwild training; send other processes"
                " a copy (copy.deepcopy(model))."
            )
    _refuse_overlap(params, names)


def _refuse_kind(name: str, p: Tensor) -> None:
    if is_lazy(p):
        refuse(f"parameter {name} has no shape yet. Call the model once (a dry run) before building the optimizer.")
    if p.device.type == "meta":
        refuse(
            f"parameter {name} is on the meta device, which holds no values. Call model.to_empty(device=...) and"
            " initialise it first."
        )
    if getattr(p, "_fsdp_flattened", False):
        refuse(
            f"parameter {name} belongs to FSDP, which moves its shards. Use torch.optim.AdamW with FSDP, "
            "or DistributedDataParallel with FusedAdamW."
        )
    if is_traceable_wrapper_subclass(p):
        kind = type(p.data).__name__
        sharded = "FSDP2 (fully_shard) and tensor parallelism make DTensors. " if kind == "DTensor" else ""
        refuse(
            f"parameter {name} is a {kind}, which has no memory of its own to move into a flat buffer. {sharded}"
            "Use torch.optim.AdamW for it, or DistributedDataParallel with FusedAdamW."
        )
    if p.dtype.is_floating_point and p.dtype.itemsize < 2:
        refuse(
            f"parameter {name} is {p.dtype}, in which a step is lost to rounding. Keep the parameter in bfloat16 or"
            " float32 and cast a copy for the forward pass."
        )
    if p.layout != torch.strided:
        refuse(f"parameter {name} is {p.layout}. Use torch.optim.AdamW for parameters that are not dense.")


def _span(p: Tensor) -> int:
    """Places in memory from the first element to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0


def _refuse_overlap(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Moving two parameters that overlap in memory into the buffer would untie them."""
    spans, seen = [], set()
    for name, p in zip(names, params, strict=True):
        if id(p) in seen:
            refuse(f"parameter {name} is given twice. Give it once.")
        seen.add(id(p))
        if p.numel():
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + _span(p) * p.element_size(), name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in zip(spans, spans[1:], strict=False):
        if device == other_device and begin < end:
            refuse(
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
