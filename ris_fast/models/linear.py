"""Linear layers whose products on a CPU go to oneDNN, forward and backward.

torch sends float32 products on a CPU to MKL, which on processors that are not Intel's leaves AVX-512 aside: half the
speed, measured in the lab book. The function is that of `torch.nn.functional.linear`; the last bits differ.

Under bfloat16 autocast products and results are bfloat16 and gradients of weights and biases float32. Every call casts
the weights as they are then, so they cannot be stale; that reads them once a forward pass, 2 % of a training step.

Legend: X inputs, Y outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.library.custom_op("ris_fast::linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN: (..., X), (Y, X) of any strides, (Y,) -> (..., Y); float32 on a CPU."""
    if x.numel() == 0 or weight.numel() == 0:
        return fn.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX = G W, dW = G^T X, db = sum of G's rows: the same operator with other strides."""
    x, weight = ctx.saved_tensors
    rows, need = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
    return (
        onednn_linear(grad, weight.t(), None) if need[0] else None,
        onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if need[1] else None,
        rows.sum(0) if need[2] else None,
    )


onednn_linear.register_autograd(_backward, setup_context=_keep)


class _LowLinear(torch.autograd.Function):
    """x W^T + b in bfloat16, with float32 parameters and float32 gradients of them.

    dX = G W, dW = G^T X, db = 1^T G; a product with a row of ones adds up bfloat16 in float32, five times as fast as
    torch's sum does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, low)
        return fn.linear(x, low, None if bias is None else bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, need = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        return (
            (rows @ weight).view(x.shape) if need[0] else None,
            (rows.t() @ x.reshape(-1, x.shape[-1])).float() if need[1] else None,
            (rows.new_ones(1, rows.shape[0]) @ rows)[0].float() if need[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, by oneDNN where it serves: float32 on a CPU, outside of autocast, and bfloat16 within."""
    if x.device.type == "cpu" and weight.dtype == torch.float32:
        if not torch.is_autocast_enabled("cpu"):
            if ONEDNN and x.dtype == torch.float32:
                return onednn_linear(x, weight, bias)
        elif torch.get_autocast_dtype("cpu") == torch.bfloat16:
            return _LowLinear.apply(x.to(torch.bfloat16), weight, bias)
    return fn.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear`: the same parameters, names and initialisation, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
