"""The original pipeline's objective as its description gives it: dense complex covariances and terms scene by scene.

Written from the description, at the weights of the preset `original`, without the term whose gradient is not finite.

Legend: B batch, N RIS elements, K sources (padded).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as fn

from ris_fast.config.schema import Loss
from ris_fast.models.prediction import Prediction
from ris_fast.physics.real_complex import to_complex, to_pairs
from ris_fast.physics.scenes import Scenes


def normalised(cov: Tensor) -> Tensor:
    """Hermitian part, trace N."""
    cov = 0.5 * (cov + cov.mH)
    trace = torch.diagonal(cov, dim1=-2, dim2=-1).real.sum(-1).clamp_min(1e-9)
    return cov * (cov.shape[-1] / trace)[:, None, None]


def effective(cov: Tensor, snr_db: Tensor, loading: float, shrink: float) -> Tensor:
    """normalise, load, normalise, shrink, each time through N x N, with the five sanity checks that wait for the
    device."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device).expand_as(cov)
    cov = normalised(normalised(cov) + loading * eye)
    alpha = (1e-3 * 10.0 ** (-snr_db / 20.0)).clamp(1e-4, 5e-2)[:, None, None] * (shrink / 1e-3)
    trace = torch.diagonal(cov, dim1=-2, dim2=-1).real.sum(-1)
    cov = (1.0 - alpha) * cov + alpha * (trace / cov.shape[-1])[:, None, None] * eye
    checks = (
        torch.isfinite(cov.real).all(),
        torch.isfinite(cov.imag).all(),
        (trace > 0).all(),
        (cov - cov.mH).abs().max() < 1e-2,
        (alpha >= 0).all(),
    )
    if not all(bool(check) for check in checks):
        raise FloatingPointError("original: the effective covariance is not sane.")
    return cov


def nmse(cov: Tensor, target: Tensor) -> Tensor:
    return ((cov - target).abs().square().sum((1, 2)) / target.abs().square().sum((1, 2)).clamp_min(1e-12)).mean()


def original_loss(prediction: Prediction, scenes: Scenes, weights: Loss) -> Tensor:
    """All terms of the preset `original`."""
    half = prediction.factor.shape[2] // 2
    angle, rest = to_complex(prediction.factor[:, :, :half]), to_complex(prediction.factor[:, :, half:])
    predicted = angle @ angle.mH + rest @ rest.mH
    arguments = (scenes.snr_db, weights.loading, weights.shrink)
    truth = normalised(to_complex(to_pairs(normalised(to_complex(scenes.covariance)))))
    target = effective(truth, *arguments)
    total = weights.cov * nmse(effective(predicted, *arguments), target)
    total = total + weights.cov_pred * nmse(effective(predicted, *arguments), target)
    total = total + weights.orthogonality * _orthogonality(angle, scenes.count) + weights.cross * _cross(angle, rest)
    total = total + _located(prediction, scenes, weights)
    total = total + weights.subspace * subspace(predicted, to_complex(scenes.factor), scenes.count)
    return total + weights.count * fn.cross_entropy(prediction.count_logits, scenes.count - 1)


def _orthogonality(angle: Tensor, count: Tensor) -> Tensor:
    gram = angle.mH @ angle
    active = torch.arange(gram.shape[1], device=gram.device) < count[:, None]
    pairs = (active[:, :, None] & active[:, None, :]).float()
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return ((gram - eye).abs().square() * pairs).sum() / pairs.sum()


def _cross(angle: Tensor, rest: Tensor) -> Tensor:
    first, second = (
        unit.mH @ unit for unit in (part / part.norm(dim=1, keepdim=True).clamp_min(1e-6) for part in (angle, rest))
    )
    off = 1.0 - torch.eye(first.shape[1], device=first.device)
    return ((first - second).abs().square() * off).mean()


def _located(prediction: Prediction, scenes: Scenes, weights: Loss) -> Tensor:
    """Angles and log-range by slot, the Chamfer distance, and the range in metres."""
    mask = (torch.arange(scenes.azimuth.shape[1], device=scenes.count.device) < scenes.count[:, None]).float()
    share = mask / mask.sum(1, keepdim=True)
    gaps = [
        torch.remainder(a - b + math.pi, 2 * math.pi) - math.pi
        for a, b in ((prediction.azimuth, scenes.azimuth), (prediction.elevation, scenes.elevation))
    ]
    angles = [fn.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=math.radians(0.25)) for gap in gaps]
    log_range = prediction.range_m.clamp_min(0.45).log() - scenes.range_m.clamp_min(0.45).log()
    ranges = fn.huber_loss(log_range, torch.zeros_like(log_range), reduction="none", delta=0.2)
    squares = (prediction.azimuth[:, :, None] - scenes.azimuth[:, None]).square() + (
        prediction.elevation[:, :, None] - scenes.elevation[:, None]
    ).square()
    two_way = (squares.amin(1) * share).sum(1) + (squares + 1e3 * (1 - mask)[:, None]).amin(2).mean(1)
    metres = ((prediction.range_m - scenes.range_m) / 9.5).square()
    return (
        weights.angle * ((angles[0] + 1.5 * angles[1] + ranges) * share).sum(1).mean()
        + weights.chamfer * two_way.mean()
        + weights.range * (metres * share).sum(1).mean()
    )


def subspace(cov: Tensor, steer: Tensor, count: Tensor) -> Tensor:
    """|P R P|^2 / |R|^2 outside the true steering vectors, a loop over scenes that reads every count."""
    total, elements = cov.new_zeros((), dtype=torch.float32), cov.shape[-1]
    for scene in range(cov.shape[0]):
        sources = int(count[scene].item())
        a = steer[scene, :, :sources]
        a = a / a.norm(dim=0, keepdim=True).clamp_min(1e-12)
        ridge = 1e-4 * torch.eye(sources, dtype=cov.dtype, device=cov.device)
        inside = a @ torch.linalg.solve(a.mH @ a + ridge, a.mH)
        outside = torch.eye(elements, dtype=cov.dtype, device=cov.device) - inside
        left = outside @ cov[scene] @ outside
        total = total + left.abs().square().sum() / cov[scene].abs().square().sum().clamp_min(1e-12)
    return total / cov.shape[0]
