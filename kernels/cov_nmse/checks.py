"""What `cov_nmse` refuses: wrong arguments, options that are not finite numbers, targets that are no covariances.

Arguments and options are always checked. Values of tensors are read only where that costs no wait: on a CPU, a few
rows of a dense target, and the results; on another device, and all of a target, where `validate=True` asks for it.
Letters: B batch, N elements; a last axis of 2 is (re, im).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .reference import compute_dtype

ROUNDING = 1e-2  # of a scene's largest entry: what a covariance in bfloat16 may miss its own transpose by, and more
FEW = 8  # scenes whose symmetry is looked at where all would take as long as the loss


def refuse_arguments(unnamed: tuple[Any, ...], unknown: dict[str, Any]) -> NoReturn:
    """Names the arguments that `cov_nmse` does not take. Raises: TypeError."""
    if unnamed:
        raise TypeError(
            f"cov_nmse: {1 + len(unnamed)} arguments without a name, expected factor alone. Pass the target as"
            " target_factor=T where it is S of R = S S^H, (B, N, K), or as target_cov=T where it is R itself, (B,"
            " N, N)."
        )
    name = next(iter(unknown))
    if name in ("diag_weight", "offdiag_weight"):
        raise TypeError(
            f"cov_nmse: {name} was removed: every entry of the covariance weighs the same. Leave it out, which is what"
            " the old default of 1 did; for other weights write the NMSE of the dense covariances in torch."
        )
    raise TypeError(f"cov_nmse: unexpected keyword argument {name!r}. See help(ris_fast.cov_nmse) for its options.")


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


def real_complex(name: str, x: Tensor, complex_dims: int, layout: str) -> Tensor:
    """The real (..., 2) view of a complex or real-pair tensor of a given rank."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"cov_nmse: {name} is a {type(x).__name__}, expected a tensor {layout}. Pass torch.as_tensor({name})."
        )
    if x.is_complex() and x.dim() == complex_dims:
        return torch.view_as_real(x.resolve_conj())
    if x.is_floating_point() and x.dim() == complex_dims + 1 and x.shape[-1] == 2:
        return x
    raise ValueError(
        f"cov_nmse: {name} is {tuple(x.shape)} {x.dtype}, expected complex {layout}, or floating point with a last axis"
        " of 2 (re, im). Use torch.view_as_real or torch.view_as_complex."
    )


def _like_factor(name: str, x: Tensor, factor: Tensor) -> Tensor:
    """Checks what every second input must share with the factor: device, precision, B and N."""
    if x.device != factor.device:
        raise ValueError(
            f"cov_nmse: {name} is on {x.device} but factor is on {factor.device}. Move one with .to(device)."
        )
    if compute_dtype(x.dtype) != compute_dtype(factor.dtype):
        raise ValueError(
            f"cov_nmse: {name} is {x.dtype} but factor is {factor.dtype}. Convert one with .to(dtype): float64 goes"
            " with float64 only."
        )
    if x.shape[:2] != factor.shape[:2]:
        raise ValueError(
            f"cov_nmse: {name} is {tuple(x.shape)} but factor {tuple(factor.shape)} has B = {factor.shape[0]}, N ="
            f" {factor.shape[1]}. Pass the {name} of the same scenes and array."
        )
    return x


def _no_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"cov_nmse: {name} requires a gradient, which is defined for factor and sample_factor only. Pass"
            f" {name}.detach()."
        )


def check_target(
    target_factor: Tensor | None, target_cov: Tensor | None, factor: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Exactly one target, checked, as a real pair."""
    if (target_factor is None) == (target_cov is None):
        given = "neither target_factor nor target_cov" if target_cov is None else "both target_factor and target_cov"
        raise ValueError(
            f"cov_nmse: {given} given, expected exactly one. Pass target_factor (B, N, K) for R = S S^H, or target_cov"
            " (B, N, N)."
        )
    if target_cov is None:
        pair = _like_factor("target_factor", real_complex("target_factor", target_factor, 3, "(B, N, K)"), factor)
        _no_gradient("target_factor", pair)
        return pair, None
    pair = _like_factor("target_cov", real_complex("target_cov", target_cov, 3, "(B, N, N)"), factor)
    if pair.shape[2] != factor.shape[1]:
        raise ValueError(
            f"cov_nmse: target_cov is {tuple(pair.shape)} but factor has N = {factor.shape[1]}. Pass the target of the"
            " same array, (B, N, N)."
        )
    _no_gradient("target_cov", pair)
    return None, pair


def check_sample(sample_factor: Tensor | None, blend: float, factor: Tensor) -> Tensor | None:
    if not 0 <= blend <= 1:
        raise ValueError(f"cov_nmse: blend is {blend}, expected a weight in [0, 1] for the sample covariance.")
    if sample_factor is None:
        if blend != 0:
            raise ValueError(
                f"cov_nmse: blend is {blend} but there is no sample_factor. Pass sample_factor (B, N, X), or blend=0."
            )
        return None
    return _like_factor("sample_factor", real_complex("sample_factor", sample_factor, 3, "(B, N, X)"), factor)


def check_snr(snr_db: Tensor | float | None, shrink: float, factor: Tensor) -> Tensor | None:
    """SNR per scene in the compute dtype, or None where shrinkage is off."""
    if shrink == 0:
        return None
    if snr_db is None:
        raise ValueError(
            f"cov_nmse: shrink is {shrink} but snr_db is missing; alpha = clamp(shrink * 10^(-snr_db/20), 1e-4, 5e-2)."
            " Pass snr_db (B,), in dB."
        )
    try:
        snr_B = torch.as_tensor(snr_db, dtype=compute_dtype(factor.dtype), device=factor.device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"cov_nmse: snr_db is {snr_db!r}, expected a number of dB or a tensor (B,).") from error
    if snr_B.dim() == 0:
        snr_B = snr_B.expand(len(factor))
    if snr_B.shape != factor.shape[:1]:
        raise ValueError(
            f"cov_nmse: snr_db is {tuple(snr_B.shape)}, expected ({len(factor)},), one value in dB per scene."
        )
    return snr_B


def check_finite_values(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not bool(torch.isfinite(x).all()):
            scene = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"cov_nmse: {name} has a non-finite value, the first in scene {scene} of the batch. Look at what made"
                " it; check_finite=False skips this test."
            )


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
