"""Calls the C++ covariance NMSE (native.cpp) on CPU tensors."""

from __future__ import annotations

from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from .reference import compute_dtype

_ARGUMENTS = [c_void_p] * 8 + [c_int64] * 5 + [c_double] * 4 + [c_int]


@cache
def _function(dtype: torch.dtype, simd: str | None) -> Any:
    return loader.function("cov_nmse_f64" if dtype == torch.float64 else "cov_nmse_f32", _ARGUMENTS, simd, c_int)


def cov_nmse(
    factor: Tensor,
    target_factor: Tensor | None,
    target_cov: Tensor | None,
    sample_factor: Tensor | None,
    snr_db: Tensor | None,
    blend: float,
    loading: float,
    target_loading: float,
    shrink: float,
    gradients: int,
    simd: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and unit gradients; arguments and results as `ris_fast::cov_nmse` (op.py).

    simd: instruction set to use instead of the best one; tests run them all.
    Raises: MemoryError where the scratch of a scene, 16 (2 P + Q) N bytes a thread, cannot be had.
    """
    dtype = compute_dtype(factor.dtype)
    given = (factor, target_factor, target_cov, sample_factor, snr_db)
    inputs = [None if x is None else x.to(dtype).contiguous() for x in given]
    b, n, q, _ = factor.shape
    k = 0 if target_factor is None else target_factor.shape[2]
    x = 0 if sample_factor is None else sample_factor.shape[2]
    loss = factor.new_empty(b, dtype=dtype)
    grad_factor = loss.new_empty(factor.shape if gradients >= 1 else 0)
    grad_sample = loss.new_empty(sample_factor.shape if gradients >= 2 else 0)
    pointers = [None if t is None else t.data_ptr() for t in (*inputs, loss, grad_factor, grad_sample)]
    settings = (blend, loading, target_loading, shrink, gradients)
    if _function(dtype, simd)(*pointers, b, n, q, k, x, *settings):
        raise MemoryError(
            f"cov_nmse: no memory for the scratch of a scene with N = {n} and {q + x + k} columns. Lower N or the"
            " number of threads (torch.set_num_threads)."
        )
    return loss, grad_factor, grad_sample
