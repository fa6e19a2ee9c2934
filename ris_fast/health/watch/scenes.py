"""Scenes that are known again by a few of their numbers."""

from __future__ import annotations

from torch import Tensor

RICH = 4  # different numbers of a scene, by which it is known


def rows_of(keys: Tensor) -> list[bytes]:
    """Of scenes that have numbers enough to be known by; empty for others."""
    return [row.numpy().tobytes() if len(row.unique()) >= RICH else b"" for row in keys]
