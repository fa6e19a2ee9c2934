"""Placement: which tensor of an optimizer lies where in its buckets, and how it gets there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ris_fast.training.optim.arguments import choose_backend
from ris_fast.training.optim.bucket import Bucket
from ris_fast.training.optim.parameters import listed, refuse_parameters, tensor_names
from ris_fast.training.optim.views import Addresses, addresses, real_dtype, view_like


@dataclass(frozen=True)
class Placement:
    """Tensor i of all groups in order is `params[i]`, called `names[i]`; bucket and slot `places[i]` hold it.

    `members[b]`: the tensors of bucket b in the order of its slots. `sizes`: number of tensors of each group.
    `addresses`: see views.py; what they were when the tensors had moved in.
    """

    params: list[Tensor]
    names: list[str]
    sizes: list[int]
    buckets: list[Bucket]
    members: list[list[int]]
    places: list[tuple[Bucket, int]]
    addresses: Addresses

    def window(self, i: int) -> Tensor:
        """The weights of tensor i in its bucket, which its `.data` is."""
        bucket, slot = self.places[i]
        return bucket.params[slot]

    def average(self, i: int) -> Tensor:
        bucket, slot = self.places[i]
        return bucket.averages[slot]

    def refuse(self, tensors: Sequence[int]) -> None:
        """Raises ValueError where one of these tensors can no longer live in a flat buffer."""
        refuse_parameters([self.params[i] for i in tensors], [self.names[i] for i in tensors])

    @torch.no_grad()
    def move_back(self, i: int) -> None:
        """Moves data that replaced a parameter's own into its window, and its gradient with it."""
        _move_in(self.params[i], self.window(i))
        self._bring_gradient_back(i)

    @torch.no_grad()
    def put_back(self, raw: Sequence[Tensor]) -> None:
        """Copies raw, a flat tensor for each bucket, into the buckets, and points every parameter there again.

        All buckets first: whatever a parameter has become in the meantime, its raw weights are then in its window.
        """
        for bucket, values in zip(self.buckets, raw, strict=True):
            bucket.param.copy_(values)
        for bucket, members, values in zip(self.buckets, self.members, raw, strict=True):
            for slot, i in enumerate(members):
                if not self._is_in_window(i):
                    self._point_to_window(i)
                    # share_memory has moved the window too
                    bucket.params[slot].copy_(view_like(values, bucket.starts[slot], bucket.params[slot]))
                    self._bring_gradient_back(i)

    def _is_in_window(self, i: int) -> bool:
        p, window = self.params[i], self.window(i)
        same = addresses([p]) == addresses([window]) and p.dtype == window.dtype
        return same and p.data_ptr() == self.addresses[0][i]

    def _point_to_window(self, i: int) -> None:
        p, window = self.params[i], self.window(i)
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
def place(
    groups: Sequence[dict[str, Any]], known: Mapping[Tensor, str], backend: str, with_ema: bool, records: int
) -> Placement:
    """Moves the parameters as listed now into new buckets. `known`: names of tensors that had one before.

    Raises: ValueError on parameters that cannot live in a flat buffer; says which and what to do.
    """
    params = listed(groups)
    if not params:
        raise ValueError("FusedAdamW: param_groups hold no parameter any more. Leave at least one in place.")
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
    for p, (bucket, slot) in zip(params, places, strict=True):
        _move_in(p, bucket.params[slot])
    return Placement(params, names, _name_groups(groups, names), buckets, members, places, addresses(params))


def _move_in(p: Tensor, window: Tensor) -> None:
    window.copy_(p)
    p.data = window


def _name_groups(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> list[int]:
    """Number of tensors of each group; corrects `param_names` where the lists of parameters were edited."""
    sizes, begin = [len(group["params"]) for group in groups], 0
    for group, size in zip(groups, sizes, strict=True):
        if "param_names" in group:
            group["param_names"] = list(names[begin : begin + size])
        begin += size
    return sizes
