"""Codes that differ by scene, kept at half the size of float32 pairs.

Legend: B scenes, L snapshots, N RIS elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 32767.0
PACKED = ("codes", "codes_unit")  # the columns of a table that holds them


def pack_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, N, 2) float32 -> int16 of the same shape, and the largest component of each scene (B,), which is their
    unit.

    Numerics: a rounding of at most 1 part in 65,534 of the largest component, 90 dB below it.
    """
    largest = codes.abs().flatten(1).amax(1)
    unit = torch.where(largest > 0, largest, 1.0)
    return torch.round(codes * (LEVELS / unit)[:, None, None, None]).to(torch.int16), unit


def unpack_codes(packed: Tensor, unit: Tensor) -> Tensor:
    """What `pack_codes` made, as float32 pairs."""
    return packed.float() * (unit / LEVELS)[:, None, None, None]


def packed_bytes(snapshots: int, elements: int) -> int:
    """Bytes that the codes of one scene take."""
    return 4 * snapshots * elements + 4
