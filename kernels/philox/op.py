"""Counter-based random numbers as operators: value i of scene b depends on index[b], seed, stream and i, and on nothing else."""

from __future__ import annotations

from torch import Tensor

from . import reference


def philox_uniform(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """(B, count) float32 uniform in (0, 1]."""
    return reference.uniform(index_B, seed, stream, count).float()


def philox_normal(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """(B, count) float32 standard normal."""
    return reference.normal(index_B, seed, stream, count).float()
