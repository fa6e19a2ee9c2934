"""Source positions from a signal basis: one null of the spectrum after the other, then all positions jointly.

Model: n(a) = 1 - |B^H a|^2 vanishes at the sources. Next to one that is found it is small too, so each further one is
where n(a) / |P a|^2 is least on the grid, with P the projection off the steering vectors found so far: a lobe gives
one source. After each, all positions move by Levenberg-Marquardt steps on
    f = |B - A A^+ B|^2,   A = [a_1 ... a_k],
whose Gauss-Newton form with the amplitudes eliminated needs only products of A, its tangents and B. The last steps, in
double precision, put the signal factor S S^H ~ R in the place of B: that weighs each eigenvector by its power.
Source: Mosher and Leahy, "Source localization using recursively applied and projected (RAP) MUSIC" (IEEE Trans. SP 47,
1999); Viberg and Ottersten, "Sensor array processing based on subspace fitting" (IEEE Trans. SP 39, 1991); Kaufman's
form of the Jacobian (BIT 15, 1975).

Legend: B batch, N RIS elements, Q basis columns, K sources, G grid points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.kernels.pursuit.search import TANGENTS
from ris_fast.localize.manifold import Manifold

STAGE_STEPS, FINAL_STEPS = 2, 5
OCCUPIED = 1e-3  # |P a|^2 of a grid point that is as good as found
DAMPING = 0.05  # first, times the share of B that is not yet explained
SMALLEST_DAMPING = 1e-9


class Equations(NamedTuple):
    """Gauss-Newton equations of one set of positions, in units of phase spread (`Manifold.scale`)."""

    cost: Tensor  # (B,)          f
    slope: Tensor  # (B, K, 3)     minus the gradient, halved
    curvature: Tensor  # (B, 3K, 3K)
    weight: Tensor  # (B, K)        |row k of A^+ B|^2, which a source's damping is measured in; 1 where it is not there


def find_positions(manifold: Manifold, basis: Tensor, factor: Tensor, count: Tensor, most: int) -> Tensor:
    """Positions (u, v, w) of `count` (B,) sources, at most `most`, in the order they were found: (B, most, 3) float64.

    Rows beyond the count are positions of the grid that mean nothing.
    """
    coarse = torch.cat((basis.real, basis.imag), dim=2).float()
    null = 1.0 - manifold.grid_power(coarse)
    left = torch.ones_like(null)
    position = manifold.grid.new_zeros(basis.shape[0], 0, 3)
    for found in range(most):
        ratio = torch.where(left > OCCUPIED, null / left, torch.inf)
        position = torch.cat((position, manifold.grid[ratio.argmin(1)][:, None]), dim=1)
        active = torch.arange(found + 1, device=count.device) < count[:, None]
        position = refine(manifold, coarse, position, active, STAGE_STEPS)
        if found + 1 < most:
            left = 1.0 - manifold.grid_power(_orthonormal(manifold.steer(position), active))
    active = torch.arange(most, device=count.device) < count[:, None]
    factor = torch.cat((factor.real, factor.imag), dim=2)
    return refine(manifold, factor, position.double(), active, FINAL_STEPS)


def refine(manifold: Manifold, basis: Tensor, position: Tensor, active: Tensor, steps: int) -> Tensor:
    """Levenberg-Marquardt on f from `position` (B, K, 3) for the `active` (B, K) sources, inside the box.

    A step that does not lower f is taken back and damped more; the last one is taken unseen. No step exceeds twice a
    grid cell's trust.
    """
    reach = 2.0 * manifold.trust.to(position)
    total = basis.square().sum((1, 2))
    best, at, damping = position, None, None
    for _ in range(steps):
        tried = equations(manifold, basis, position, active)
        if at is None:
            at, damping = tried, DAMPING * tried.cost / total.clamp_min(1e-30)
        else:
            lower = tried.cost < at.cost
            at = Equations(*(torch.where(_like(lower, new), new, old) for new, old in zip(tried, at)))
            best = torch.where(lower[:, None, None], position, best)
            damping = torch.where(lower, damping * 0.2, damping * 8.0 + 1e-3)
        position = manifold.clamp(best + (_solve(at, damping).clamp(-reach, reach)) / manifold.scale.to(best))
    return position


def equations(manifold: Manifold, basis: Tensor, position: Tensor, active: Tensor) -> Equations:
    """`Equations` at (B, K, 3) positions for a planar basis (B, N, 2Q), in the precision of both."""
    sources = position.shape[1]
    model = manifold.tangents(position)
    there = active.to(position).repeat_interleave(TANGENTS, dim=1)
    own = _adjoint(model, model) * (there[:, :, None] * there[:, None])
    cross = _adjoint(model, basis) * there[:, :, None]
    own = own.unflatten(2, (sources, TANGENTS)).unflatten(1, (sources, TANGENTS))
    cross = cross.unflatten(1, (sources, TANGENTS))
    gram = own[:, :, 0, :, 0] + torch.diag_embed(1.0 - there[:, ::TANGENTS] + 1e-12)
    seen = own[:, :, 0, :, 1:].flatten(2)  # A^H D
    solved = torch.linalg.solve_ex(gram, torch.cat((cross[:, :, 0], seen), dim=2))[0]
    amplitude, lift = solved[..., : basis.shape[2] // 2], solved[..., basis.shape[2] // 2 :]  # A^+ B, A^+ D
    among = own[:, :, 1:, :, 1:].flatten(3).flatten(1, 2) - seen.mH @ lift
    against = cross[:, :, 1:].flatten(1, 2) - seen.mH @ amplitude
    coupling = amplitude.conj() @ amplitude.mT
    curvature = (among.unflatten(2, (sources, 3)).unflatten(1, (sources, 3)) * coupling[:, :, None, :, None]).real
    slope = (against.unflatten(1, (sources, 3)) * amplitude.conj()[:, :, None]).real.sum(-1)
    explained = (cross[:, :, 0].conj() * amplitude).real.sum((1, 2))
    weight = coupling.diagonal(dim1=1, dim2=2).real + (1.0 - there[:, ::TANGENTS])
    cost = (basis.square().sum((1, 2)) - explained).clamp_min(0.0)
    return Equations(cost, slope, curvature.flatten(3).flatten(1, 2), weight)


def _adjoint(left: Tensor, right: Tensor) -> Tensor:
    """left^H right of planar (B, N, 2C) and (B, N, 2D): (B, C, D) complex, by one real product."""
    product = left.mT @ right
    rows, columns = left.shape[2] // 2, right.shape[2] // 2
    (rr, ri), (ir, ii) = ((half[..., :columns], half[..., columns:]) for half in (product[:, :rows], product[:, rows:]))
    return torch.complex(rr + ii, ri - ir)


def _solve(at: Equations, damping: Tensor) -> Tensor:
    """The damped step (B, K, 3); none where the system has no solution."""
    load = (damping[:, None] + SMALLEST_DAMPING) * at.weight
    matrix = at.curvature + torch.diag_embed(load.repeat_interleave(3, dim=1))
    step = torch.linalg.solve_ex(matrix, at.slope.flatten(1))[0]
    return step.nan_to_num(0.0, 0.0, 0.0).view(at.slope.shape)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (value.dim() - 1))


def _orthonormal(steer: Tensor, active: Tensor) -> Tensor:
    """An orthonormal basis of the active columns of a planar (B, N, 2K), zeros beyond; active ones come first."""
    basis = torch.linalg.qr(torch.complex(*steer.chunk(2, dim=2)))[0] * active[:, None]
    return torch.cat((basis.real, basis.imag), dim=2)
