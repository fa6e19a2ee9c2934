"""Powers of two that bring numbers of any unit into the range where their squares and products are safe.

A product with a power of two is exact, so numbers of ordinary size give the same bits with and without.
Legend: B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = {
    torch.float32: (torch.int32, 23, 254),
    torch.float64: (torch.int64, 52, 2046),
}  # bits, of the mantissa, largest exponent


def power_of_two(a: Tensor) -> Tensor:
    """The power of two for each scene that takes its largest |entry| into [1, 4): (B, ...) -> (B, 1, ...).

    Zeros stay zeros and NaN stays NaN under it; the smallest subnormal becomes 2^-23 in float32. No host
    synchronisation.
    """
    whole, mantissa, largest = LAYOUTS[a.dtype]
    peak = a.detach().abs().amax(tuple(range(1, a.dim())), keepdim=True)
    if torch.compiler.is_exporting():  # other runtimes, ONNX first, cannot look at the bits of a number
        return peak.log2().floor().clamp(1 - largest // 2, largest // 2 - 1).neg().exp2()
    exponent = peak.view(whole) >> mantissa
    return ((largest - exponent.clamp(1, largest - 1)) << mantissa).view(a.dtype)


def rescaled(a: Tensor) -> Tensor:
    """Each scene of (B, ...) times its power of two."""
    return a * power_of_two(a)
