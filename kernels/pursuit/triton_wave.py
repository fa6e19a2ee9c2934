"""Phases and steering vectors of the pursuit on the GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox.triton_kernels import direction
from .triton_solve import at_least


@triton.jit
def unit(radians):
    """cos and sin of any phase; pi / 2 comes off in three parts, so that a large phase loses nothing."""
    whole = tl.floor(radians * 0.636619772367581343 + 0.5)
    rest = tl.fma(whole, -1.5703125, radians)
    rest = tl.fma(whole, -4.837512969970703e-4, rest)
    rest = tl.fma(whole, -7.549789948768648e-8, rest)
    return direction(whole.to(tl.int32), rest * 0.636619772367581343)


@triton.jit
def phase_slopes(x, y, bend, u, v, w, k, SPHERICAL: tl.constexpr):
    """psi and its slopes by u, v and w, broadcast; k: rad/m."""
    line = u * x + v * y
    if SPHERICAL:
        q = tl.sqrt_rn(at_least(1.0 + tl.div_rn(2.0, k) * w * (w * bend - line), 1e-12))
        psi = tl.div_rn(2.0 * (line - w * bend), 1.0 + q)
        slope = tl.div_rn(2.0 * w * bend - line, k * q)
        along_u, along_v = tl.div_rn(x + 0.0 * q, q), tl.div_rn(y + 0.0 * q, q)
        return psi, along_u, along_v, -tl.div_rn(2.0 * bend + psi * slope, 1.0 + q)
    else:
        return line - bend * w, x + 0.0 * line, y + 0.0 * line, 0.0 * line - bend
