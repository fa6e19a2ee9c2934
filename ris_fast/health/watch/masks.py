"""Masks that a forward pass multiplies by: how much of them is zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.operations import operation, saved_tensor
from ris_fast.health.watch.tensors import is_plain

LEAST, MOST, KEPT = 64, 2**20, 16  # sizes of masks; how many are looked at


def masks_of(nodes: Iterable[Any]) -> list[Tensor]:
    """() of each factor without a gradient that has as many numbers as what it multiplies: its share of zeros, or -1
    where the others are not one number above one, as a dropout's are."""
    found: list[Tensor] = []
    for node in nodes:
        sides = [each for each, _ in node.next_functions]
        if operation(node) != "Mul" or len(found) >= KEPT or [each is None for each in sides].count(True) != 1:
            continue
        first, _ = sides
        mask = saved_tensor(node, "self" if first is None else "other")
        if mask is None or not is_plain(mask) or not LEAST <= mask.numel() <= MOST:
            continue
        mask = mask.detach()
        most = (mask.abs() if mask.is_complex() else mask.float()).amax()
        zero, full = (mask == 0).float().mean(), (mask == most).float().mean()
        found.append(torch.where((zero + full > 1 - 1e-6) & (most > 1), zero, -torch.ones_like(zero)))
    return found
