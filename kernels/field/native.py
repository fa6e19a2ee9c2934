"""Calls the C++ estimate of the field (native.cpp) on CPU tensors."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader

_NAMES = {torch.float32: "aperture_field_f32", torch.float64: "aperture_field_f64"}
DTYPES = tuple(_NAMES)


@cache
def _function(dtype: torch.dtype, simd: str | None) -> Any:
    return loader.function(_NAMES[dtype], [c_void_p] * 7 + [c_int64] * 8, simd, c_int)


def aperture_field(
    channel: Tensor,
    codes: Tensor,
    snapshots: Tensor,
    snr_db: Tensor,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    static: bool,
    steps: int,
    simd: str | None = None,
) -> Tensor:
    """`ris_fast::aperture_field`; simd: instruction set to use instead of the best one."""
    (batch, antennas, elements, _), length = channel.shape, snapshots.shape[1]
    rows, columns = (1, elements) if vertical is None else (len(vertical), len(horizontal))
    fields = 1 if static else length
    out = channel.new_empty(batch, elements, fields, 2)
    inputs = [None if x is None else x.contiguous() for x in (channel, codes, snapshots, snr_db, vertical, horizontal)]
    sizes = batch, antennas, length, rows, columns, fields, codes.dim() == 4, steps
    pointers = (None if each is None else each.data_ptr() for each in (out, *inputs))
    if out.numel() and _function(channel.dtype, simd)(*pointers, *sizes):
        raise MemoryError(
            "aperture_field: no memory for the scratch of a thread. Lower the number of threads or the size of the"
            " array."
        )
    return out
