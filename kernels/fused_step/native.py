"""Calls the C++ fused step on CPU tensors: float32 and contiguous, tables as layout.py makes them."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from .arguments import Accumulate, ApplyFrom, Decide, MeasureFrom

CHUNK = 4096  # 16 kB of each buffer: as fast as longer ones on one thread, and shared out more evenly

_P, _N = c_void_p, c_int64
_ARGUMENTS = {
    "measure_from": [_P, _P, _N, _P, _N, _P, _N, _P, _P, _P],
    "decide": [_P, _N, _P, _P, _P, _P, _P, _P],
    "apply_from": [_P, _P, _P, _P, _P, _P, _N, _P, _N, _P, _N, _P, _P, _P, _P, _P, c_int],
    "accumulate": [_P, _P, _P, _P, _N, _P, _N, _P, _N, _P, _P, _P, c_float, c_int, c_int],
}


@cache
def call(name: str, simd: str | None = None) -> Any:
    """The C function fused_step_NAME of the instruction set in use, or of `simd`."""
    return loader.function(f"fused_step_{name}", _ARGUMENTS[name], simd)


def _at(*tensors: Tensor | None) -> list[int | None]:
    """Addresses, None for None. Raises: ValueError where a tensor is not contiguous."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"fused_step: a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}. Pass contiguous"
                " flat buffers."
            )
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _tables(a: Any) -> tuple[Any, ...]:
    """Address and length of both tables."""
    return *_at(a.chunks), len(a.chunks), *_at(a.segments), len(a.segments)


def measure(*args: Any, simd: str | None = None) -> None:
    """Pass one, of gradients at `sources` where they are given."""
    a = MeasureFrom(*args)
    call("measure_from", simd)(*_at(a.grad, a.sources), a.grad.numel(), *_tables(a), *_at(a.partial, a.sums, a.state))
    if a.finish:
        decide(a.segments, a.hyper, a.sums, a.telemetry, a.steps, a.coefficients, a.state, simd=simd)


def decide(*args: Any, simd: str | None = None) -> None:
    segments, *rest = Decide(*args)
    call("decide", simd)(*_at(segments), len(segments), *_at(*rest))


def apply(*args: Any, simd: str | None = None) -> None:
    """Pass two; gradients at `sources` are only read, whatever `clear` says."""
    a = ApplyFrom(*args)
    call("apply_from", simd)(
        *_at(a.param, a.grad, a.exp_avg, a.exp_avg_sq, a.ema, a.sources),
        a.param.numel(),
        *_tables(a),
        *_at(a.hyper, a.partial, a.telemetry, a.coefficients, a.state),
        a.clear and a.sources is None,
    )


def accumulate(*args: Any, simd: str | None = None) -> None:
    a = Accumulate(*args)
    count = len(a.gradients)
    pointers, numels = (c_int64 * count)(*_at(*a.gradients)), (c_int64 * count)(*map(Tensor.numel, a.gradients))
    half = (c_int32 * count)(*(g.dtype == torch.bfloat16 for g in a.gradients))
    sums = *_at(a.grad), a.grad.numel(), *_tables(a), *_at(a.partial, a.sums, a.state)
    call("accumulate", simd)(pointers, numels, half, *sums, a.scale, a.overwrite, a.norm)
