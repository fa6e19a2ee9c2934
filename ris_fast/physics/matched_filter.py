"""The matched filter, and what an estimate of the field is worth once it is shrunk towards a constant answer.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K columns of an estimate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.physics.baselines import constant_nmse, target_energy
from ris_fast.physics.channel import backproject
from ris_fast.physics.real_complex import adjoint_matmul, matmul, power, to_complex, to_pairs
from ris_fast.physics.scenes import Scenes


def matched_filter(pattern_BLN: Tensor, static: bool) -> Tensor:
    """Back-projections as a factor (B, N, K, 2): their sum where the symbols are static, else a column for each
    snapshot."""
    return (pattern_BLN.sum(1)[:, :, None] if static else pattern_BLN.transpose(1, 2)).float()


def matched_filter_of_products(products_BLM: Tensor, codes: Tensor, snapshots: Tensor, static: bool) -> Tensor:
    """The same where of the channel only H c_l is known: with the smallest channel that explains them."""
    return matched_filter(backproject(least_squares_channel(products_BLM, codes), codes, snapshots), static)


def least_squares_channel(products_BLM: Tensor, codes: Tensor) -> Tensor:
    """The smallest channel with these H c_l, codes ([B,] L, N, 2): (B, M, N, 2)."""
    inverse = torch.linalg.pinv(to_complex(codes.double()))
    return to_pairs((inverse @ to_complex(products_BLM.double())).transpose(1, 2).to(torch.complex64)).contiguous()


def shrunk_nmse(factor: Tensor, scenes: Scenes, constant: Tensor) -> tuple[Tensor, Tensor]:
    """NMSE of each scene's estimate, as far from the constant answer as serves all scenes best, and that of the
    constant: (B,) float64.

    Model: R = C + a (F F^H - C), both of trace N, one a for all scenes; a = 0 is the constant answer.
    Args: factor: F, (B, N, K, 2); constant: C, (N, N, 2).
    """
    parts = shrinkage(factor, scenes, constant)
    return shrunk(parts), parts[:, 0]


def shrinkage(factor: Tensor, scenes: Scenes, constant: Tensor) -> Tensor:
    """What `shrunk` needs of each scene: NMSE of the constant answer and, over the target's energy, the product of
    F F^H - C with what the constant is wrong by, and its square: (B, 3) float64."""
    estimate, size = factor.double(), factor.shape[1]
    own, energy, length = power(estimate).sum((1, 2)), target_energy(scenes), power(constant).sum()
    alone = constant_nmse(constant, scenes)
    estimate_constant = (
        size * (matmul(constant[None].expand(len(estimate), -1, -1, -1), estimate) * estimate).sum((1, 2, 3)) / own
    )
    target_constant = 0.5 * (energy * (1.0 - alone) + length)
    both = size**2 * _overlap(estimate, scenes) / own
    square = size**2 * power(adjoint_matmul(estimate, estimate)).sum((1, 2)) / own.square()
    across = (both - estimate_constant - target_constant + length) / energy
    away = (square - 2 * estimate_constant + length) / energy
    return torch.stack((alone, across, away), 1)


def shrunk(parts: Tensor) -> Tensor:
    """NMSE of each scene with the one share that serves all of `parts`, (B, 3) of `shrinkage`, best: (B,) float64."""
    alone, across, away = parts.unbind(1)
    known = across.isfinite() & away.isfinite()  # an estimator may find nothing in a scene
    share = across[known].sum() / away[known].sum().clamp_min(1e-30)
    return torch.where(known, alone - 2 * share * across + share.square() * away, alone)


def _overlap(estimate: Tensor, scenes: Scenes) -> Tensor:
    """tr(F^H T F) with a target of trace one: (B,)."""
    if scenes.factor is not None:
        target = scenes.factor.double()
        return power(adjoint_matmul(estimate, target)).sum((1, 2)) / power(target).sum((1, 2))
    dense = scenes.covariance.double()
    return (matmul(dense, estimate) * estimate).sum((1, 2, 3)) / dense.diagonal(dim1=1, dim2=2)[:, 0].sum(-1)
