"""The covariance NMSE under torch.func: `vmap` folds its axis into the batch, `grad`, `vjp` and `jacrev` differentiate
once.

Letters: V an axis that vmap hides, B batch, N RIS elements, Q factor columns; a last axis of 2 is (re, im).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ONCE = (
    "cov_nmse: a second derivative is asked for ({}), but it is differentiable once only. Ask for the first alone, or"
    " write the NMSE of the dense covariances in torch."
)


def transformed() -> bool:
    """Whether the caller runs inside of torch.func.grad, torch.vmap or their kin."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def scaled_units(ctx: Any, grad_B: Tensor | None) -> list[Tensor | None]:
    """Gradients of factor and sample factor: the unit gradients that `ctx` saved times the incoming one."""
    scaled: list[Tensor | None] = []
    for unit, dtype, needed in zip(
        ctx.saved_tensors, ctx.dtypes, (ctx.needs_input_grad[0], ctx.needs_input_grad[3]), strict=True
    ):
        if needed and unit.dim() != 4:
            raise RuntimeError(
                "ris_fast::cov_nmse: a gradient is asked for that the call did not compute: pass gradients=1 (factor)"
                " or 2 (factor and sample_factor)."
            )
        scaled.append((grad_B[:, None, None, None] * unit).to(dtype) if needed and grad_B is not None else None)
    return scaled


def fold(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Any, ...], int]:
    """Arguments with the axis V folded into B, (V B, ...), and V. What has no such axis is the same for all of V."""

    def folded(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        whole = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return whole.reshape(info.batch_size * whole.shape[1], *whole.shape[2:])

    return tuple(folded(x, dim) for x, dim in zip(args, in_dims, strict=True)), info.batch_size


def unfold(results: tuple[Tensor, ...], size: int) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Results with the axis V again, and where it is; an empty gradient, which was not asked for, has none."""
    scenes = len(results[0])
    given = [x.dim() != 1 or i == 0 for i, x in enumerate(results)]
    return (
        tuple(x.reshape(size, scenes // size, *x.shape[1:]) if has else x for x, has in zip(results, given)),
        tuple(0 if has else None for has in given),
    )


class Transformable(torch.autograd.Function):
    """The operator as torch.func takes it. Arguments and results as `ris_fast::cov_nmse`.

    The unit gradients are results that nobody outside reads: a gradient that comes back through them is a second
    derivative, whose other share is not there.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ris_fast.cov_nmse.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = inputs[0].dtype, None if inputs[3] is None else inputs[3].dtype

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor | None, *through_units: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(each is not None for each in through_units):
            raise RuntimeError(ONCE.format("a gradient of torch.func.grad or its kin"))
        scaled = scaled_units(ctx, grad_B)
        return scaled[0], None, None, scaled[1], *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(
            "cov_nmse: called under forward-mode differentiation (torch.func.jvp, jacfwd, hessian), for which it has no"
            " rule. Use torch.func.grad, vjp or jacrev, or loss.backward(); for a second derivative write the NMSE of"
            " the dense covariances in torch."
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        folded, size = fold(info, in_dims, *args)
        return unfold(Transformable.apply(*folded), size)
