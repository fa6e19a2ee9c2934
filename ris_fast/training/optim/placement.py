"""Placement: which parameters FusedAdamW takes, what it calls them, and where each lies in its buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ris_fast.kernels.fused_step.layout import State
from ris_fast.training.optim.arguments import choose_backend, refuse_if
from ris_fast.training.optim.bucket import Bucket
from ris_fast.training.optim.views import Addresses, addresses, real_dtype, view_like

Groups = Sequence[dict[str, Any]]  # `optimizer.param_groups`


@dataclass(frozen=True)
class Placement:
    """Tensor i of all groups in order is `params[i]`, called `names[i]`; bucket and slot `places[i]` hold it.

    `windows[i]`: its weights in the bucket, which its `.data` is; `averages[i]`: its average; empty if there is none.
    `members[b]`: the tensors of bucket b in the order of its slots. `sizes`: number of tensors of each group.
    `addresses`: see views.py; what they were when the tensors had moved in.
    """

    params: list[Tensor]
    names: list[str]
    sizes: list[int]
    buckets: list[Bucket]
    members: list[list[int]]
    places: list[tuple[Bucket, int]]
    windows: list[Tensor]
    averages: list[Tensor]
    addresses: Addresses

    def by_tensor(self, tables: Sequence[Tensor]) -> Tensor:
        """Tables (..., T of a bucket, 4), one a bucket, as one copy (..., T, 4) in the order of all tensors."""
        if len(tables) == 1:
            return tables[0].clone()
        whole = tables[0].new_empty(*tables[0].shape[:-2], len(self.params), tables[0].shape[-1])
        for table, members in zip(tables, self.members, strict=True):
            whole[..., members, :] = table.to(whole.device)
        return whole

    def counters(self, states: Sequence[Sequence[float]]) -> dict[str, Any]:
        """The counters in `states`, those of each bucket, by name."""
        first, pairs = states[0], zip(states, self.members, strict=True)
        bad = [members[int(each[State.FIRST_BAD])] for each, members in pairs if each[State.FIRST_BAD] >= 0]
        slots = State.ATTEMPTED, State.APPLIED, State.SKIPPED, State.CLIPPED
        counted = {slot.name.lower(): int(first[slot]) for slot in slots}
        scales = {"grad_norm": first[State.NORM], "loss_scale": first[State.SCALE]}
        return counted | scales | {"first_bad_tensor": self.names[min(bad)] if bad else None}

    @torch.no_grad()
    def move_back(self, i: int) -> None:
        """Moves data that replaced a parameter's own into its window, and its gradient with it."""
        _move_in(self.params[i], self.windows[i])
        self._bring_gradient_back(i)

    @torch.no_grad()
    def put_back(self, raw: Sequence[Tensor]) -> None:
        """Copies raw, a flat tensor for each bucket, into the buckets, and points every parameter there again. All
        buckets first: whatever a parameter has become in the meantime, its raw weights are then in its window."""
        for bucket, values in zip(self.buckets, raw, strict=True):
            bucket.param.copy_(values)
        for bucket, members, values in zip(self.buckets, self.members, raw, strict=True):
            for i, window, start in zip(members, bucket.params, bucket.starts, strict=True):
                p = self.params[i]
                in_window = addresses([p]) == addresses([window]) and p.dtype == window.dtype
                if not (in_window and p.data_ptr() == self.addresses[0][i]):
                    self._point_to_window(i)
                    window.copy_(view_like(values, start, window))  # share_memory has moved the window too
                    self._bring_gradient_back(i)

    def _point_to_window(self, i: int) -> None:
        p, window = self.params[i], self.windows[i]
        try:
            p.data = window
        except RuntimeError:  # swapped for a tensor of another kind (meta, sparse)
            torch.utils.swap_tensors(p, torch.nn.Parameter(window, p.requires_grad))

    def _bring_gradient_back(self, i: int) -> None:
        """Undoes what moving or casting a module does to `.grad.data`, for a parameter that is back in its window."""
        p, (bucket, slot) = self.params[i], self.places[i]
        bucket.reattach(slot)
        if p.grad is not None and (p.grad.dtype != p.dtype or p.grad.device != p.device):
            p.grad.data = p.grad.data.to(p.device, p.dtype)


@torch.no_grad()
def place(groups: Groups, known: Mapping[Tensor, str], backend: str, with_ema: bool, records: int) -> Placement:
    """Moves the parameters as listed now into new buckets. `known`: names of tensors that had one before. Raises
    ValueError on parameters that cannot live in a flat buffer; says which and what to do."""
    params = listed(groups)
    refuse_if(not params, "param_groups hold no parameter any more. Leave at least one in place.")
    names = tensor_names(groups, known)
    refuse_parameters(params, names)
    owners = [g for g, group in enumerate(groups) for _ in group["params"]]
    kinds = [(p.device, real_dtype(p)) for p in params]
    members = [[i for i, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)]

    def bucket_of(tensors: list[int]) -> Bucket:
        like, chosen = [params[i].detach() for i in tensors], choose_backend(backend, *kinds[tensors[0]])
        return Bucket(like, [owners[i] for i in tensors], len(groups), chosen, with_ema, records)

    buckets = [bucket_of(tensors) for tensors in members]
    slots = {i: (b, slot) for b, tensors in zip(buckets, members, strict=True) for slot, i in enumerate(tensors)}
    places = [slots[i] for i in range(len(params))]
    windows = [bucket.params[slot] for bucket, slot in places]
    averages = [bucket.averages[slot] for bucket, slot in places if with_ema]
    for p, window in zip(params, windows, strict=True):
        _move_in(p, window)
    sizes = _sizes(groups, names)
    return Placement(params, names, sizes, buckets, members, places, windows, averages, addresses(params))


def _move_in(p: Tensor, window: Tensor) -> None:
    window.copy_(p)
    p.data = window


def _sizes(groups: Groups, names: Sequence[str]) -> list[int]:
    """Number of tensors of each group; corrects `param_names` where the lists of parameters were edited."""
    sizes = [len(group["params"]) for group in groups]
    for group, size, end in zip(groups, sizes, accumulate(sizes), strict=True):
        if "param_names" in group:
            group["param_names"] = list(names[end - size : end])
    return sizes


def listed(groups: Groups) -> list[Tensor]:
    """The parameters of all groups in order."""
    return [p for group in groups for p in group["params"]]


def refuse_parameters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises ValueError on parameters that cannot live in a flat buffer, naming the first and what to do."""
    spans, seen = [], set()
    for name, p in zip(names, params, strict=True):
        _refuse_kind(name, p)
        refuse_if(id(p) in seen, f"parameter {name} is given twice. Give it once.")
        seen.add(id(p))
        if p.numel():
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + _span(p) * p.element_size(), name))
    spans.sort()
    # moved into the buffer, parameters that overlap would come apart
    for (device, _, end, name), (other_device, begin, _, other) in zip(spans, spans[1:], strict=False):
        refuse_if(
            device == other_device and begin < end,
            f"parameters {name} and {other} are different but share memory. Tie the Parameter itself"
            " (a.weight = b.weight), not its data.",
        )


def _refuse_kind(name: str, p: Tensor) -> None:
    who, kind = f"parameter {name}", type(p.data).__name__
    refuse_if(is_lazy(p), f"{who} has no shape yet. Call the model once (a dry run) before building the optimizer.")
    refuse_if(
        p.device.type == "meta",
        f"{who} is on the meta device, which holds no values. Call model.to_empty(device=...) and initialise it first.",
    )
    refuse_if(
        getattr(p, "_fsdp_flattened", False),
        f"{who} belongs to FSDP, which moves its shards. Use torch.optim.AdamW with FSDP, or DistributedDataParallel"
        " with FusedAdamW.",
    )
    sharded = "FSDP2 (fully_shard) and tensor parallelism make DTensors. " if kind == "DTensor" else ""
    refuse_if(
        is_traceable_wrapper_subclass(p),
        f"{who} is a {kind}, which has no memory of its own to move into a flat buffer. {sharded}Use torch.optim.AdamW"
        " for it, or DistributedDataParallel with FusedAdamW.",
    )
    refuse_if(
        p.dtype.is_floating_point and p.dtype.itemsize < 2,
        f"{who} is {p.dtype}, in which a step is lost to rounding. Keep the parameter in bfloat16 or float32 and cast a"
        " copy for the forward pass.",
    )
    dense = p.layout == torch.strided
    refuse_if(not dense, f"{who} is {p.layout}. Use torch.optim.AdamW for parameters that are not dense.")
    refuse_if(
        p.numel() > _span(p),
        f"{who} of shape {tuple(p.shape)} has strides {p.stride()}: several elements are one place in"
        " memory. Clone it (p.clone()).",
    )
    refuse_if(
        p.device.type == "cpu" and p.is_shared(),
        f"{who} is in memory shared between processes (model.share_memory(), or sent to another"
        " process), and a flat buffer is not. Use torch.optim.AdamW for Hogwild training; send other processes a"
        " copy (copy.deepcopy(model)).",
    )


def _span(p: Tensor) -> int:
    """Places in memory from the first element to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0


def tensor_names(groups: Groups, known: Mapping[Tensor, str] | None = None) -> list[str]:
    """A name per tensor: the one given with it, else group.index. `known`: earlier names of tensors, since lists of
    parameters may have been edited and the names beside them not."""
    known, names = known or {}, []
    kept = {known[p] for group in groups for p in group["params"] if p in known}
    for g, group in enumerate(groups):
        given = group.get("param_names", ())
        for i, p in enumerate(group["params"]):
            named = known.get(p) or (given[i] if i < len(given) and given[i] not in kept else None)
            names.append(named if given and named else f"group{g}.{i}")
    twice = len(set(names)) != len(names)
    refuse_if(twice, "two parameters have the same name. Give each group's parameters names of their own.")
    return names
