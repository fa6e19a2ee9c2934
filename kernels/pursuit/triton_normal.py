"""The normal equations of the pursuit on the GPU: P = G^H G and b = G^H y of every scene, normalised.

float32 throughout, tl.dot in "ieee" (its default is TF32, which costs accuracy in b and the systems).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_solve import at_least

DEPTH = tl.constexpr(16)  # antennas or snapshots a product takes at a time: the least that tl.dot takes
NOTHING = tl.constexpr(1e-18)  # of search.py


@triton.jit
def unit_scale(values_ptr, count, LANES: tl.constexpr):
    """The power of two that takes the largest |entry| into [1, 4), as kernels/scale.py."""
    peak = tl.zeros([LANES], tl.int32)
    for start in range(0, count, LANES):
        at = start + tl.arange(0, LANES)
        value = tl.load(values_ptr + at, mask=at < count, other=0.0)
        peak = tl.maximum(peak, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = tl.minimum(tl.maximum(tl.max(peak, 0) >> 23, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def energy_of(values_ptr, scale, count, LANES: tl.constexpr):
    """Sum of squares of scaled values."""
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, count, LANES):
        at = start + tl.arange(0, LANES)
        value = scale * tl.load(values_ptr + at, mask=at < count, other=0.0)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def scene_kernel(
    levels_ptr,
    moment_ptr,
    snapshots_ptr,
    channel_ptr,
    codes_ptr,
    code_stride,
    antennas,
    elements,
    snapshots,
    energy,
    ratio,
    LANES: tl.constexpr,
    STRIP: tl.constexpr,
):
    """levels (B, 2): the channel's power of two, and 1 over the mean squared column of G; moment (B, N, 2). Grid (B,).

    code_stride: floats from a scene's codes to the next one's, 0 where all share them; energy: M L, ratio: L / N.
    """
    scene = tl.program_id(0).to(tl.int64)
    snapshots_ptr += scene * (2 * snapshots * antennas)
    channel_ptr += scene * (2 * antennas * elements)
    codes_ptr += scene * code_stride
    y_scale = unit_scale(snapshots_ptr, 2 * snapshots * antennas, LANES)
    h_scale = unit_scale(channel_ptr, 2 * antennas * elements, LANES)
    column = energy_of(channel_ptr, h_scale, 2 * antennas * elements, LANES)
    column = at_least(column * ratio, NOTHING)
    level = at_least(tl.div_rn(energy_of(snapshots_ptr, y_scale, 2 * snapshots * antennas, LANES), energy), NOTHING)
    tl.store(levels_ptr + 2 * scene, h_scale)
    tl.store(levels_ptr + 2 * scene + 1, tl.div_rn(1.0, column))
    weight = tl.div_rn(1.0, tl.sqrt_rn(column * level))
    d = tl.arange(0, DEPTH)
    for start in range(0, elements, STRIP):
        n = start + tl.arange(0, STRIP)
        b_re, b_im = tl.zeros([STRIP], tl.float32), tl.zeros([STRIP], tl.float32)
        for first in range(0, snapshots, DEPTH):
            shot = first + d
            back_re, back_im = tl.zeros([STRIP, DEPTH], tl.float32), tl.zeros([STRIP, DEPTH], tl.float32)
            for m in tl.range(0, antennas, loop_unroll_factor=4):  # four entries of latency at a time
                at = channel_ptr + 2 * (m * elements + n)
                h_re = h_scale * tl.load(at, mask=n < elements, other=0.0)[:, None]
                h_im = h_scale * tl.load(at + 1, mask=n < elements, other=0.0)[:, None]
                at = snapshots_ptr + 2 * (shot * antennas + m)
                y_re = y_scale * tl.load(at, mask=shot < snapshots, other=0.0)[None, :]
                y_im = y_scale * tl.load(at + 1, mask=shot < snapshots, other=0.0)[None, :]
                back_re += h_re * y_re + h_im * y_im
                back_im += h_re * y_im - h_im * y_re
            at = codes_ptr + 2 * (shot[None, :] * elements + n[:, None])
            inside = (shot < snapshots)[None, :] & (n < elements)[:, None]
            c_re, c_im = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
            b_re += tl.sum(c_re * back_re + c_im * back_im, 1)
            b_im += tl.sum(c_re * back_im - c_im * back_re, 1)
        out = moment_ptr + 2 * (scene * elements + n)
        tl.store(out, weight * b_re, mask=n < elements)
        tl.store(out + 1, weight * b_im, mask=n < elements)


@triton.jit
def conjugate_product(rows_ptr, count, elements, left, right, scale, SIDE: tl.constexpr):
    """sum_r conj(a_rn) a_rm of scaled rows a (count, N, 2) for n in left and m in right: two tiles (SIDE, SIDE)."""
    re, im = tl.zeros([SIDE, SIDE], tl.float32), tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, count, DEPTH):
        r = start + tl.arange(0, DEPTH)
        at = rows_ptr + 2 * (r[None, :] * elements + left[:, None])
        inside = (r < count)[None, :] & (left < elements)[:, None]
        n_re, n_im = scale * tl.load(at, mask=inside, other=0.0), scale * tl.load(at + 1, mask=inside, other=0.0)
        at = rows_ptr + 2 * (r[:, None] * elements + right[None, :])
        inside = (r < count)[:, None] & (right < elements)[None, :]
        m_re, m_im = scale * tl.load(at, mask=inside, other=0.0), scale * tl.load(at + 1, mask=inside, other=0.0)
        re = tl.dot(n_re, m_re, re, input_precision="ieee")
        re = tl.dot(n_im, m_im, re, input_precision="ieee")
        im = tl.dot(n_re, m_im, im, input_precision="ieee")
        im = tl.dot(-n_im, m_re, im, input_precision="ieee")
    return re, im


@triton.jit
def gram_kernel(
    gram_ptr, channel_ptr, codes_ptr, levels_ptr, code_stride, antennas, elements, snapshots, SIDE: tl.constexpr
):
    """gram (B, N, 2N); grid (B, tiles, tiles), of which the tiles below the diagonal are left to their mirrors."""
    scene, row, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if column >= row:
        n, m = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
        scale, weight = tl.load(levels_ptr + 2 * scene), tl.load(levels_ptr + 2 * scene + 1)
        channel = channel_ptr + scene * (2 * antennas * elements)
        h_re, h_im = conjugate_product(channel, antennas, elements, n, m, scale, SIDE)
        c_re, c_im = conjugate_product(codes_ptr + scene * code_stride, snapshots, elements, n, m, 1.0, SIDE)
        re, im = weight * (h_re * c_re - h_im * c_im), weight * (h_re * c_im + h_im * c_re)
        inside = (n < elements)[:, None] & (m < elements)[None, :]
        gram = gram_ptr + scene * (2 * elements * elements)
        at = gram + 2 * n[:, None] * elements + m[None, :]
        tl.store(at, re, mask=inside)
        tl.store(at + elements, -im, mask=inside)
        if column > row:
            inside = (m < elements)[:, None] & (n < elements)[None, :]
            at = gram + 2 * m[:, None] * elements + n[None, :]
            tl.store(at, tl.trans(re), mask=inside)
            tl.store(at + elements, tl.trans(im), mask=inside)
