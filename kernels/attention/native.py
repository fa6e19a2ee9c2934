"""Calls the C++ attention (native.cpp) on CPU tensors."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader

_NAMES = {torch.float32: "attention_f32", torch.float64: "attention_f64", torch.bfloat16: "attention_bf16"}
DTYPES = tuple(_NAMES)


@cache
def _function(dtype: torch.dtype, simd: str | None) -> Any:
    return loader.function(_NAMES[dtype], [c_void_p] * 3 + [c_int64] * 4, simd, c_int)


def attention(qkv: Tensor, heads: int, simd: str | None = None) -> Tensor:
    """`ris_fast::attention`; simd: instruction set to use instead of the best one."""
    batch, tokens, width = qkv.shape
    return _run(qkv.new_empty(batch, tokens, width // 3), None, qkv, heads, simd)


def attention_backward(grad: Tensor, qkv: Tensor, heads: int, simd: str | None = None) -> Tensor:
    """`ris_fast::attention_backward`; simd: as above."""
    return _run(qkv.new_empty(qkv.shape), grad.to(qkv.dtype).contiguous(), qkv, heads, simd)


def _run(out: Tensor, grad: Tensor | None, qkv: Tensor, heads: int, simd: str | None) -> Tensor:
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape
    given = None if grad is None else grad.data_ptr()
    sizes = batch, tokens, heads, width // (3 * heads)
    if out.numel() and _function(qkv.dtype, simd)(out.data_ptr(), given, qkv.data_ptr(), *sizes):
        raise MemoryError(f"attention: no memory for the scratch of {tokens} tokens; it grows with their square.")
    return out
