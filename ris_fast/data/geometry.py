"""Source positions and powers of files: shift an off-centre array to the centred one, recover powers and factors from a
dense R.

Legend: B batch, N RIS elements, K sources (padded to K_max).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.physics.array import RISArray, cosine_steering, direction_cosines
from ris_fast.physics.non_negative import non_negative_least_squares

EXACT = 1e-6  # NMSE of R against its own factors: float32 phases leave up to 1e-9, element jitter 1e-2
BETTER = 0.5  # of the misfit of the known offsets, at which another one is believed
FEW, ROUNDS = 32, 20  # scenes that tell where the array sits, and looks at them
CENTRED = (0.0, 0.0)


def original_offset(array: RISArray) -> tuple[float, float]:
    """How many elements along x and y the original's array is off-centre: it places element i at (i - N_H // 2) d.
    Elements anywhere are where they are."""
    if not array.grid:
        return CENTRED
    return (-0.5 if array.horizontal % 2 == 0 else 0.0, -0.5 if array.vertical % 2 == 0 else 0.0)


@dataclass
class Reach:
    """The largest azimuth and elevation of sources, without sign, in rad, and the largest range in m; 0 before any."""

    azimuth: float = 0.0
    elevation: float = 0.0
    range_m: float = 0.0

    def include(self, azimuth: Tensor, elevation: Tensor, range_m: Tensor, active: Tensor) -> None:
        """Sources, (B, K) each, of which the `active` are there."""
        for name, values in (("azimuth", azimuth), ("elevation", elevation), ("range_m", range_m)):
            setattr(self, name, max(getattr(self, name), float((values.abs() * active).max())))


class CentredSources(NamedTuple):
    """Sources as the centred array sees them, float64, (B, K) each; `clamped` marks angles that do not exist."""

    u: Tensor
    v: Tensor
    azimuth: Tensor
    elevation: Tensor
    range_m: Tensor
    clamped: Tensor


def centre(
    array: RISArray, offset: tuple[float, float], azimuth: Tensor, elevation: Tensor, range_m: Tensor, active: Tensor
) -> CentredSources:
    """Re-express sources given relative to an array whose elements sit `offset` spacings off the origin in x and y.

    Model: an element is at (x + s, y + t). Fresnel: u (x+s) - (x+s)^2/(2r) = (u - s/r) x - x^2/(2r) + const, so
        u' = u - s/r, v' = v - t/r, r' = r. Spherical: the source itself moves by (-s, -t). Both are exact up to a
        phase common to all elements, which no covariance sees.
    Returns: `CentredSources`; where u'^2 + v'^2 > 1 the steering vector (from u', v') stays exact and the angle is the
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
    return CentredSources(u, v, sine.clamp(-1.0, 1.0).asin() * active, new_elevation * active, moved, clamped)


def target_factor(array: RISArray, u: Tensor, v: Tensor, range_m: Tensor, power: Tensor) -> Tensor:
    """Columns sqrt(p_k) a_k, zero where p_k is: (B, K) each -> (B, N, K, 2)."""
    present = power > 0
    steer = cosine_steering(array, u, v, torch.where(present, range_m, torch.ones_like(range_m)))
    return (steer * power.sqrt()[..., None, None]).transpose(1, 2).contiguous()


def recover_powers(
    array: RISArray, sources: CentredSources, active: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
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
    power = non_negative_least_squares(gram, right)
    residual = torch.baddbmm(r32, a32 * power.float()[:, None], a32.mH, alpha=-1)
    misfit, size = (torch.view_as_real(each).flatten(1).norm(dim=1).double() for each in (residual, r32))
    return power, (misfit / size).square()


def find_offset(
    array: RISArray, azimuth: Tensor, elevation: Tensor, range_m: Tensor, active: Tensor, covariance: Tensor
) -> tuple[float, float]:
    """Where the files' array sits, in spacings off the origin: the original's half element, nowhere, or where R itself
    says, whichever explains the first scenes' R best. Elements anywhere are where they are."""
    if not array.grid:
        return CENTRED

    def misfit(offset: tuple[float, float]) -> float:
        few = [t[:FEW] for t in (azimuth, elevation, range_m, active)]
        return float(recover_powers(array, centre(array, offset, *few), few[3], covariance[:FEW])[1].median())

    original = original_offset(array)
    known = (
        CENTRED if misfit(CENTRED) < 0.8 * misfit(original) else original
    )  # the first R may be another scene's, and fit neither
    if misfit(known) < EXACT:
        return known
    own = estimate_offset(array, azimuth, elevation, range_m, active, covariance)
    return own if own is not None and misfit(own) < BETTER * misfit(known) else known


def estimate_offset(
    array: RISArray, azimuth: Tensor, elevation: Tensor, range_m: Tensor, active: Tensor, covariance: Tensor
) -> tuple[float, float] | None:
    """The offset of the files' array, in spacings, from scenes of one source; None where there is no such scene.

    Model: R = p a a^H has between neighbours in x the phase k (u' - x/r) d and smaller terms, with u' = u - s/r. Its
        difference to that of the steering vector at an assumed offset, summed over all neighbours, is k d times the
        error in u'; the least-squares slope of that error over 1/r fixes s. Likewise in y.
    Numerics: u' is known up to wavelength/spacing, so an offset of very many elements is not found.
    """
    alone = (active.sum(1) == 1).nonzero()[:FEW, 0]
    if not alone.numel():
        return None
    positions, active = [t[alone, :1] for t in (azimuth, elevation, range_m)], active[alone, :1]
    planes = torch.view_as_complex(covariance[alone].double())
    planes = planes.unflatten(2, (array.vertical, array.horizontal)).unflatten(1, (array.vertical, array.horizontal))
    seen = [_neighbours(planes.diagonal(dim1=same, dim2=same + 2)) for same in (1, 2)]
    near_B, step = 1.0 / positions[2][:, 0], array.wavenumber * array.spacing_m
    offset = list(CENTRED)
    for _ in range(ROUNDS):
        model = centre(array, (offset[0], offset[1]), *positions, active)
        steer = torch.view_as_complex(cosine_steering(array, model.u, model.v, model.range_m))[:, 0]
        steer = steer.unflatten(1, (array.vertical, array.horizontal))
        pairs = (steer[:, :, 1:] * steer[:, :, :-1].conj()).sum(1), (steer[:, 1:] * steer[:, :-1].conj()).sum(2)
        for axis in (0, 1):
            error_B = (seen[axis] * pairs[axis].conj()).sum(1).angle() / step
            offset[axis] -= float((error_B * near_B).sum() / near_B.square().sum()) / array.spacing_m
    return (offset[0], offset[1])


def _neighbours(blocks: Tensor) -> Tensor:
    """R between neighbours along one axis, summed over the other: (B, n, n, other) -> (B, n - 1)."""
    return blocks.diagonal(offset=-1, dim1=1, dim2=2).sum(1)


def leading_factor(covariance: Tensor, columns: int) -> Tensor:
    """The factor of each R's largest eigenvalues, largest first: (B, N, N, 2) -> (B, N, columns, 2), zero where R has
    none.

    For R of at most this rank it is exact, whatever the steering vectors are. Numerics: two passes of a subspace
    iteration;
        eigenvalues below 1e-5 of the largest are float32's rounding.
    """
    r = torch.view_as_complex(covariance.contiguous())
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(r.shape[-1], min(columns + 4, r.shape[-1]), generator=generator).to(r)
    basis = torch.linalg.qr(r @ torch.linalg.qr(r @ start)[0])[0]
    value, vector = torch.linalg.eigh(basis.mH @ r @ basis)
    factor = (basis @ vector * value.clamp_min(0.0).sqrt()[:, None]).flip(-1)[..., :columns]
    strength = factor.abs().square().sum(1, keepdim=True)
    factor = torch.where(strength > 1e-5 * strength[..., :1], factor, 0)
    return torch.view_as_real(torch.nn.functional.pad(factor, (0, columns - factor.shape[-1]))).contiguous()
