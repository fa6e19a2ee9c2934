"""What several checks say or measure in the same way: lists of names, sizes of tensors, and how far two are apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SAME = 1e-5  # relative change of a factor that rounding explains
LEVELS = 2**12  # steps at most, of weights that were rounded to a grid
CLOSE = 1e-3  # between two ways of computing the same


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def relative_change(a: Tensor, b: Tensor) -> float:
    """|a - b| relative to |a|, over the batch."""
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


def rms(value: Tensor) -> float:
    return float(value.detach().float().square().mean().sqrt())


def total_norm(parts: Iterable[Tensor | None]) -> float:
    """The norm of all tensors together, added up in float64; None counts as zero."""
    norms = [torch.linalg.vector_norm(part.detach(), dtype=torch.float64) for part in parts if part is not None]
    return float(torch.stack(norms or [torch.zeros(())]).norm())


def all_finite(parts: Iterable[Tensor | None]) -> bool:
    return all(bool(part.isfinite().all()) for part in parts if part is not None)


def rounded_to_16_bits(tensors: Iterable[Tensor]) -> bool:
    """Every number of every float32 tensor is one of bfloat16, or of float16, which does not happen by chance."""
    wide = [each.detach() for each in tensors if each.dtype == torch.float32 and each.numel() > 64 and bool(each.any())]
    return any(
        bool(wide) and all(torch.equal(each, each.to(narrow).float()) for each in wide)
        for narrow in (torch.bfloat16, torch.float16)
    )


def on_a_grid(tensor: Tensor) -> bool:
    """All numbers are whole multiples of one step, as rounding to a few levels leaves."""
    values = tensor.detach().double().flatten().unique()
    if tensor.numel() < 64 or len(values) < 3:
        return False
    multiples = values / values.diff().min()
    return float(multiples.abs().max()) < LEVELS and float((multiples - multiples.round()).abs().max()) < 0.02
