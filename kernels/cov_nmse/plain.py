"""Covariance NMSE and its gradient in closed form in plain torch: where no kernel exists, and as a benchmark rival.

Letters: B batch, N elements, P columns of Z = [F, X, S]; formulas as in triton_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Arguments, compute_dtype, normaliser, shrink_weight


def _complex(pair: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(pair.to(dtype).contiguous())


def _adjoint(x: Tensor) -> Tensor:
    """X^H with a physical conjugate: inside an operator that a compiled graph calls, torch's lazy one is ignored."""
    return x.conj_physical().transpose(-2, -1)


class Affine(NamedTuple):
    """D = Z diag(w) Z^H + e I - dense target, and the identity's share of the target."""

    parts: list[Tensor]  # complex (B, N, .) each: F, then X and S where they are given
    weights: list[Tensor]  # (B,) each: what a part's outer product is multiplied by
    eye_B: Tensor  # e
    true_B: Tensor  # scale of the trace-N target
    eye_true_B: Tensor

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Z (B, N, P) and w (B, P)."""
        repeated = [w[:, None].expand(-1, p.shape[2]) for w, p in zip(self.weights, self.parts, strict=True)]
        return torch.cat(self.parts, 2), torch.cat(repeated, 1)


class Distance(NamedTuple):
    """What both kinds of target lead to."""

    error_B: Tensor  # |D|^2
    power_B: Tensor  # |T|^2 without the identity's share
    trace_B: Tensor  # tr T without the identity's share
    times: Callable[[Tensor, int], Tensor]  # (a part, its first column in Z) -> D part


def cov_nmse(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Value and unit gradients; arguments and results as `ris_fast::cov_nmse` (op.py).

    Numerics: low-rank target in float64 Gram form; dense target in the direct form, in the factor's own precision.
    """
    a = Arguments(*args)
    out_dtype = compute_dtype(a.factor.dtype)
    work = out_dtype if a.target_factor is None else torch.float64
    affine = _affine(a, work)
    if a.target_factor is not None:
        distance = _to_factor(affine, a.target_factor.shape[2])
    else:
        distance = _to_dense(affine, _complex(a.target_cov, work))
    eye_B = affine.eye_true_B
    power_B = distance.power_B + 2 * eye_B * distance.trace_B + eye_B**2 * a.factor.shape[1]
    slopes = [_gradient(affine, distance, which, power_B).to(out_dtype) for which in range(a.gradients)]
    slopes += [a.factor.new_empty(0, dtype=out_dtype) for _ in range(2 - a.gradients)]
    return (distance.error_B / power_B).to(out_dtype), slopes[0], slopes[1]


def _affine(a: Arguments, work: torch.dtype) -> Affine:
    """The scalars that trace-normalise, blend, load and shrink both sides."""
    alpha_B = shrink_weight(None if a.snr_db is None else a.snr_db.to(work), a.shrink)
    alpha_B = torch.zeros(len(a.factor), dtype=work, device=a.factor.device) if a.shrink == 0 else alpha_B[:, 0, 0]
    pred_B, true_B = (1 - alpha_B) / (1 + a.loading), (1 - alpha_B) / (1 + a.target_loading)
    eye_true_B = true_B * a.target_loading + alpha_B
    given = [
        (a.factor, pred_B * ((1 - a.blend) if a.sample_factor is not None else 1)),
        (a.sample_factor, pred_B * a.blend),
        (a.target_factor, -true_B),
    ]
    parts = [_complex(part, work) for part, _ in given if part is not None]
    scales = [scale for part, scale in given if part is not None]
    weights = [
        s * normaliser(p.abs().square().sum((1, 2)), a.factor.shape[1]) for p, s in zip(parts, scales, strict=True)
    ]
    return Affine(parts, weights, pred_B * a.loading + alpha_B - eye_true_B, true_B, eye_true_B)


def _to_factor(affine: Affine, size: int) -> Distance:
    """Against a target factor, the last `size` columns of Z: everything from the Gram matrix of Z."""
    (z_BNP, w_BP), eye_B = affine.columns, affine.eye_B
    gram_BPP = _adjoint(z_BNP) @ z_BNP
    error_B = (w_BP[:, :, None] * w_BP[:, None] * gram_BPP.abs().square()).sum((1, 2))
    error_B = error_B + 2 * eye_B * (w_BP * gram_BPP.diagonal(dim1=1, dim2=2).real).sum(1) + eye_B**2 * z_BNP.shape[1]

    def times(part: Tensor, start: int) -> Tensor:
        return z_BNP @ (w_BP[:, :, None] * gram_BPP[:, :, start : start + part.shape[2]]) + eye_B[:, None, None] * part

    power_B = w_BP[:, -1].square() * gram_BPP[:, -size:, -size:].abs().square().sum((1, 2))
    trace_B = -w_BP[:, -1] * gram_BPP.diagonal(dim1=1, dim2=2).real[:, -size:].sum(1)
    return Distance(error_B, power_B, trace_B, times)


def _to_dense(affine: Affine, target_BNN: Tensor) -> Distance:
    """Against a dense target: D itself, which is the one place here that forms an N x N array."""
    z_BNP, w_BP = affine.columns
    trace_B = target_BNN.diagonal(dim1=1, dim2=2).real.sum(-1)
    target_BNN = (affine.true_B * normaliser(trace_B, z_BNP.shape[1]))[:, None, None] * target_BNN
    d_BNN = (z_BNP * w_BP[:, None]) @ _adjoint(z_BNP) - target_BNN
    d_BNN.diagonal(dim1=1, dim2=2).add_(affine.eye_B[:, None])
    error_B, power_B = (torch.view_as_real(each).square().sum((1, 2, 3)) for each in (d_BNN, target_BNN))
    trace_B = target_BNN.diagonal(dim1=1, dim2=2).real.sum(1)
    return Distance(error_B, power_B, trace_B, lambda part, start: d_BNN @ part)


def _gradient(affine: Affine, distance: Distance, which: int, power_B: Tensor) -> Tensor:
    """dNMSE/dF as real pairs for part `which`: 4 a (D F - (tr(F^H D F)/|F|^2) F) / |T|^2."""
    part, start = affine.parts[which], sum(each.shape[2] for each in affine.parts[:which])
    pull = distance.times(part, start)
    norm_B = part.abs().square().sum((1, 2))
    inner_B = (torch.view_as_real(part) * torch.view_as_real(pull)).sum((1, 2, 3))
    along_B = torch.where(norm_B == 0, 0, inner_B / torch.where(norm_B == 0, 1, norm_B))
    scaled = (4 * affine.weights[which] / power_B)[:, None, None] * (pull - along_B[:, None, None] * part)
    return torch.view_as_real(scaled).contiguous()
