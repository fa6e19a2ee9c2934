"""Calls the C++ covariance NMSE (native.cpp) on CPU tensors."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from .reference import Arguments, compute_dtype

_ARGUMENTS = [c_void_p] * 8 + [c_int64] * 5 + [c_double] * 4 + [c_int]


@cache
def _function(dtype: torch.dtype, simd: str | None) -> Any:
    return loader.function("cov_nmse_f64" if dtype == torch.float64 else "cov_nmse_f32", _ARGUMENTS, simd, c_int)


def cov_nmse(*args: Any, simd: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Value and unit gradients; arguments and results as `ris_fast::cov_nmse` (op.py).

    simd: instruction set to use instead of the best one; tests run them all.
    Raises: MemoryError where the scratch of a scene, 16 (2 P + Q) N bytes a thread, cannot be had.
    """
    a = Arguments(*args)
    dtype = compute_dtype(a.factor.dtype)
    inputs = [None if x is None else x.to(dtype).contiguous() for x in a[:5]]
    (b, n, q, _), x = a.factor.shape, a.sample_columns
    k = 0 if a.target_factor is None else a.target_factor.shape[2]
    loss = a.factor.new_empty(b, dtype=dtype)
    grad_factor = loss.new_empty(a.factor.shape if a.gradients >= 1 else 0)
    grad_sample = loss.new_empty(a.sample_factor.shape if a.gradients >= 2 else 0)
    pointers = [None if t is None else t.data_ptr() for t in (*inputs, loss, grad_factor, grad_sample)]
    if _function(dtype, simd)(*pointers, b, n, q, k, x, *a[5:]):
        raise MemoryError(
            f"cov_nmse: no memory for the scratch of a scene with N = {n} and {q + x + k} columns. Lower N or the"
            " number of threads (torch.set_num_threads)."
        )
    return loss, grad_factor, grad_sample
