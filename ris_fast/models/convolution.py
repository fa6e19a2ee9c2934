"""A convolution over a short sequence whose forward and backward are matrix products where those are faster.

Legend: B batch, C channels in, O channels out, L tokens in, T tokens out, S taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.models.linear import linear


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d`: the same parameters, names and initialisation; on a CPU computed by products.

    With few tokens torch's convolution and its gradient cost several times the product of the stacked taps, in
    bfloat16 most of a training step. Channel by channel (groups = C = O) there is no product: the taps are added up.
    Everything else, and every other device, takes torch's.
    """

    def forward(self, x_BCL: Tensor) -> Tensor:
        """(B, C, L) -> (B, O, T)."""
        depthwise = self.groups == self.in_channels == self.out_channels
        plain = self.padding_mode == "zeros" and self.dilation == (1,) and not isinstance(self.padding, str)
        if x_BCL.device.type != "cpu" or x_BCL.dim() != 3 or not plain or not (depthwise or self.groups == 1):
            return super().forward(x_BCL)
        taps = self._taps(x_BCL.transpose(1, 2))
        if depthwise:
            out_BTC = sum(tap * self.weight[:, 0, s] for s, tap in enumerate(taps))
            return (out_BTC if self.bias is None else out_BTC + self.bias).transpose(1, 2)
        stacked = taps[0] if len(taps) == 1 else torch.stack(taps, dim=-1).flatten(2)
        return linear(stacked, self.weight.flatten(1), self.bias).transpose(1, 2)

    def _taps(self, x_BLC: Tensor) -> list[Tensor]:
        """What each tap of the kernel sees: S tensors (B, T, C)."""
        (size,), (stride,), (padding,) = self.kernel_size, self.stride, self.padding
        if padding:
            x_BLC = fn.pad(x_BLC, (0, 0, padding, padding))
        count = (x_BLC.shape[1] - size) // stride + 1
        return [x_BLC[:, s : s + stride * (count - 1) + 1 : stride] for s in range(size)]
