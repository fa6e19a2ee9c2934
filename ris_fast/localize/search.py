"""Source positions from a signal basis: one null of the spectrum after the other, then all positions jointly.

Model: n(a) = 1 - |B^H a|^2 vanishes at the sources. Next to one that is found it is small too, so each further one is
where n(a) / |P a|^2 is least on the grid, with P the projection off the steering vectors found so far: a lobe gives
one source. After each, all positions move by Levenberg-Marquardt steps on
    f = |B - A A^+ B|^2,   A = [a_1 ... a_k],
whose Gauss-Newton form with the amplitudes eliminated needs only products of A, its tangents and B.
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

STAGE_STEPS, FINAL_STEPS = 3, 6
OCCUPIED = 1e-3  # |P a|^2 of a grid point that is as good as found
DAMPING = 0.05  # first, times the share of B that is not yet explained
SMALLEST_DAMPING = 1e-9


class Equations(NamedTuple):
    """Gauss-Newton equations of one set of positions, in units of phase spread (`Manifold.scale`)."""

    cost: Tensor  # (B,)          f
    slope: Tensor  # (B, K, 3)     minus the gradient, halved
    curvature: Tensor  # (B, 3K, 3K)
    weight: Tensor  # (B, K)        |row k of A^+ B|^2, which a source's damping is measured in; 1 where it is not there


def find_positions(manifold: Manifold, basis: Tensor, count: Tensor, most: int) -> Tensor:
    """Positions (u, v, w) of `count` (B,) sources, at most `most`, in the order they were found: (B, most, 3) float64.

    Rows beyond the count are positions of the grid that mean nothing.
    """
    coarse = basis.to(torch.complex64)
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
    return refine(manifold, basis, position.double(), active, FINAL_STEPS)


def refine(manifold: Manifold, basis: Tensor, position: Tensor, active: Tensor, steps: int) -> Tensor:
    """Levenberg-Marquardt on f from `position` (B, K, 3) for the `active` (B, K) sources, inside the box.

    A step that does not lower f is taken back and damped more. No step exceeds twice a grid cell's trust.
    """
    reach = 2.0 * manifold.trust.to(position)
    total = basis.real.square().sum((1, 2)) + basis.imag.square().sum((1, 2))
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
    last = equations(manifold, basis, position, active).cost < at.cost
    return torch.where(last[:, None, None], position, best)


def equations(manifold: Manifold, basis: Tensor, position: Tensor, active: Tensor) -> Equations:
    """`Equations` at (B, K, 3) positions, in the precision of `position`."""
    batch, sources, _ = position.shape
    steer, slopes = manifold.tangents(position)
    there = active[:, None]
    model = torch.cat((steer * there, (slopes * there[..., None]).flatten(2)), dim=2)
    products = model.mH @ torch.cat((model, basis), dim=2)
    eye = torch.eye(sources, dtype=position.dtype, device=position.device)
    gram = products[:, :sources, :sources] + torch.diag_embed((~active).to(position)) + 1e-12 * eye
    solved = torch.linalg.solve_ex(gram, products[:, :sources, sources:])[0]
    amplitude = solved[..., 3 * sources :]  # A^+ B
    projected = products[:, sources:, sources:] - products[:, sources:, :sources] @ solved
    among, against = projected[..., : 3 * sources], projected[..., 3 * sources :]
    coupling = amplitude.conj() @ amplitude.transpose(1, 2)
    curvature = (among.view(batch, sources, 3, sources, 3) * coupling[:, :, None, :, None]).real
    slope = (against.view(batch, sources, 3, -1) * amplitude.conj()[:, :, None]).real.sum(-1)
    explained = (products[:, :sources, 4 * sources :].conj() * amplitude).real.sum((1, 2))
    size = basis.real.square().sum((1, 2)) + basis.imag.square().sum((1, 2))
    weight = coupling.diagonal(dim1=1, dim2=2).real + (~active).to(position)
    return Equations((size - explained).clamp_min(0.0), slope, curvature.reshape(batch, 3 * sources, -1), weight)


def _solve(at: Equations, damping: Tensor) -> Tensor:
    """The damped step (B, K, 3); none where the system has no solution."""
    load = (damping[:, None] + SMALLEST_DAMPING) * at.weight
    matrix = at.curvature + torch.diag_embed(load.repeat_interleave(3, dim=1))
    step = torch.linalg.solve_ex(matrix, at.slope.flatten(1))[0]
    return step.nan_to_num(0.0, 0.0, 0.0).view(at.slope.shape)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (value.dim() - 1))


def _orthonormal(steer: Tensor, active: Tensor) -> Tensor:
    """An orthonormal basis of the active columns of (B, N, K), zeros beyond; active ones come first."""
    return torch.linalg.qr(steer)[0] * active[:, None]
