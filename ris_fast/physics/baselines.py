"""What predictors that learn nothing score: the lines that every validation figure is shown beside.

Legend: B batch, N elements, K sources. All covariances are normalised to trace N.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ris_fast.physics.real_complex import adjoint_matmul, matmul, power
from ris_fast.physics.scenes import Scenes


def target_energy(scenes: Scenes) -> Tensor:
    """|T|_F^2 of each trace-N target: (B,), float64."""
    elements = scenes.codes.shape[-2]
    if scenes.factor is None:
        dense = scenes.covariance.double()
        return power(dense).sum((1, 2)) * (elements / dense.diagonal(dim1=1, dim2=2)[:, 0].sum(-1)).square()
    factor = scenes.factor.double()
    return elements**2 * power(adjoint_matmul(factor, factor)).sum((1, 2)) / power(factor).sum((1, 2)).square()


def mean_covariance(batches: Iterable[Scenes]) -> Tensor:
    """The mean trace-N target: (N, N, 2) float64. The one place that forms an N x N array, once a run."""
    total, count = None, 0
    for scenes in batches:
        part = _covariance_sum(scenes)
        total = part if total is None else total + part
        count += scenes.batch
    if total is None:
        raise ValueError("mean_covariance: no scenes were given. Pass at least one batch.")
    return total / count


def _covariance_sum(scenes: Scenes) -> Tensor:
    elements = scenes.codes.shape[-2]
    if scenes.factor is None:
        dense = scenes.covariance.double()
        scale = elements / dense.diagonal(dim1=1, dim2=2)[:, 0].sum(-1)
        return (dense * scale[:, None, None, None]).sum(0)
    factor = scenes.factor.double()
    scaled = factor * (elements / power(factor).sum((1, 2))).sqrt()[:, None, None, None]
    wide = scaled.transpose(0, 1).reshape(1, elements, -1, 2)
    turned = torch.stack((wide[..., 0], -wide[..., 1]), dim=-1).transpose(1, 2)
    return matmul(wide, turned)[0]


def constant_nmse(constant: Tensor, scenes: Scenes) -> Tensor:
    """NMSE of one constant (N, N, 2) prediction on each scene: (B,) float64."""
    elements = scenes.codes.shape[-2]
    energy = target_energy(scenes)
    if scenes.factor is None:
        dense = scenes.covariance.double()
        dense = dense * (elements / dense.diagonal(dim1=1, dim2=2)[:, 0].sum(-1))[:, None, None, None]
        cross = (dense * constant).sum((1, 2, 3))
    else:
        factor = scenes.factor.double()
        image = matmul(constant[None], factor.transpose(0, 1).reshape(1, elements, -1, 2))
        image = image.view(elements, scenes.batch, -1, 2).transpose(0, 1)
        cross = elements * (image * factor).sum((1, 2, 3)) / power(factor).sum((1, 2))
    return (energy - 2.0 * cross + power(constant).sum()) / energy


def baselines(constant: Tensor, validation: Iterable[Scenes]) -> dict[str, float]:
    """Mean NMSE on the validation scenes of three predictors that ignore their input.

    `zero`: exactly 1. `identity`: 1 - N/|T|^2. `mean`: `constant`, the mean covariance of the training scenes, (N, N,
        2).
    """
    elements = constant.shape[0]
    identity, mean = [], []
    for scenes in validation:
        identity.append(1.0 - elements / target_energy(scenes))
        mean.append(constant_nmse(constant, scenes))
    return {"zero": 1.0, "identity": torch.cat(identity).mean().item(), "mean": torch.cat(mean).mean().item()}
