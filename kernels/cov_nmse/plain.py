"""Covariance NMSE and its gradient in closed form in plain torch: where no kernel exists, and as a benchmark rival.

Letters: B batch, N elements, P columns of Z = [F, X, S]; formulas as in triton_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import shrink_weight


def _normaliser(power_B: Tensor, elements: int) -> Tensor:
    """N / |F|^2, and 0 for a zero factor, which stays zero under normalisation."""
    return torch.where(power_B == 0, 0, elements / torch.where(power_B == 0, 1, power_B))


def _complex(pair: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(pair.to(dtype).contiguous())


def _adjoint(x: Tensor) -> Tensor:
    """X^H with a physical conjugate: inside an operator that a compiled graph calls, torch's lazy one is ignored."""
    return x.conj_physical().transpose(-2, -1)


def cov_nmse(
    factor: Tensor, target_factor: Tensor | None, target_cov: Tensor | None, sample_factor: Tensor | None, snr_db: Tensor | None,
    blend: float, loading: float, target_loading: float, shrink: float, diag_weight: float, offdiag_weight: float, gradients: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value and unit gradients; arguments and results as `ris_fast::cov_nmse` (op.py).

    Numerics: low-rank target in float64 Gram form; dense target in the direct form, in the factor's own precision.
    """
    out_dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
    work = out_dtype if target_factor is None else torch.float64
    elements = factor.shape[1]
    alpha_B = shrink_weight(None if snr_db is None else snr_db.to(work), shrink)
    alpha_B = torch.zeros(len(factor), dtype=work, device=factor.device) if shrink == 0 else alpha_B[:, 0, 0]
    pred_B, true_B = (1 - alpha_B) / (1 + loading), (1 - alpha_B) / (1 + target_loading)
    eye_true_B = true_B * target_loading + alpha_B
    eye_B = pred_B * loading + alpha_B - eye_true_B
    extra = diag_weight - offdiag_weight

    parts = [_complex(factor, work)]
    scales = [pred_B * ((1 - blend) if sample_factor is not None else 1)]
    if sample_factor is not None:
        parts.append(_complex(sample_factor, work))
        scales.append(pred_B * blend)
    if target_factor is not None:
        parts.append(_complex(target_factor, work))
        scales.append(-true_B)
    weights = [s * _normaliser(p.abs().square().sum((1, 2)), elements) for p, s in zip(parts, scales, strict=True)]
    z_BNP = torch.cat(parts, 2)
    w_BP = torch.cat([w[:, None].expand(-1, p.shape[2]) for w, p in zip(weights, parts, strict=True)], 1)
    if target_factor is not None:
        gram_BPP = _adjoint(z_BNP) @ z_BNP
        size = target_factor.shape[2]
        power_B = w_BP[:, -1].square() * gram_BPP[:, -size:, -size:].abs().square().sum((1, 2))
        target_diag_BN = -(w_BP[:, None, -size:] * z_BNP[:, :, -size:].abs().square()).sum(-1)
        error_B = (w_BP[:, :, None] * w_BP[:, None] * gram_BPP.abs().square()).sum((1, 2))
        error_B = error_B + 2 * eye_B * (w_BP * gram_BPP.diagonal(dim1=1, dim2=2).real).sum(1) + eye_B**2 * elements
        times_D = lambda f, start: z_BNP @ (w_BP[:, :, None] * gram_BPP[:, :, start : start + f.shape[2]]) + eye_B[:, None, None] * f  # noqa: E731
        diag_BN = (w_BP[:, None] * z_BNP.abs().square()).sum(-1) + eye_B[:, None]
    else:
        target_BNN = _complex(target_cov, work)
        trace_B = target_BNN.diagonal(dim1=1, dim2=2).real.sum(-1)
        target_BNN = (true_B * _normaliser(trace_B, elements))[:, None, None] * target_BNN
        power_B = torch.view_as_real(target_BNN).square().sum((1, 2, 3))
        target_diag_BN = target_BNN.diagonal(dim1=1, dim2=2).real
        d_BNN = (z_BNP * w_BP[:, None]) @ _adjoint(z_BNP) - target_BNN
        d_BNN.diagonal(dim1=1, dim2=2).add_(eye_B[:, None])
        error_B = torch.view_as_real(d_BNN).square().sum((1, 2, 3))
        times_D = lambda f, start: d_BNN @ f  # noqa: E731
        diag_BN = d_BNN.diagonal(dim1=1, dim2=2).real
    power_B = power_B + 2 * eye_true_B * target_diag_BN.sum(1) + eye_true_B**2 * elements
    power_B = offdiag_weight * power_B + extra * (target_diag_BN + eye_true_B[:, None]).square().sum(1)
    error_B = offdiag_weight * error_B + extra * diag_BN.square().sum(1)

    def gradient(which: int) -> Tensor:
        f, start = parts[which], sum(p.shape[2] for p in parts[:which])
        pull = offdiag_weight * times_D(f, start) + extra * diag_BN[:, :, None] * f
        norm_B = f.abs().square().sum((1, 2))
        along_B = torch.where(norm_B == 0, 0, (torch.view_as_real(f) * torch.view_as_real(pull)).sum((1, 2, 3)) / torch.where(norm_B == 0, 1, norm_B))
        out = (4 * weights[which] / power_B)[:, None, None] * (pull - along_B[:, None, None] * f)
        return torch.view_as_real(out).to(out_dtype).contiguous()

    empty = factor.new_empty(0, dtype=out_dtype)
    return (error_B / power_B).to(out_dtype), gradient(0) if gradients >= 1 else empty, gradient(1) if gradients >= 2 else empty.clone()
