"""The matched filter as a baseline: what the back-projections alone say of a scene, shrunk towards a constant answer.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K columns of an estimate.
"""

from __future__ import annotations

from typing import Any

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


def shown_matched_filter(shown: Any, codes: Tensor, static: bool) -> Tensor | None:
    """The same from what a network is shown: snapshots (B, L, M, 2), H c_l (B, L, M, 2) and back-projections or codes
    (B or 1, L, N, 2).

    Where only H c_l and the codes are shown, the channel is the smallest that explains them. None for inputs of another
    kind.
    """
    if not isinstance(shown, tuple) or len(shown) != 3 or shown[2].dim() != 4:
        return None
    snapshots, products, pattern = shown
    if (
        pattern.shape[0] == 1 < snapshots.shape[0] or codes.dim() == 4 and torch.equal(pattern, codes)
    ):  # of the channel only H c_l
        pattern = backproject(least_squares_channel(products, codes), codes, snapshots)
    return matched_filter(pattern, static)


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
    known = across.isfinite() & away.isfinite()  # an estimator may find nothing in a scene
    share = across[known].sum() / away[known].sum().clamp_min(1e-30)
    return torch.where(known, alone - 2 * share * across + share.square() * away, alone), alone


def _overlap(estimate: Tensor, scenes: Scenes) -> Tensor:
    """tr(F^H T F) with a target of trace one: (B,)."""
    if scenes.factor is not None:
        target = scenes.factor.double()
        return power(adjoint_matmul(estimate, target)).sum((1, 2)) / power(target).sum((1, 2))
    dense = scenes.covariance.double()
    return (matmul(dense, estimate) * estimate).sum((1, 2, 3)) / dense.diagonal(dim1=1, dim2=2)[:, 0].sum(-1)
