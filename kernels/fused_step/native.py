"""Calls the C++ fused step on CPU tensors: float32 and contiguous, tables as layout.py makes them."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader

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


def _at(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(
            f"fused_step: a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}. Pass contiguous flat"
            " buffers."
        )
    return tensor.data_ptr()


def measure(
    grad: Tensor,
    chunks: Tensor,
    segments: Tensor,
    hyper: Tensor,
    partial: Tensor,
    sums: Tensor,
    telemetry: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    state: Tensor,
    tickets: Tensor,
    finish: bool,
    sources: Tensor | None = None,
    simd: str | None = None,
) -> None:
    """sources: (2, T) int64, address and number of elements of each tensor's float32 gradient; None: they are in
    `grad`."""
    call("measure_from", simd)(
        _at(grad),
        None if sources is None else _at(sources),
        grad.numel(),
        _at(chunks),
        chunks.shape[0],
        _at(segments),
        segments.shape[0],
        _at(partial),
        _at(sums),
        _at(state),
    )
    if finish:
        decide(segments, hyper, sums, telemetry, steps, coefficients, state, simd)


def decide(
    segments: Tensor,
    hyper: Tensor,
    sums: Tensor,
    telemetry: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    state: Tensor,
    simd: str | None = None,
) -> None:
    call("decide", simd)(
        _at(segments),
        segments.shape[0],
        _at(hyper),
        _at(sums),
        _at(telemetry),
        _at(steps),
        _at(coefficients),
        _at(state),
    )


def apply(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    chunks: Tensor,
    segments: Tensor,
    hyper: Tensor,
    partial: Tensor,
    telemetry: Tensor,
    coefficients: Tensor,
    state: Tensor,
    tickets: Tensor,
    clear: bool,
    sources: Tensor | None = None,
    simd: str | None = None,
) -> None:
    """sources: as for `measure`; such gradients are only read, whatever `clear` says."""
    call("apply_from", simd)(
        _at(param),
        _at(grad),
        _at(exp_avg),
        _at(exp_avg_sq),
        None if ema is None else _at(ema),
        None if sources is None else _at(sources),
        param.numel(),
        _at(chunks),
        chunks.shape[0],
        _at(segments),
        segments.shape[0],
        _at(hyper),
        _at(partial),
        _at(telemetry),
        _at(coefficients),
        _at(state),
        clear and sources is None,
    )


def accumulate(
    gradients: list[Tensor],
    starts: list[int],
    grad: Tensor,
    chunks: Tensor,
    segments: Tensor,
    partial: Tensor,
    sums: Tensor,
    state: Tensor,
    tickets: Tensor,
    scale: float,
    overwrite: bool,
    norm: bool,
    simd: str | None = None,
) -> None:
    count = len(gradients)
    pointers, numels = (c_int64 * count)(*map(_at, gradients)), (c_int64 * count)(*map(Tensor.numel, gradients))
    half = (c_int32 * count)(*(g.dtype == torch.bfloat16 for g in gradients))
    call("accumulate", simd)(
        pointers,
        numels,
        half,
        _at(grad),
        grad.numel(),
        _at(chunks),
        chunks.shape[0],
        _at(segments),
        segments.shape[0],
        _at(partial),
        _at(sums),
        _at(state),
        scale,
        overwrite,
        norm,
    )
