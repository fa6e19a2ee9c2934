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

    No more are looked for than the array has elements. Rows beyond the count mean nothing.
    """
    rows, most = most, min(most, manifold.elements)
    coarse = basis.mT.to(torch.complex64)
    null = 1.0 - manifold.grid_power(coarse)
    coarse = rows_of(coarse)
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
    position = refine(manifold, rows_of(factor.mT), position.double(), active, FINAL_STEPS)
    return torch.nn.functional.pad(position, (0, 0, 0, rows - most), value=1.0)


def refine(manifold: Manifold, basis: Tensor, position: Tensor, active: Tensor, steps: int) -> Tensor:
    """Levenberg-Marquardt on f from `position` (B, K, 3) for the `active` (B, K) sources, inside the box.

    A step that does not lower f is taken back and damped more; the last one is taken unseen. No step exceeds twice a
    grid cell's trust.
    """
    reach = 2.0 * manifold.trust.to(position)
    total = basis.square().sum((1, 2, 3))
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
    """`Equations` at (B, K, 3) positions for the rows of a basis (B, 2, Q, N), in the precision of both."""
    sources, there = position.shape[1], active.to(position)
    model = manifold.tangents(position)
    own, cross = _products(model, model, there), _products(model, basis[:, None], there)
    own, cross = own * there[:, None, None, :, None], cross[:, :, :, 0]
    gram = own[:, :, 0, :, 0] + torch.diag_embed(1.0 - there + 1e-12)
    seen = own[:, :, 0, :, 1:].flatten(2)  # A^H D
    solved = torch.linalg.solve_ex(gram, torch.cat((seen, cross[:, :, 0]), dim=2))[0]
    lift, amplitude = solved[..., : 3 * sources], solved[..., 3 * sources :]  # A^+ D, A^+ B
    among = own[:, :, 1:, :, 1:].flatten(3).flatten(1, 2) - seen.mH @ lift
    against = cross[:, :, 1:].flatten(1, 2) - seen.mH @ amplitude
    coupling = amplitude.conj() @ amplitude.mT
    curvature = among.unflatten(2, (sources, 3)).unflatten(1, (sources, 3)) * coupling[:, :, None, :, None]
    slope = against.unflatten(1, (sources, 3)) * amplitude.conj()[:, :, None]
    explained = (cross[:, :, 0].conj() * amplitude).real.sum((1, 2))
    cost = (basis.square().sum((1, 2, 3)) - explained).clamp_min(0.0)
    weight = coupling.diagonal(dim1=1, dim2=2).real + 1.0 - there
    return Equations(cost, slope.real.sum(-1), curvature.real.flatten(3).flatten(1, 2), weight)


def rows_of(columns: Tensor) -> Tensor:
    """Real and imaginary parts of complex rows: (B, Q, N) -> (B, 2, Q, N)."""
    return torch.stack((columns.real, columns.imag), dim=1)


def _products(left: Tensor, right: Tensor, there: Tensor) -> Tensor:
    """left^H right of rows (B, K, 2, T, N) and (B, J, 2, R, N), by one real product: (B, K, T, J, R) complex, zero for
    sources that are not `there` (B, K)."""
    both = left.flatten(1, 3) @ right.flatten(1, 3).mT
    both = both.unflatten(2, right.shape[1:4]).unflatten(1, left.shape[1:4])
    both = both * there[:, :, None, None, None, None, None]
    real = both[:, :, 0, :, :, 0] + both[:, :, 1, :, :, 1]
    return torch.complex(real, both[:, :, 0, :, :, 1] - both[:, :, 1, :, :, 0])


def _solve(at: Equations, damping: Tensor) -> Tensor:
    """The damped step (B, K, 3); none where the system has no solution."""
    load = (damping[:, None] + SMALLEST_DAMPING) * at.weight
    matrix = at.curvature + torch.diag_embed(load.repeat_interleave(3, dim=1))
    step = torch.linalg.solve_ex(matrix, at.slope.flatten(1))[0]
    return step.nan_to_num(0.0, 0.0, 0.0).view(at.slope.shape)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (value.dim() - 1))


def _orthonormal(steer: Tensor, active: Tensor) -> Tensor:
    """An orthonormal basis of the active rows of (B, K, N), zeros beyond; active ones come first."""
    return torch.linalg.qr(steer.mT)[0].mT * active[..., None]
