"""What `cov_nmse` refuses beyond shapes: options that are no finite numbers, and targets that are no covariances.

Options are looked at always. Values of tensors are read only where that costs no wait: on a CPU, a few rows of a dense
target, and the results; on another device, and all of a target, where `validate=True` asks for it.
Letters: B batch, N elements; a last axis of 2 is (re, im).
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

ROUNDING = 1e-2  # of a scene's largest entry: what a covariance in bfloat16 may miss its own transpose by, and more
FEW = 8  # scenes whose symmetry is looked at where all would take as long as the loss


def check_numbers(**options: float) -> None:
    """Every option is a finite number of 0 or more. Raises: TypeError, ValueError."""
    for name, value in options.items():
        if not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(
                f"cov_nmse: {name} is a {type(value).__name__}, expected a number. No gradient reaches it: pass"
                f" float({name})."
            )
        if not 0 <= value < math.inf:
            raise ValueError(f"cov_nmse: {name} is {value}, expected a finite number of 0 or more.")


def check_covariance(target_BNN2: Tensor, whole: bool) -> None:
    """A dense target has no negative power on its diagonal and is Hermitian; `whole`: every entry is looked at. Raises:
    ValueError."""
    power_BN = target_BNN2.diagonal(dim1=1, dim2=2)[:, 0]
    negative_B = power_BN.amin(1) < -ROUNDING * power_BN.abs().amax(1)
    if scene := _first(negative_B):
        raise ValueError(
            f"cov_nmse: target_cov has a negative power on the diagonal of scene {scene[0]} (the least is "
            f"{float(power_BN[scene[0]].amin()):.3g}), so it is no covariance. Pass R with real, non-negative R_nn."
        )
    some = target_BNN2 if whole else target_BNN2[:FEW]
    rows, columns = (some, some.transpose(1, 2)) if whole else (some[:, 0], some[:, :, 0])
    gap_B = (rows - torch.stack((columns[..., 0], -columns[..., 1]), -1)).abs().flatten(1).amax(1)
    if scene := _first(gap_B > ROUNDING * rows.abs().flatten(1).amax(1).maximum(columns.abs().flatten(1).amax(1))):
        raise ValueError(
            f"cov_nmse: target_cov of scene {scene[0]} is not Hermitian: it misses its conjugate transpose by up to "
            f"{float(gap_B[scene[0]]):.3g}. Pass R whole (not one triangle) and conjugated on one side, or (R + R^H)/2."
        )


def explain_infinite(loss_B: Tensor, target_factor: Tensor | None, target_cov: Tensor | None) -> None:
    """Names the scene whose target has no power, where the loss is not finite for that reason: NaN in is NaN out.
    Raises: ValueError."""
    if math.isfinite(loss_B.sum().item()):
        return
    for scene in _first(~loss_B.isfinite()):
        trace = target_factor[scene].abs().sum() if target_cov is None else target_cov[scene, ..., 0].diagonal().sum()
        if trace == 0:
            raise ValueError(
                f"cov_nmse: the target of scene {scene} has no power (zeros, or a trace of zero), so there is nothing"
                " to be relative to. Leave such scenes out, or load both sides (loading > 0)."
            )


def _first(bad_B: Tensor) -> list[int]:
    """The number of the first scene that is bad, in a list; an empty list where none is."""
    return bad_B.nonzero()[:1, 0].tolist()
