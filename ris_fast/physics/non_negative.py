"""Non-negative least squares of source powers, for a batch of small systems.

Legend: B batch, K sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.kernels.values import readable

SWEEPS = 200


def non_negative_least_squares(gram_BKK: Tensor, right_BK: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """min_p p^T G p / 2 - p^T r with p >= 0, for symmetric positive semidefinite G: (B, K, K), (B, K) -> (B, K).

    The plain solution where it is non-negative; elsewhere sweeps over the coordinates, each clamped at zero. A source
    whose row of G is zero gets power zero.
    Numerics: on a CPU the sweeps end once they change nothing; elsewhere all of them run, without a look at values.
    Source: Franc, Hlavac and Navara, "Sequential coordinate-wise algorithm for the non-negative least squares problem"
        (CAIP 2005).
    """
    diagonal = gram_BKK.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(torch.where(diagonal > 0, 1e-13, 1.0).to(gram_BKK))
    power = torch.linalg.solve_ex(gram_BKK + ridge, right_BK)[0]
    bad = ~(power >= 0).all(1)
    power = power.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
    may_stop = readable(power)
    for _ in range(0 if may_stop and not bool(bad.any()) else sweeps):
        before = power.clone()
        for k in range(power.shape[1]):
            slope = right_BK[:, k] - (gram_BKK[:, k] * power).sum(1)
            better = (power[:, k] + slope / diagonal[:, k].clamp_min(1e-30)).clamp_min(0.0)
            power[:, k] = torch.where(bad & (diagonal[:, k] > 0), better, power[:, k])
        if may_stop and bool(((power - before).abs().amax(1) <= 1e-9 * power.amax(1)).all()):
            break
    return power
