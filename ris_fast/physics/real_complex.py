"""Complex arithmetic on real pairs: a complex array is a real one with a last axis of 2 (re, im).

Complex dtypes do not survive Inductor and ONNX, so none is used between the Python edge and the kernels.
Legend: B batch, M rows, N inner, P columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expi(phase: Tensor) -> Tensor:
    """exp(j phase): (...) radians -> (..., 2)."""
    return torch.stack((phase.cos(), phase.sin()), dim=-1)


def conj(a: Tensor) -> Tensor:
    """Complex conjugate of (..., 2)."""
    return torch.stack((a[..., 0], -a[..., 1]), dim=-1)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise product of two (..., 2) arrays, broadcast."""
    a_re, a_im, b_re, b_im = a[..., 0], a[..., 1], b[..., 0], b[..., 1]
    return torch.stack((a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re), dim=-1)


def matmul(a_BMN: Tensor, b_BNP: Tensor) -> Tensor:
    """Batched product of (B, M, N, 2) and (B, N, P, 2) as one real product of twice the inner and outer size."""
    batch, rows, inner, _ = a_BMN.shape
    columns = b_BNP.shape[-2]
    turned = torch.stack((-b_BNP[..., 1], b_BNP[..., 0]), dim=-1)
    right = torch.stack((b_BNP, turned), dim=-3).reshape(b_BNP.shape[0], 2 * inner, 2 * columns)
    left = a_BMN.reshape(batch, rows, 2 * inner)
    return torch.matmul(left, right).reshape(batch, rows, columns, 2)


def adjoint_matmul(a_BNM: Tensor, b_BNP: Tensor) -> Tensor:
    """a^H b for (B, N, M, 2) and (B, N, P, 2), without a transposed copy of `a`: (B, M, P, 2)."""
    batch, inner, rows, _ = a_BNM.shape
    columns = b_BNP.shape[-2]
    right = b_BNP.reshape(b_BNP.shape[0], inner, 2 * columns)
    both = torch.matmul(a_BNM.reshape(batch, inner, 2 * rows).transpose(-1, -2), right)
    both = both.reshape(batch, rows, 2, columns, 2)
    real = both[:, :, 0, :, 0] + both[:, :, 1, :, 1]
    imag = both[:, :, 0, :, 1] - both[:, :, 1, :, 0]
    return torch.stack((real, imag), dim=-1)


def power(a: Tensor) -> Tensor:
    """|a|^2 elementwise: (..., 2) -> (...)."""
    re, im = a.unbind(-1)  # a sum over a last axis of 2 is four times as slow
    return re.square() + im.square()


def to_complex(a: Tensor) -> Tensor:
    """The complex view of (..., 2); for the Python edge only."""
    return torch.view_as_complex(a.contiguous())


def to_pairs(a: Tensor) -> Tensor:
    """Complex (...) -> real (..., 2); real pairs pass through unchanged."""
    return torch.view_as_real(a.resolve_conj()) if a.is_complex() else a
