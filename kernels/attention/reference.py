"""Defines multi-head self-attention on a packed product in plain torch, forward and backward; the only reference.

Letters: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the arithmetic: float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Q, K and V, (B, H, L, D / H) each, in the precision of the arithmetic."""
    return qkv.to(compute_dtype(qkv.dtype)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(D / H)) V of each head: (B, L, 3 D), [Q | K | V] with heads side by side, -> (B, L, D)."""
    q, k, v = _parts(qkv, heads)
    return (_weights(q, k) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def attention_backward(grad: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of the packed product, (B, L, 3 D), for that of the result, (B, L, D).

    Formulas, P the softmax and G the gradient of a head's result: dV = P^T G; dP = G V^T;
    dS = P o (dP - rowsum(P o dP)) / sqrt(D / H); dQ = dS K; dK = dS^T Q.
    """
    q, k, v = _parts(qkv, heads)
    grad = grad.to(q.dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = _weights(q, k)
    slope = grad @ v.mT
    slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    parts = torch.stack((slope @ k, slope.mT @ q, weights.mT @ grad))  # (3, B, H, L, D / H)
    return parts.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)
