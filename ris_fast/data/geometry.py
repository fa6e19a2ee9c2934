"""Source positions and powers of files: shift an off-centre array to the centred one, recover powers from a dense R.

Legend: B batch, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.physics.array import RISArray, cosine_steering, direction_cosines

SWEEPS = 200
CENTRED = (0.0, 0.0)


def original_offset(array: RISArray) -> tuple[float, float]:
    """How many elements along x and y the original's array is off-centre: it places element i at (i - N_H // 2) d."""
    return (-0.5 if array.horizontal % 2 == 0 else 0.0, -0.5 if array.vertical % 2 == 0 else 0.0)


class Geometry(NamedTuple):
    """Sources as the centred array sees them, float64, (B, K) each; `clamped` marks angles that do not exist."""

    u: Tensor
    v: Tensor
    azimuth: Tensor
    elevation: Tensor
    range_m: Tensor
    clamped: Tensor


def centre(array: RISArray, offset: tuple[float, float], azimuth: Tensor, elevation: Tensor, range_m: Tensor,
           active: Tensor) -> Geometry:
    """Re-express sources given relative to an array whose elements sit `offset` spacings off the origin in x and y.

    Model: an element is at (x + s, y + t). Fresnel: u (x+s) - (x+s)^2/(2r) = (u - s/r) x - x^2/(2r) + const, so
        u' = u - s/r, v' = v - t/r, r' = r. Spherical: the source itself moves by (-s, -t). Both are exact up to a
        phase common to all elements, which no covariance sees.
    Returns: `Geometry`; where u'^2 + v'^2 > 1 the steering vector (from u', v') stays exact and the angle is the
        nearest that exists.
    """
    away = torch.ones_like(range_m)
    r = torch.where(active, range_m, away)
    u, v = direction_cosines(azimuth * active, elevation * active)
    s, t = (each * array.spacing_m for each in offset)
    if array.wavefront == "fresnel":
        u, v, moved = u - s / r, v - t / r, r
    else:
        moved = (r * r - 2.0 * r * (s * u + t * v) + s * s + t * t).sqrt()
        u, v = (r * u - s) / moved, (r * v - t) / moved
    new_elevation = v.clamp(-1.0, 1.0).asin()
    sine = u / new_elevation.cos().clamp_min(1e-12)
    clamped = (u * u + v * v > 1.0) & active
    return Geometry(u, v, sine.clamp(-1.0, 1.0).asin() * active, new_elevation * active, moved, clamped)


def target_factor(array: RISArray, u: Tensor, v: Tensor, range_m: Tensor, power: Tensor) -> Tensor:
    """Columns sqrt(p_k) a_k, zero where p_k is: (B, K) each -> (B, N, K, 2)."""
    present = power > 0
    steer = cosine_steering(array, u, v, torch.where(present, range_m, torch.ones_like(range_m)))
    return (steer * power.sqrt()[..., None, None]).transpose(1, 2).contiguous()


def recover_powers(array: RISArray, sources: Geometry, active: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Non-negative least squares of R on a_k a_k^H.

    Model: min_p |R - sum_k p_k a_k a_k^H|^2, p >= 0: normal matrix |a_i^H a_j|^2, right side a_k^H R a_k.
    Args: active (B, K) bool; covariance (B, N, N, 2).
    Returns: powers (B, K) float64, zero where not active, and the NMSE of the fit (B,) float64.
    Numerics: steering vectors in float64, products with R in complex64: an exact R leaves about 1e-13.
    """
    steer = cosine_steering(array, sources.u, sources.v, sources.range_m)
    a_BNK = (torch.view_as_complex(steer) * active[..., None]).transpose(1, 2)
    a32, r32 = a_BNK.to(torch.complex64), torch.view_as_complex(covariance)
    gram = (a_BNK.mH @ a_BNK).abs().square()
    right = (a32.conj() * (r32 @ a32)).sum(1).real.double()
    power = _non_negative(gram, right)
    residual = torch.baddbmm(r32, a32 * power.float()[:, None], a32.mH, alpha=-1)
    misfit, size = (torch.view_as_real(each).flatten(1).norm(dim=1).double() for each in (residual, r32))
    return power, (misfit / size).square()


def _non_negative(gram_BKK: Tensor, right_BK: Tensor) -> Tensor:
    """Solve, and where a component comes out negative sweep by coordinates with a clamp at zero."""
    diagonal = gram_BKK.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(torch.where(diagonal > 0, 1e-13, 1.0).to(gram_BKK))
    power = torch.linalg.solve(gram_BKK + ridge, right_BK)
    bad = (power < 0).any(1)
    power = power.clamp_min(0.0)
    for _ in range(SWEEPS if bool(bad.any()) else 0):
        for k in range(power.shape[1]):
            slope = right_BK[:, k] - (gram_BKK[:, k] * power).sum(1)
            better = (power[:, k] + slope / diagonal[:, k].clamp_min(1e-30)).clamp_min(0.0)
            power[:, k] = torch.where(bad & (diagonal[:, k] > 0), better, power[:, k])
    return power
