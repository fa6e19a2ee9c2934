"""The operator `ris_fast::cov_nmse` and the function `cov_nmse` that users call.

Letters: B batch, N RIS elements, Q factor columns, K target columns, X sample columns; a last axis of 2 is (re, im).
The operator returns value and unit gradient from one pass, so that backward is one multiplication.
"""

from __future__ import annotations

from typing import Any, Never

import torch
from torch import Tensor

from ..registration import cpp_or, register, triton_function
from ..registry import Family
from ..values import readable
from . import native, plain, reference
from .checks import (
    check_covariance,
    check_finite_values,
    check_numbers,
    check_sample,
    check_snr,
    check_target,
    explain_infinite,
    real_complex,
    refuse_arguments,
)
from .reference import compute_dtype
from .samples import SAMPLES, cost
from .transforms import ONCE, Transformable, fold, scaled_units, transformed, unfold

SCHEMA = (
    "cov_nmse(Tensor factor, Tensor? target_factor, Tensor? target_cov, Tensor? sample_factor, Tensor? snr_db, "
    "float blend, float loading, float target_loading, float shrink, int gradients) -> (Tensor, Tensor, Tensor)"
)


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
        return scaled[0], None, None, scaled[1], *(None,) * 6


def _autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "ris_fast::cov_nmse: the bare operator is called under torch.func, which torch does not support for custom "
            "operators with a gradient of their own. Call ris_fast.cov_nmse, which is made for it."
        )
    return _CovNMSE.apply(*args)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    folded, size = fold(info, in_dims, *args)
    return unfold(torch.ops.ris_fast.cov_nmse.default(*folded), size)


_triton = triton_function(__package__, "cov_nmse")
OPERATOR = register(
    SCHEMA,
    cpu=cpp_or(plain.cov_nmse, native.cov_nmse),
    cuda=_triton,
    elsewhere=plain.cov_nmse,
    fake=_fake,
    autograd=_autograd,
    vmap=_vmap,
    reference=reference.cov_nmse,
    samples=SAMPLES,
    cost=cost,
    backends={"plain": plain.cov_nmse, "cpp": native.cov_nmse, "triton": _triton},
)
FAMILY = Family("cov_nmse", (OPERATOR,))


def cov_nmse(
    factor: Tensor,
    *unnamed: Never,
    target_factor: Tensor | None = None,
    target_cov: Tensor | None = None,
    sample_factor: Tensor | None = None,
    blend: float = 0.0,
    loading: float = 0.0,
    shrink: float = 0.0,
    snr_db: Tensor | float | None = None,
    reduction: str = "mean",
    loading_side: str = "both",
    check_finite: bool = False,
    validate: bool | None = None,
    **unknown: Never,
) -> Tensor:
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
    if unnamed or unknown:
        refuse_arguments(unnamed, unknown)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cov_nmse: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    if loading_side not in ("both", "prediction"):
        raise ValueError(f"cov_nmse: loading_side is {loading_side!r}, expected 'both' or 'prediction'.")
    check_numbers(blend=blend, loading=loading, shrink=shrink)
    factor = real_complex("factor", factor, 3, "(B, N, Q)")
    if not factor.shape[1]:
        raise ValueError(
            f"cov_nmse: factor is {tuple(factor.shape)}, an array of N = 0 elements. Pass (B, N, Q) with N of 1 or"
            " more."
        )
    target_factor, target_cov = check_target(target_factor, target_cov, factor)
    sample_factor = check_sample(sample_factor, blend, factor)
    snr_B = check_snr(snr_db, shrink, factor)
    if check_finite:
        check_finite_values(
            factor=factor, target_factor=target_factor, target_cov=target_cov, sample_factor=sample_factor, snr_db=snr_B
        )
    looked = validate is not False
    if target_cov is not None and looked and readable(target_cov, wait=bool(validate)):
        check_covariance(target_cov, whole=bool(validate))
    inside = transformed()  # of torch.func, where requires_grad does not say what will be differentiated
    with_sample = sample_factor is not None and (inside or sample_factor.requires_grad)
    gradients = (2 if with_sample else int(inside or factor.requires_grad)) if torch.is_grad_enabled() else 0
    run = Transformable.apply if inside else torch.ops.ris_fast.cov_nmse.default
    target_loading = float(loading) if loading_side == "both" else 0.0
    settings = (float(blend), float(loading), target_loading, float(shrink), gradients)
    loss_B = run(factor, target_factor, target_cov, sample_factor, snr_B, *settings)[0]
    if looked and readable(loss_B, wait=bool(validate)):
        explain_infinite(loss_B.detach(), target_factor, target_cov)
    return loss_B if reduction == "none" else loss_B.mean() if reduction == "mean" else loss_B.sum()
