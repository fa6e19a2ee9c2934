"""The operator `ris_fast::cov_nmse` and the function `cov_nmse` that users call.

Letters: B batch, N RIS elements, Q factor columns, K target columns, X sample columns; a last axis of 2 is (re, im).
The operator returns value and unit gradient from one pass, so that backward is one multiplication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import loader
from ..registry import AotCase, Family, Operator
from ..values import readable
from . import native, plain, reference
from .checks import check_covariance, check_numbers, explain_infinite
from .samples import SAMPLES, cost
from .transforms import ONCE, Transformable, fold, scaled_units, transformed, unfold

SCHEMA = (
    "cov_nmse(Tensor factor, Tensor? target_factor, Tensor? target_cov, Tensor? sample_factor, Tensor? snr_db, "
    "float blend, float loading, float target_loading, float shrink, float diag_weight, float offdiag_weight, "
    "int gradients) -> (Tensor, Tensor, Tensor)"
)
LIBRARY = torch.library.Library("ris_fast", "FRAGMENT")
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 computes in float64; float32, bfloat16 and float16 in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return native.cov_nmse(*args) if loader.available() else plain.cov_nmse(*args)


def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels  # here, because a CPU user need not pay for triton's import

    return triton_kernels.cov_nmse(*args)


def _fake(factor: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    sample_factor, gradients = args[2], args[-1]
    new = lambda shape: factor.new_empty(shape, dtype=compute_dtype(factor.dtype))  # noqa: E731
    return (
        new(factor.shape[:1]),
        new(factor.shape if gradients >= 1 else (0,)),
        new(sample_factor.shape if gradients >= 2 else (0,)),
    )


class _CovNMSE(torch.autograd.Function):
    """Backward multiplies the unit gradients by the incoming one; neither target nor factors are read again.

    The unit gradients are constants to autograd, so a second derivative would silently miss their share: it is refused.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss_B, unit_factor, unit_sample = torch.ops.ris_fast.cov_nmse.default(factor, *args)
        ctx.save_for_backward(unit_factor, unit_sample)
        ctx.mark_non_differentiable(unit_factor, unit_sample)
        ctx.dtypes = factor.dtype, None if args[2] is None else args[2].dtype
        return loss_B, unit_factor, unit_sample

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE.format("create_graph=True"))
        scaled = scaled_units(ctx, grad_B)
        return scaled[0], None, None, scaled[1], *(None,) * 8


def _autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "ris_fast::cov_nmse: the bare operator is called under torch.func, which torch does not support for custom "
            "operators with a gradient of their own. Call ris_fast.cov_nmse, which is made for it."
        )
    return _CovNMSE.apply(*args)


LIBRARY.impl("cov_nmse", plain.cov_nmse, "CompositeExplicitAutograd")
LIBRARY.impl("cov_nmse", _cpu, "CPU")
LIBRARY.impl("cov_nmse", _cuda, "CUDA")
LIBRARY.impl("cov_nmse", _autograd, "Autograd")
torch.library.register_fake("ris_fast::cov_nmse", _fake, lib=LIBRARY)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    folded, size = fold(info, in_dims, *args)
    return unfold(torch.ops.ris_fast.cov_nmse.default(*folded), size)


torch.library.register_vmap("ris_fast::cov_nmse", _vmap, lib=LIBRARY)


def _pair(name: str, x: Tensor, complex_dims: int, layout: str) -> Tensor:
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


def _target(
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
        pair = _like_factor("target_factor", _pair("target_factor", target_factor, 3, "(B, N, K)"), factor)
        _no_gradient("target_factor", pair)
        return pair, None
    pair = _like_factor("target_cov", _pair("target_cov", target_cov, 3, "(B, N, N)"), factor)
    if pair.shape[2] != factor.shape[1]:
        raise ValueError(
            f"cov_nmse: target_cov is {tuple(pair.shape)} but factor has N = {factor.shape[1]}. Pass the target of the"
            " same array, (B, N, N)."
        )
    _no_gradient("target_cov", pair)
    return None, pair


def _sample(sample_factor: Tensor | None, blend: float, factor: Tensor) -> Tensor | None:
    if not 0 <= blend <= 1:
        raise ValueError(f"cov_nmse: blend is {blend}, expected a weight in [0, 1] for the sample covariance.")
    if sample_factor is None:
        if blend != 0:
            raise ValueError(
                f"cov_nmse: blend is {blend} but there is no sample_factor. Pass sample_factor (B, N, X), or blend=0."
            )
        return None
    return _like_factor("sample_factor", _pair("sample_factor", sample_factor, 3, "(B, N, X)"), factor)


def _snr(snr_db: Tensor | float | None, shrink: float, factor: Tensor) -> Tensor | None:
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


def _check_finite(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not bool(torch.isfinite(x).all()):
            scene = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"cov_nmse: {name} has a non-finite value, the first in scene {scene} of the batch. Look at what made"
                " it; check_finite=False skips this test."
            )


def cov_nmse(
    factor: Tensor, *unnamed: Any, target_factor: Tensor | None = None, target_cov: Tensor | None = None, sample_factor: Tensor | None = None,
    blend: float = 0.0, loading: float = 0.0, shrink: float = 0.0, snr_db: Tensor | float | None = None, reduction: str = "mean",
    loading_side: str = "both", diag_weight: float = 1.0, offdiag_weight: float = 1.0, check_finite: bool = False, validate: bool | None = None,
) -> Tensor:  # fmt: skip
    """Covariance NMSE |R_eff - T_eff|^2 / |T_eff|^2 of R = F F^H against a target, differentiable in F, once.

    Model: R and T are normalised to trace N; R is blended with X X^H: (1 - blend) R + blend X X^H; then loaded,
    (R + loading I)/(1 + loading), and shrunk, (1 - alpha) R + alpha I, alpha = clamp(shrink 10^(-snr_db/20), 1e-4,
    5e-2). A zero factor stays zero and scores 1 (without loading); a zero target without loading is refused, or
    scores NaN or infinity where no value is looked at (validate).
    Args:
        factor: (B, N, Q) complex or (B, N, Q, 2) real pair; the one argument without a name; float32, float64, or
            bfloat16/float16 (float32 arithmetic).
        target_factor: (B, N, K), T = S S^H; columns of zeros are allowed.  Either this or target_cov.
        target_cov: (B, N, N) Hermitian, no R_nn below zero, any trace above zero.
        sample_factor: (B, N, X), differentiable where it requires grad.
        snr_db: (B,) or a number, dB; needed where shrink is not 0.
        reduction: "mean" or "sum" over scenes, or "none" for (B,). The mean of an empty batch is NaN, as in torch.
        loading_side: "both", or "prediction" to load R alone, which cannot reach 0 (for comparison with old results).
        diag_weight, offdiag_weight: weights of |D_nn|^2 and of the rest, in numerator and denominator alike.
        check_finite: raise on a NaN or infinity in any input (reads the device from the host; not under torch.compile).
        validate: whether to look at the target's values. None: on a CPU only, for negative power in every scene and at
            one row of few scenes for symmetry; True: at all of it, on any device (waits for it); False: never. Never
            under torch.compile and torch.func: there a target that is no covariance is not noticed, and one of zeros
            gives infinity.
    Returns: 0-d tensor, or (B,) with reduction="none".
    Raises: ValueError or TypeError, naming the argument, what it was and what is expected; RuntimeError for a second
        derivative and for forward mode (torch.func.jvp, jacfwd, hessian). torch.vmap, which folds its axis into B,
        torch.func.grad, vjp and jacrev work, one inside the other too.
    Numerics: low-rank target in float64 Gram form, dense target in the direct form, float32 (float64 for float64).
    Cost: `ris_fast.kernels.cov_nmse.samples.cost`; memory O(N Q) per scene beside the target.
    """
    if unnamed:
        raise TypeError(
            f"cov_nmse: {1 + len(unnamed)} arguments without a name, expected factor alone. Pass the target as"
            " target_factor=T where it is S of R = S S^H, (B, N, K), or as target_cov=T where it is R itself, (B,"
            " N, N)."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cov_nmse: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    if loading_side not in ("both", "prediction"):
        raise ValueError(f"cov_nmse: loading_side is {loading_side!r}, expected 'both' or 'prediction'.")
    check_numbers(blend=blend, loading=loading, shrink=shrink, diag_weight=diag_weight, offdiag_weight=offdiag_weight)
    if diag_weight == offdiag_weight == 0:
        raise ValueError(
            "cov_nmse: diag_weight and offdiag_weight are both 0, so that nothing is compared. Pass one above 0."
        )
    factor = _pair("factor", factor, 3, "(B, N, Q)")
    if not factor.shape[1]:
        raise ValueError(
            f"cov_nmse: factor is {tuple(factor.shape)}, an array of N = 0 elements. Pass (B, N, Q) with N of 1 or"
            " more."
        )
    target_factor, target_cov = _target(target_factor, target_cov, factor)
    sample_factor = _sample(sample_factor, blend, factor)
    snr_B = _snr(snr_db, shrink, factor)
    if check_finite:
        _check_finite(
            factor=factor, target_factor=target_factor, target_cov=target_cov, sample_factor=sample_factor, snr_db=snr_B
        )
    looked = validate is not False
    if target_cov is not None and looked and readable(target_cov, wait=bool(validate)):
        check_covariance(target_cov, whole=bool(validate))
    inside = transformed()  # of torch.func, where requires_grad does not say what will be differentiated
    with_sample = sample_factor is not None and (inside or sample_factor.requires_grad)
    gradients = (2 if with_sample else int(inside or factor.requires_grad)) if torch.is_grad_enabled() else 0
    run = Transformable.apply if inside else torch.ops.ris_fast.cov_nmse.default
    loss_B = run(
        factor, target_factor, target_cov, sample_factor, snr_B, float(blend), float(loading),
        float(loading) if loading_side == "both" else 0.0, float(shrink), float(diag_weight), float(offdiag_weight), gradients,
    )[0]  # fmt: skip
    if looked and readable(loss_B, wait=bool(validate)):
        explain_infinite(loss_B.detach(), target_factor, target_cov)
    return loss_B if reduction == "none" else loss_B.mean() if reduction == "mean" else loss_B.sum()


def _backends() -> dict[str, Any]:
    return {"plain": plain.cov_nmse, "cpp": native.cov_nmse, "triton": _cuda}


def _aot() -> list[AotCase]:
    from . import triton_kernels

    return triton_kernels.aot()


FAMILY = Family(
    "cov_nmse",
    (
        Operator(
            "cov_nmse",
            call=torch.ops.ris_fast.cov_nmse,
            reference=reference.cov_nmse,
            samples=SAMPLES,
            cost=cost,
            backends=_backends(),
        ),
    ),
    _aot,
)
