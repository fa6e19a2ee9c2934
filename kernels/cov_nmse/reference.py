"""Defines the covariance NMSE in plain torch: dense, complex, any device, never optimised; the only reference.

Letters: B batch, N elements, Q factor columns, K target columns, X sample columns; a last axis of 2 is (re, im).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """Arguments of `ris_fast::cov_nmse` in order: implementations take them flat and name them."""

    factor: Tensor  # (B, N, Q, 2)
    target_factor: Tensor | None  # (B, N, K, 2)
    target_cov: Tensor | None  # (B, N, N, 2)
    sample_factor: Tensor | None  # (B, N, X, 2)
    snr_db: Tensor | None  # (B,)
    blend: float
    loading: float
    target_loading: float
    shrink: float
    gradients: int = 0  # 0: none, 1: of factor, 2: of factor and sample_factor

    @property
    def sample_columns(self) -> int:
        """X, and 0 without a sample factor."""
        return 0 if self.sample_factor is None else self.sample_factor.shape[2]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of results and arithmetic: float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normaliser(power_B: Tensor, elements: int) -> Tensor:
    """N / power, and 0 for no power: a zero factor or target stays zero under normalisation."""
    return torch.where(power_B == 0, 0, elements / torch.where(power_B == 0, 1, power_B))


def trace_normalised(cov_BNN: Tensor) -> Tensor:
    """Scale to trace N; a matrix of trace zero stays zero."""
    trace_B = cov_BNN.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    return normaliser(trace_B, cov_BNN.shape[-1])[:, None, None] * cov_BNN


def covariance(factor_BNQ2: Tensor) -> Tensor:
    """F F^H normalised to trace N, complex (B, N, N)."""
    factor_BNQ = torch.view_as_complex(factor_BNQ2.contiguous())
    return trace_normalised(factor_BNQ @ factor_BNQ.mH)


def shrink_weight(snr_db_B: Tensor | None, shrink: float) -> Tensor | float:
    """alpha = clamp(alpha_0 10^(-SNR_dB/20), 1e-4, 5e-2) per scene; 0 where shrinkage is off."""
    return 0.0 if shrink == 0 else (shrink * 10 ** (-snr_db_B / 20)).clamp(1e-4, 5e-2)[:, None, None]


def cov_nmse(*args: Any) -> Tensor:
    """NMSE per scene, (B,): |R_eff - T_eff|^2 / |T_eff|^2.

    Takes `Arguments`, of which `gradients` is ignored: autograd supplies them.
    Source: design formulas (normalise, blend, load, shrink), each step written as it reads.
    """
    a = Arguments(*args)
    eye_NN = torch.eye(a.factor.shape[1], dtype=a.factor.dtype, device=a.factor.device)
    alpha = shrink_weight(a.snr_db, a.shrink)
    pred_BNN = covariance(a.factor)
    if a.sample_factor is not None:
        pred_BNN = (1 - a.blend) * pred_BNN + a.blend * covariance(a.sample_factor)
    dense = None if a.target_cov is None else trace_normalised(torch.view_as_complex(a.target_cov.contiguous()))
    target_BNN = covariance(a.target_factor) if dense is None else dense
    pred_BNN = (1 - alpha) * (pred_BNN + a.loading * eye_NN) / (1 + a.loading) + alpha * eye_NN
    target_BNN = (1 - alpha) * (target_BNN + a.target_loading * eye_NN) / (1 + a.target_loading) + alpha * eye_NN
    error_B = torch.view_as_real(pred_BNN - target_BNN).square().sum((-3, -2, -1))
    return error_B / torch.view_as_real(target_BNN).square().sum((-3, -2, -1))
