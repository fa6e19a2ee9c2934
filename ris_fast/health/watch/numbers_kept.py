"""What the operations of a forward pass keep for backward: numbers beyond float16, and rows that indices reach.

Numbers stay on their device until the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.watch.operations import operation, saved_tensor
from ris_fast.health.watch.tensors import LARGE, is_plain

OVERFLOWING = {"Mul", "Pow", "Sqrt", "Exp", "Div", "Rsqrt", "Log"}  # and what they keep may be infinite, no mask
KEPT = 64


def overflows_of(nodes: Iterable[Any]) -> list[tuple[str, Tensor]]:
    """Of float16 numbers, the operation and (): how many of them are infinite, or of a reciprocal root zero, which no
    finite number has."""
    found: list[tuple[str, Tensor]] = []
    for node in nodes:
        name = operation(node)
        if name not in OVERFLOWING or len(found) >= KEPT:
            continue
        for kept in {"Rsqrt": ("result",), "Sqrt": ("result",), "Exp": ("result",)}.get(name, ("self", "other")):
            value = saved_tensor(node, kept)
            if value is None or value.dtype != torch.float16 or not is_plain(value) or value.numel() > LARGE:
                continue
            value = value.detach()
            found.append((name.lower(), (value == (0 if name == "Rsqrt" else torch.inf)).sum()))
    return found


def reaches_of(nodes: Iterable[Any], rows: int, outputs: int) -> list[tuple[int, int, Tensor]]:
    """Where a model is given more rows than it gives, as all nodes of some graphs, and chooses some of these by one
    list of places at least half as long: rows, those for each output, and () the largest place."""
    found: list[tuple[int, int, Tensor]] = []
    if not 1 < outputs < rows or rows % outputs:
        return found
    for node in nodes:
        if operation(node) not in ("Index", "IndexSelect") or len(found) >= KEPT:
            continue
        sizes = tuple(getattr(node, "_saved_self_sym_sizes", ()))
        places = _only_index(node)
        if sizes[:1] != (rows,) or places is None or not is_plain(places) or places.ndim != 1:
            continue
        if not places.is_floating_point() and places.dtype != torch.bool and 2 * places.numel() >= rows:
            found.append((rows, rows // outputs, places.detach().amax()))
    return found


def _only_index(node: Any) -> Tensor | None:
    """Of an operation that chooses along the first axis."""
    if operation(node) == "IndexSelect":
        return saved_tensor(node, "index") if getattr(node, "_saved_dim", None) == 0 else None
    kept = getattr(node, "_raw_saved_indices", None) or ()
    if len(kept) != 1 or getattr(kept[0], "unpack_hook", None) is not None:
        return None
    try:
        value = getattr(kept[0], "data", None)
    except RuntimeError:
        return None
    return value if isinstance(value, Tensor) else None
