"""Linear layers whose float32 products on a CPU go to oneDNN, forward and backward.

torch sends float32 products on a CPU to MKL, which on processors that are not Intel's leaves AVX-512 aside: half the
speed, measured in the lab book. The function is that of `torch.nn.functional.linear`; the last bits differ.

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, by oneDNN where it serves: float32 on a CPU, outside of autocast."""
    if (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    ):
        return onednn_linear(x, weight, bias)
    return fn.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear`: the same parameters, names and initialisation, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
