"""The auxiliary terms of the objective, each a number per scene: pure functions of a prediction and the truth.

None of them differentiates an eigen, singular value or QR decomposition, forms an N x N array or divides by the norm
of a single column, so all are finite, with finite gradients, for rank-deficient, repeated and zero factors.
What acts on a factor takes Gram matrices, which the terms share, where it can: they are N times smaller.
Legend: B batch, N RIS elements, Q factor columns, K sources (padded), P predicted slots, S points of a stencil.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as fn

from ris_fast.kernels.scale import power_of_two, rescaled
from ris_fast.physics.real_complex import adjoint_matmul, expi, matmul, multiply, power

ANGLE_DELTA = math.radians(0.25)
RANGE_DELTA = 0.2
ANGLE_SCALE = math.radians(5.0)  # how far apart in angle, and in log-range, counts the same in the assignment
RANGE_SCALE = 0.2
WORTH = {"angle": ANGLE_DELTA * ANGLE_SCALE, "range": RANGE_DELTA * RANGE_SCALE}
RIDGE = 1e-4  # of the true steering vectors' Gram matrix, whose diagonal is 1
LOADING = 1e-3  # of the spectrum, as a share of the prediction's trace
FLOOR = 1e-6  # floor of a denominator that may vanish, where the trace is 1
SMALLEST = 1e-24  # squared norm below which there is no direction to speak of
FAINT = 1e-16  # trace that counts as zero, of factors in scale: the square of its reciprocal is representable
LARGEST_SCALE = 2.0**40


def in_scale(factor_BNQ: Tensor) -> Tensor:
    """Each scene's factor times a power of two that makes its entries of order one, at most 2^40: what the terms on
    factors are given, none of which depends on its scale. So neither do their gradients but by that power of two."""
    return factor_BNQ * power_of_two(factor_BNQ).clamp_max(LARGEST_SCALE)


def unit_factor(factor_BNQ: Tensor) -> Tensor:
    """F/|F|, so that F F^H has trace 1; below a norm of 1e-8 the trace goes to zero with the factor."""
    return factor_BNQ * _over(factor_BNQ.square().sum((1, 2, 3))).sqrt()


def gram(factor_BNQ: Tensor) -> Tensor:
    """F^H F: (B, Q, Q, 2)."""
    return adjoint_matmul(factor_BNQ, factor_BNQ)


def orthogonality(gram_BQQ: Tensor) -> Tensor:
    """Mean squared coherence of the factor's columns, weighted by their powers: (B,) in [0, 1].

    Model: sum_{i != j} |C_ij|^2 / sum_{i != j} C_ii C_jj with C = F^H F; 0 for orthogonal columns, 1 for parallel ones.
    """
    unit = gram_BQQ * _over(_trace(gram_BQQ))
    own = _diagonal(unit).square().sum(-1)
    return (_squares(unit) - own) / (1.0 + FLOOR - own)


def cross(gram_BQQ: Tensor) -> Tensor:
    """How far the two halves [A_angle, A_range] of a factor disagree on which columns overlap: (B,).

    Model: sum_{i != j} |C_ij - D_ij|^2, C and D the trace-normalised Gram matrices of the halves; 0 for equal halves.
    """
    half = gram_BQQ.shape[1] // 2
    first, second = (part * _over(_trace(part)) for part in (gram_BQQ[:, :half, :half], gram_BQQ[:, half:, half:]))
    gap = first - second
    return _squares(gap) - _diagonal(gap).square().sum(-1)


def _squares(matrix_BQQ: Tensor) -> Tensor:
    """|C|_F^2: (B,)."""
    return matrix_BQQ.square().sum((1, 2, 3))


def _diagonal(gram_BQQ: Tensor) -> Tensor:
    """Of a Hermitian matrix, whose diagonal is real: (B, Q)."""
    return gram_BQQ[..., 0].diagonal(dim1=1, dim2=2)


def _trace(gram_BQQ: Tensor) -> Tensor:
    return _diagonal(gram_BQQ).sum(-1)


def _over(total_B: Tensor) -> Tensor:
    """1/total, finite, to multiply (B, ., ., 2) by."""
    return total_B.clamp_min(FAINT).reciprocal()[:, None, None, None]


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def active_sources(count: Tensor, sources: int) -> Tensor:
    """(B, K) bool: which of the padded sources are there."""
    return torch.arange(sources, device=count.device) < count[:, None]


def source_mean(values_BK: Tensor, active_BK: Tensor) -> Tensor:
    """Mean over the sources that are there: (B,)."""
    return torch.where(active_BK, values_BK, 0.0).sum(-1) / active_BK.sum(-1).clamp_min(1)


def assignments(sources: int) -> tuple[Tensor, Tensor]:
    """All K! assignments as (K!, K) slots by source, and as a (K K, K!) table of zeros and ones over (slot, source)."""
    slots = torch.tensor(list(permutations(range(sources))))
    table = fn.one_hot(slots, sources).transpose(1, 2).flatten(1).T
    return slots, table.float()


@torch.no_grad()
def match(cost_BPK: Tensor, active_BK: Tensor, slots: Tensor, table: Tensor) -> Tensor:
    """For each source the slot that the cheapest assignment gives it, exactly: (B, K) int64.

    `slots`, `table`: from `assignments(K)`. Sources that are not there cost nothing.
    """
    cost = torch.where(active_BK[:, None], cost_BPK, 0.0)
    return slots[(cost.flatten(1) @ table.to(cost.dtype)).argmin(-1)]


def angle_gaps(azimuth_BP: Tensor, elevation_BP: Tensor, true_azimuth_BK: Tensor, true_elevation_BK: Tensor) -> Tensor:
    """Wrapped differences of every slot to every source: (B, P, K, 2) rad."""
    gaps = torch.stack(
        (azimuth_BP[..., None] - true_azimuth_BK[:, None], elevation_BP[..., None] - true_elevation_BK[:, None]), dim=-1
    )
    return wrapped(gaps)


def log_range_gaps(range_BP: Tensor, true_range_BK: Tensor, active_BK: Tensor) -> Tensor:
    """Differences of log-range of every slot to every source: (B, P, K); a source that is not there sits at 1 m."""
    return range_BP.log()[..., None] - torch.where(active_BK, true_range_BK, 1.0).log()[:, None]


@torch.no_grad()
def assignment_cost(losses: Mapping[str, Tensor]) -> Tensor:
    """What it costs to pair each slot with each source, (B, P, K): the Huber losses "angle" and "range" of all pairs,
    or one of them; 5 degrees are worth as much as 0.2 in log-range."""
    return torch.stack([loss / WORTH[name] for name, loss in losses.items()]).sum(0)


def huber(gap: Tensor, delta: float) -> Tensor:
    """g^2/2 up to delta, delta (|g| - delta/2) beyond."""
    return fn.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=delta)


def matched(losses_BPK: Tensor, slots_BK: Tensor, active_BK: Tensor) -> Tensor:
    """Mean over the sources that are there of each one's loss with its slot: (B,)."""
    return source_mean(losses_BPK.gather(1, slots_BK[:, None]).squeeze(1), active_BK)


def chamfer(angles_BPK2: Tensor, active_BK: Tensor) -> Tensor:
    """Two-way Chamfer distance on (azimuth, elevation), rad^2: (B,).

    Model: the mean over sources of the nearest slot's squared distance, plus the mean over slots of the nearest
        source's. A slot without a source of its own does best on top of another slot's.
    """
    distance = angles_BPK2.square().sum(-1)
    far = (2.0 * math.pi) ** 2
    to_source = torch.where(active_BK[:, None], distance, far).amin(2).mean(1)
    return source_mean(distance.amin(1), active_BK) + to_source


def unit_columns(factor_BNK: Tensor) -> Tensor:
    """The true steering vectors: columns of the target factor at unit norm, zero columns left zero. No gradient.

    A column 1e-12 times as long as a scene's longest counts as zero, whatever the unit of the powers.
    """
    factor_BNK = rescaled(factor_BNK.detach())
    norm = power(factor_BNK).sum(1, keepdim=True).clamp_min(SMALLEST)
    return factor_BNK * norm.rsqrt()[..., None].repeat(1, 1, 1, 2)  # a broadcast along a last axis of 2 is slow


def subspace(gram_BQQ: Tensor, overlap_BKQ: Tensor, true_gram_BKK: Tensor) -> Tensor:
    """The share of the predicted covariance that lies outside the true steering vectors A: (B,) in [0, 1].

    Model: |P R P|_F^2 / |R|_F^2 with R = F F^H and P = I - A M A^H, M = (A^H A + ridge I)^-1; with W = P F that is
        |W^H W|_F^2 / |F^H F|_F^2, and W^H W = F^H F - S^H (M + ridge M^2) S with S = A^H F. Only the true side is
        inverted, and it carries no gradient.
    Args: F^H F, S = A^H F and A^H A.
    """
    with torch.no_grad():
        inverse = hermitian_inverse(_load(true_gram_BKK, RIDGE))
        weight = inverse + RIDGE * matmul(inverse, inverse)
    inside = adjoint_matmul(overlap_BKQ, matmul(weight, overlap_BKQ))
    over = _over(_trace(gram_BQQ))
    return _squares((gram_BQQ - inside) * over) / _squares(gram_BQQ * over).clamp_min(FLOOR)


def stencil(x_N: Tensor, y_N: Tensor) -> Tensor:
    """Phase ramps that tilt a steering vector by -1, 0, 1 quarter beamwidths in either axis: (N, 9, 2), centre first.

    Args: x, y of the elements as shares of the aperture (`RISArray.shares`). A beamwidth is the distance 1/(N_H
    d/lambda) in u to the first zero of the array's pattern, which the width N_H d alone sets; a tilt in (u, v) keeps
    the curvature of the wavefront and with it the range.
    """
    tilts = sorted(((p, q) for p in (-1, 0, 1) for q in (-1, 0, 1)), key=lambda tilt: tilt != (0, 0))
    return expi(torch.stack([0.5 * math.pi * (p * x_N + q * y_N) for p, q in tilts], dim=-1).float())


def contrast(factor_BNQ: Tensor, steer_BNK: Tensor, ramp_NS: Tensor, active_BK: Tensor) -> Tensor:
    """Cross-entropy of the minimum-variance spectrum's peak against its neighbourhood, mean over sources: (B,).

    Model: spectrum 1/(a^H R^-1 a) with R = F F^H/|F|^2 + loading I; the term is -log of the true direction's share of
        the nine values of a 3 x 3 stencil around it: log 9 for a flat spectrum.
    Numerics: a^H R^-1 a = max_v 2 Re(a^H v) - v^H R v. The maximiser v = R^-1 a (by Woodbury, Q x Q) is taken without
        gradient; by the envelope theorem the gradient through R alone is exact, so no inverse is differentiated.
    """
    around = multiply(steer_BNK.detach()[:, :, :, None], ramp_NS.to(steer_BNK.dtype)[:, None]).flatten(2, 3)
    unit = unit_factor(factor_BNQ)
    with torch.no_grad():
        inverse = hermitian_inverse(_load(gram(unit), LOADING))
        best = (around - matmul(unit, matmul(inverse, adjoint_matmul(unit, around)))) / LOADING
        linear = 2.0 * (around * best).sum((1, 3)) - LOADING * power(best).sum(1)
    inverse_spectrum = linear - power(adjoint_matmul(unit, best)).sum(1)
    log_spectrum = -inverse_spectrum.clamp_min(FLOOR).log().unflatten(1, (steer_BNK.shape[2], -1))
    return source_mean(log_spectrum.logsumexp(-1) - log_spectrum[..., 0], active_BK)


def count_entropy(logits_BK: Tensor, count: Tensor) -> Tensor:
    """Cross-entropy of the number of sources, 1 .. K: (B,)."""
    return fn.cross_entropy(logits_BK, count - 1, reduction="none")


def _load(gram_BKK: Tensor, amount: float) -> Tensor:
    eye = torch.eye(gram_BKK.shape[1], dtype=gram_BKK.dtype, device=gram_BKK.device)
    return torch.stack((gram_BKK[..., 0] + amount * eye, gram_BKK[..., 1]), dim=-1)


def hermitian_inverse(matrix_BKK: Tensor) -> Tensor:
    """Inverse of small Hermitian positive definite matrices by Gauss-Jordan elimination, K fixed steps: (B, K, K, 2).

    No pivoting is needed for such matrices, and nothing here waits for the device as a library solver does.
    """
    size = matrix_BKK.shape[1]
    eye = torch.eye(size, dtype=matrix_BKK.dtype, device=matrix_BKK.device)
    eye = torch.stack((eye, torch.zeros_like(eye)), dim=-1)
    table = torch.cat((matrix_BKK, eye.expand_as(matrix_BKK)), dim=2)
    for k in range(size):
        row = table[:, k] / table[:, k, k, 0][:, None, None]
        table = table - multiply((table[:, :, k] - eye[:, k])[:, :, None], row[:, None])
    return table[:, :, size:]
