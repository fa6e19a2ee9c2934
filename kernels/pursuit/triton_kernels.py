"""The pursuit of search.py on the GPU: five launches a stage, a program a scene or a tile of one.

once        scene_kernel      powers of two, levels, b = G^H y
            gram_kernel       P = (H^H H) o (C^H C), tiles of the upper triangle, mirrored
a stage     search_kernel     b - P x of the last fit, and the grid's position with the largest |a^H r|, by its factors;
                              where it has none: residual_kernel, torch.matmul with the dictionary, pick_kernel
            tangents_kernel   D, stacked with -j D; P D by torch.bmm
            inner_kernel      D^H P D and D^H b
            solve_kernel      amplitudes, joint Newton step, what is left (triton_solve.py)
at the end  inputs_kernel, basis_kernel

Layouts (rows along the array, so that neighbouring lanes read neighbouring words):
gram (B, N, 2N)        [Re P | -Im P]
columns (B, 2C, 2N)    row c: [Re D_c | Im D_c], row C + c: [Im D_c | -Re D_c], C = T k columns of the k atoms so far
image (B, 2C, N)       columns gram^T: row c: Re P D_c, row C + c: Im P D_c
moment, residual (B, N, 2) pairs
A size that is 1 is a constant to Triton, not a tensor: what must be a float comes as one.
float32 throughout, tl.dot in "ieee" (its default is TF32, which costs accuracy in b, the residual and the systems).
Every scene has its own bits but for the products of torch, whose order of summation may depend on the batch.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox.triton_kernels import direction
from . import reference
from .triton_solve import UNKNOWNS, T, at_least, clamp, noise_of, solve_kernel

DEPTH = tl.constexpr(16)  # antennas or snapshots a product takes at a time: the least that tl.dot takes
SIDE = 32  # of a tile of P
LANES = 1024  # entries a pass over a scene's numbers or its scores takes
TILE = 16  # positions along u and v that a step of the search takes
STRIP, WIDE_STRIP, ROWS = 16, 32, 4  # elements that a step of an inner product, of b and of the basis takes
NOTHING = tl.constexpr(1e-18)  # of search.py
TINY = tl.constexpr(1e-12)  # of reference.py
WARPS = 4


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


@triton.jit
def residual_at(moment_ptr, image_ptr, fit_ptr, scene, n, inside, atoms, elements, STAGES: tl.constexpr):
    """b - P x of the fit x (B, 2, TK) of `atoms` atoms, at elements n of any shape."""
    count = atoms * T
    at = moment_ptr + 2 * (scene * elements + n)
    re, im = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    image_ptr += scene * (2 * count * elements)
    fit_ptr += scene * (2 * T * STAGES)
    for c in range(count):
        x_re, x_im = tl.load(fit_ptr + c), tl.load(fit_ptr + T * STAGES + c)
        i_re = tl.load(image_ptr + c * elements + n, mask=inside, other=0.0)
        i_im = tl.load(image_ptr + (count + c) * elements + n, mask=inside, other=0.0)
        re -= x_re * i_re - x_im * i_im
        im -= x_re * i_im + x_im * i_re
    return re, im


@triton.jit
def set_position(position_ptr, grid_ptr, scene, atom, found, STAGES: tl.constexpr):
    """position (B, K, 3) of one atom becomes a position of the grid."""
    axis = tl.arange(0, 4)
    value = tl.load(grid_ptr + 3 * found + axis, mask=axis < 3, other=0.0)
    tl.store(position_ptr + 3 * (scene * STAGES + atom) + axis, value, mask=axis < 3)


@triton.jit(do_not_specialize=["atom"])
def search_kernel(
    position_ptr,
    moment_ptr,
    image_ptr,
    fit_ptr,
    along_x_ptr,
    along_y_ptr,
    grid_ptr,
    atom,
    wide,
    high,
    positions_u,
    positions_v,
    positions_w,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    HIGH: tl.constexpr,
    TILE: tl.constexpr,
):
    """position (B, K, 3) of an atom: the first with the largest |a^H r|, r = b - P x of the `atom` atoms before it.

    a = along_x (W, X, U, 2) times along_y (W, Y, V, 2), so that r, a tile (Y, X), is correlated along x and then along
    y, for TILE values of u and of v at a time. NaN never is the largest. Grid (B,); WIDE >= X and HIGH >= Y.
    """
    scene, x, y, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE), tl.arange(0, HIGH), tl.arange(0, TILE)
    n, on_array = y[:, None] * wide + x[None, :], (y < high)[:, None] & (x < wide)[None, :]
    r_re, r_im = residual_at(moment_ptr, image_ptr, fit_ptr, scene, n, on_array, atom, wide * high, STAGES)
    best, index = tl.full([TILE, TILE], -1.0, tl.float32), tl.zeros([TILE, TILE], tl.int32)
    for w in range(positions_w):
        for first in range(0, positions_u, TILE):
            u = first + lane
            at = along_x_ptr + 2 * ((w * wide + x)[:, None] * positions_u + u[None, :])
            inside = (x < wide)[:, None] & (u < positions_u)[None, :]
            x_re, x_im = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
            z_re = tl.dot(r_re, x_re, input_precision="ieee")
            z_re = tl.dot(r_im, x_im, z_re, input_precision="ieee")
            z_im = tl.dot(r_im, x_re, input_precision="ieee")
            z_im = tl.dot(-r_re, x_im, z_im, input_precision="ieee")
            for low in range(0, positions_v, TILE):
                v = low + lane
                from_y = along_y_ptr + 2 * ((w * high + y)[None, :] * positions_v + v[:, None])
                within = (y < high)[None, :] & (v < positions_v)[:, None]
                y_re, y_im = tl.load(from_y, mask=within, other=0.0), tl.load(from_y + 1, mask=within, other=0.0)
                re = tl.dot(y_re, z_re, input_precision="ieee")
                re = tl.dot(y_im, z_im, re, input_precision="ieee")
                im = tl.dot(y_re, z_im, input_precision="ieee")
                im = tl.dot(-y_im, z_re, im, input_precision="ieee")
                power, here = re * re + im * im, (u[None, :] * positions_v + v[:, None]) * positions_w + w
                better = (power > best) | ((power == best) & (here < index))
                better = better & (u < positions_u)[None, :] & (v < positions_v)[:, None]
                best, index = tl.where(better, power, best), tl.where(better, here, index)
    last = positions_u * positions_v * positions_w - 1
    top = tl.max(tl.max(best, 1), 0)
    set_position(position_ptr, grid_ptr, scene, atom, tl.min(tl.min(tl.where(best == top, index, last), 1), 0), STAGES)


@triton.jit(do_not_specialize=["atoms"])
def residual_kernel(
    residual_ptr, moment_ptr, image_ptr, fit_ptr, atoms, elements, STAGES: tl.constexpr, LANES: tl.constexpr
):
    """residual (B, N, 2) = b - P x of the fit x (B, 2, TK); grid (B, blocks of LANES elements)."""
    scene, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * LANES + tl.arange(0, LANES)
    re, im = residual_at(moment_ptr, image_ptr, fit_ptr, scene, n, n < elements, atoms, elements, STAGES)
    at = residual_ptr + 2 * (scene * elements + n)
    tl.store(at, re, mask=n < elements)
    tl.store(at + 1, im, mask=n < elements)


@triton.jit(do_not_specialize=["atom"])
def pick_kernel(position_ptr, scores_ptr, grid_ptr, atom, positions, STAGES: tl.constexpr, LANES: tl.constexpr):
    """position (B, K, 3) of one atom: the first of the largest scores (B, 2G) = [real | imaginary]; NaN never is.

    Grid (B,).
    """
    scene, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    scores_ptr += scene * (2 * positions)
    best, index = tl.full([LANES], -1.0, tl.float32), tl.zeros([LANES], tl.int32)
    for start in range(0, positions, LANES):
        at = start + lane
        re = tl.load(scores_ptr + at, mask=at < positions, other=0.0)
        im = tl.load(scores_ptr + positions + at, mask=at < positions, other=0.0)
        power = re * re + im * im
        better = (power > best) & (at < positions)
        best, index = tl.where(better, power, best), tl.where(better, at, index)
    found = tl.min(tl.where(best == tl.max(best, 0), index, positions - 1), 0)
    set_position(position_ptr, grid_ptr, scene, atom, found, STAGES)


@triton.jit
def store_column(column_ptr, n, re, im, turned, elements):
    """[re | im] into one row of `columns`, and [im | -re] into the row `turned` floats further on."""
    inside = n < elements
    tl.store(column_ptr + n, re, mask=inside)
    tl.store(column_ptr + elements + n, im, mask=inside)
    tl.store(column_ptr + turned + n, im, mask=inside)
    tl.store(column_ptr + turned + elements + n, -re, mask=inside)


@triton.jit(do_not_specialize=["atoms"])
def tangents_kernel(
    columns_ptr,
    position_ptr,
    x_ptr,
    y_ptr,
    curvature_ptr,
    scale_ptr,
    atoms,
    elements,
    norm,
    wavenumber,
    STAGES: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
):
    """columns (B, 2C, 2N) of the first `atoms` positions (B, K, 3); grid (B, atoms), LANES >= N. norm = 1 / sqrt(N)."""
    scene, atom, n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, LANES)
    inside = n < elements
    x, y = tl.load(x_ptr + n, mask=inside, other=0.0), tl.load(y_ptr + n, mask=inside, other=0.0)
    bend = tl.load(curvature_ptr + n, mask=inside, other=0.0)
    position_ptr += 3 * (scene * STAGES + atom)
    u, v, w = tl.load(position_ptr), tl.load(position_ptr + 1), tl.load(position_ptr + 2)
    psi, along_u, along_v, along_w = phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)
    re, im = unit(psi)
    re, im = re * norm, im * norm
    turned = atoms * T * 2 * elements
    columns_ptr += (scene * (2 * atoms) + atom) * (T * 2 * elements)
    store_column(columns_ptr, n, re, im, turned, elements)
    for axis in tl.static_range(3):
        slope = along_u if axis == 0 else (along_v if axis == 1 else along_w)
        mean = tl.sum(tl.where(inside, slope, 0.0), 0) * (norm * norm)
        weight = tl.div_rn(slope - mean, tl.load(scale_ptr + axis) + 0.0 * slope)
        store_column(columns_ptr + (axis + 1) * (2 * elements), n, -weight * im, weight * re, turned, elements)


@triton.jit(do_not_specialize=["atoms"])
def inner_kernel(
    gram_ptr,
    inner_ptr,
    columns_ptr,
    image_ptr,
    moment_ptr,
    atoms,
    elements,
    STAGES: tl.constexpr,
    SIZE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """D^H P D into gram (B, 2, TK, TK) and D^H b into inner (B, 2, TK), of `atoms` atoms; grid (B,), SIZE >= T K."""
    COLUMNS: tl.constexpr = T * STAGES
    scene, count = tl.program_id(0).to(tl.int64), atoms * T
    columns_ptr += scene * (4 * count * elements)
    image_ptr += scene * (2 * count * elements)
    moment_ptr += scene * (2 * elements)
    c, lane = tl.arange(0, SIZE), tl.arange(0, STRIP)
    re, im = tl.zeros([SIZE, SIZE], tl.float32), tl.zeros([SIZE, SIZE], tl.float32)
    m_re, m_im = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for start in range(0, elements, STRIP):
        n = start + lane
        inside = (c < count)[:, None] & (n < elements)[None, :]
        at = columns_ptr + 2 * c[:, None] * elements + n[None, :]
        d_re, d_im = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
        inside = (n < elements)[:, None] & (c < count)[None, :]
        at = image_ptr + c[None, :] * elements + n[:, None]
        i_re, i_im = tl.load(at, mask=inside, other=0.0), tl.load(at + count * elements, mask=inside, other=0.0)
        re = tl.dot(d_re, i_re, re, input_precision="ieee")
        re = tl.dot(d_im, i_im, re, input_precision="ieee")
        im = tl.dot(d_re, i_im, im, input_precision="ieee")
        im = tl.dot(-d_im, i_re, im, input_precision="ieee")
        b_re = tl.load(moment_ptr + 2 * n, mask=n < elements, other=0.0)[None, :]
        b_im = tl.load(moment_ptr + 2 * n + 1, mask=n < elements, other=0.0)[None, :]
        m_re += tl.sum(d_re * b_re + d_im * b_im, 1)
        m_im += tl.sum(d_re * b_im - d_im * b_re, 1)
    at = gram_ptr + scene * (2 * COLUMNS * COLUMNS) + c[:, None] * COLUMNS + c[None, :]
    inside = (c < count)[:, None] & (c < count)[None, :]
    tl.store(at, re, mask=inside)
    tl.store(at + COLUMNS * COLUMNS, im, mask=inside)
    at = inner_ptr + scene * (2 * COLUMNS) + c
    tl.store(at, m_re, mask=c < count)
    tl.store(at + COLUMNS, m_im, mask=c < count)


@triton.jit
def early_atom(e, STAGES: tl.constexpr):
    """The atom that estimate e of an earlier stage is about: 0; 0, 1; 0, 1, 2; ..."""
    stage = e * 0 + 1
    for later in tl.static_range(2, STAGES):
        stage += (e >= later * (later - 1) // 2).to(tl.int32)
    return e - stage * (stage - 1) // 2


@triton.jit
def log_share(power, total):
    return tl.log(at_least(tl.div_rn(power, total), 1e-6)) / 4


@triton.jit
def inputs_kernel(
    inputs_ptr,
    position_ptr,
    fit_ptr,
    gram_ptr,
    residual_correlation_ptr,
    explained_ptr,
    stage_positions_ptr,
    stage_amplitudes_ptr,
    snr_db_ptr,
    scale_ptr,
    low_ptr,
    high_ptr,
    energy,
    width,
    STAGES: tl.constexpr,
    ATOMS: tl.constexpr,
    LANES: tl.constexpr,
    EARLY_LANES: tl.constexpr,
):
    """inputs (B, F) in the order of reference.py; grid (B,). ATOMS >= K, LANES >= T K, EARLY_LANES >= E are powers of
    two."""
    COLUMNS: tl.constexpr = T * STAGES
    EARLY: tl.constexpr = STAGES * (STAGES - 1) // 2
    scene = tl.program_id(0).to(tl.int64)
    out = inputs_ptr + scene * width
    fit_ptr += scene * (2 * COLUMNS)
    gram_ptr += scene * (2 * COLUMNS * COLUMNS)
    position_ptr += scene * (3 * STAGES)
    explained_ptr += scene * STAGES
    noise, _ = noise_of(snr_db_ptr, scene, energy)
    k = tl.arange(0, ATOMS)
    real = k < STAGES
    s_re = tl.load(fit_ptr + k * T, mask=real, other=0.0)
    s_im = tl.load(fit_ptr + COLUMNS + k * T, mask=real, other=0.0)
    power = at_least(s_re * s_re + s_im * s_im, TINY)
    total = tl.sum(tl.where(real, power, 0.0), 0)
    for axis in tl.static_range(3):
        low, high = tl.load(low_ptr + axis), tl.load(high_ptr + axis)
        position = tl.load(position_ptr + 3 * k + axis, mask=real, other=0.0)
        value = tl.div_rn(position - (high + low) / 2, at_least((high - low) / 2, TINY) + 0.0 * position)
        tl.store(out + 3 * k + axis, value, mask=real)
    out += 3 * STAGES
    e = tl.arange(0, EARLY_LANES)
    about, past = early_atom(e, STAGES), e < EARLY
    for axis in tl.static_range(3):
        then = tl.load(stage_positions_ptr + scene * (3 * EARLY) + 3 * e + axis, mask=past, other=0.0)
        now = tl.load(position_ptr + 3 * about + axis, mask=past, other=0.0)
        tl.store(out + 3 * e + axis, clamp((then - now) * tl.load(scale_ptr + axis), -3.0, 3.0), mask=past)
    out += 3 * EARLY
    tl.store(out + k, log_share(power, total), mask=real)
    out += STAGES
    then_re = tl.load(stage_amplitudes_ptr + scene * (2 * EARLY) + e, mask=past, other=0.0)
    then_im = tl.load(stage_amplitudes_ptr + scene * (2 * EARLY) + EARLY + e, mask=past, other=0.0)
    tl.store(out + e, log_share(then_re * then_re + then_im * then_im, total), mask=past)
    out += EARLY
    explained = tl.load(explained_ptr + k, mask=real, other=0.0)
    gain = explained - tl.load(explained_ptr + k - 1, mask=real & (k > 0), other=0.0)
    tl.store(out + k, tl.log(1.0 + tl.div_rn(at_least(gain, 0.0), noise)) / 4 - 1, mask=real)
    out += STAGES
    c = tl.arange(0, LANES)
    inside = c < COLUMNS
    x_re = tl.load(fit_ptr + (c // T) * T, mask=inside, other=0.0)
    x_im = tl.load(fit_ptr + COLUMNS + (c // T) * T, mask=inside, other=0.0)
    curvature = tl.load(gram_ptr + c * (COLUMNS + 1), mask=inside, other=0.0)
    information = at_least(tl.div_rn(at_least(x_re * x_re + x_im * x_im, TINY) * curvature, noise), TINY)
    left_re = tl.load(residual_correlation_ptr + scene * (2 * COLUMNS) + c, mask=inside, other=0.0)
    left_im = tl.load(residual_correlation_ptr + scene * (2 * COLUMNS) + COLUMNS + c, mask=inside, other=0.0)
    spread = noise * tl.sqrt_rn(information)
    tl.store(out + c, tl.log(1.0 + information) / 4 - 1, mask=inside)
    score = tl.div_rn(x_re * left_re + x_im * left_im, spread)
    tl.store(out + COLUMNS + c, clamp(score, -4.0, 4.0) / 2, mask=inside)
    score = tl.div_rn(x_re * left_im - x_im * left_re, spread)
    tl.store(out + 2 * COLUMNS + c, clamp(score, -4.0, 4.0) / 2, mask=inside)
    out += 3 * COLUMNS
    root = tl.sqrt_rn(power)
    a_re, a_im = tl.div_rn(s_re, root), tl.div_rn(s_im, root)
    both = real[:, None] & real[None, :]
    at = gram_ptr + (k[:, None] * COLUMNS + k[None, :]) * T
    g_re, g_im = tl.load(at, mask=both, other=0.0), tl.load(at + COLUMNS * COLUMNS, mask=both, other=0.0)
    c_re = g_re * a_re[None, :] - g_im * a_im[None, :]
    c_im = g_re * a_im[None, :] + g_im * a_re[None, :]
    at = out + k[:, None] * STAGES + k[None, :]
    tl.store(at, a_re[:, None] * c_re + a_im[:, None] * c_im, mask=both)
    tl.store(at + STAGES * STAGES, a_re[:, None] * c_im - a_im[:, None] * c_re, mask=both)
    out += 2 * STAGES * STAGES
    tl.store(out, clamp(tl.load(snr_db_ptr + scene), -40.0, 20.0) / 10 - 1)
    left = at_least(energy - tl.load(explained_ptr + STAGES - 1), TINY)
    tl.store(out + 1, clamp(tl.log(tl.div_rn(left, energy * noise)), -4.0, 4.0))


@triton.jit
def array_at(x_ptr, y_ptr, curvature_ptr, n, elements):
    """x, y and curvature of elements n, as columns."""
    inside = n < elements
    x, y = tl.load(x_ptr + n, mask=inside, other=0.0), tl.load(y_ptr + n, mask=inside, other=0.0)
    return x[:, None], y[:, None], tl.load(curvature_ptr + n, mask=inside, other=0.0)[:, None]


@triton.jit
def slope_along(axis, along_u, along_v, along_w):
    return tl.where(axis <= 0, along_u, tl.where(axis == 1, along_v, along_w))


@triton.jit
def basis_kernel(
    basis_ptr,
    position_ptr,
    fit_ptr,
    stage_positions_ptr,
    stage_amplitudes_ptr,
    x_ptr,
    y_ptr,
    curvature_ptr,
    scale_ptr,
    elements,
    norm,
    wavenumber,
    STAGES: tl.constexpr,
    ATOMS: tl.constexpr,
    SPHERICAL: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """basis (B, N, 2R): amplitudes of norm one times tangents, then each earlier estimate less the final one.

    A lane an element and a column, so that rows are written whole; grid (B,), SIZE >= R and ATOMS >= K.
    """
    COLUMNS: tl.constexpr = T * STAGES
    EARLY: tl.constexpr = STAGES * (STAGES - 1) // 2
    RANK: tl.constexpr = COLUMNS + EARLY
    scene, k, r, lane = tl.program_id(0).to(tl.int64), tl.arange(0, ATOMS), tl.arange(0, SIZE), tl.arange(0, ROWS)
    fit_ptr += scene * (2 * COLUMNS)
    s_re = tl.load(fit_ptr + k * T, mask=k < STAGES, other=0.0)
    s_im = tl.load(fit_ptr + COLUMNS + k * T, mask=k < STAGES, other=0.0)
    level = tl.div_rn(norm, tl.sqrt_rn(at_least(tl.sum(s_re * s_re + s_im * s_im, 0), TINY)))
    past, inside, e = (r >= COLUMNS) & (r < RANK), r < RANK, tl.maximum(r - COLUMNS, 0)
    atom = tl.where(past, early_atom(e, STAGES), r // T)
    axis = tl.where(past, -1, r % T - 1)  # -1: the steering vector itself
    at = position_ptr + scene * (3 * STAGES) + 3 * atom
    u, v = tl.load(at, mask=inside, other=0.0)[None, :], tl.load(at + 1, mask=inside, other=0.0)[None, :]
    w = tl.load(at + 2, mask=inside, other=0.0)[None, :]
    now_re = level * tl.load(fit_ptr + atom * T, mask=inside, other=0.0)[None, :]
    now_im = level * tl.load(fit_ptr + COLUMNS + atom * T, mask=inside, other=0.0)[None, :]
    at = stage_positions_ptr + scene * (3 * EARLY) + 3 * e
    then_u, then_v = tl.load(at, mask=past, other=0.0)[None, :], tl.load(at + 1, mask=past, other=0.0)[None, :]
    then_w = tl.load(at + 2, mask=past, other=0.0)[None, :]
    at = stage_amplitudes_ptr + scene * (2 * EARLY) + e
    then_re = level * tl.load(at, mask=past, other=0.0)[None, :]
    then_im = level * tl.load(at + EARLY, mask=past, other=0.0)[None, :]
    mean = tl.zeros([SIZE], tl.float32)
    for start in range(0, elements, ROWS):
        n = start + lane
        x, y, bend = array_at(x_ptr, y_ptr, curvature_ptr, n, elements)
        _, along_u, along_v, along_w = phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)
        slope = slope_along(axis[None, :], along_u, along_v, along_w)
        mean += tl.sum(tl.where((n < elements)[:, None], slope, 0.0), 0)
    mean *= norm * norm
    scale = tl.load(scale_ptr + tl.maximum(axis, 0))
    for start in range(0, elements, ROWS):
        n = start + lane
        x, y, bend = array_at(x_ptr, y_ptr, curvature_ptr, n, elements)
        psi, along_u, along_v, along_w = phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)
        weight = tl.div_rn(
            slope_along(axis[None, :], along_u, along_v, along_w) - mean[None, :], scale[None, :] + 0.0 * psi
        )
        a_re, a_im = unit(psi)
        now = (axis < 0)[None, :]
        d_re, d_im = tl.where(now, a_re, -weight * a_im), tl.where(now, a_im, weight * a_re)
        re, im = d_re * now_re - d_im * now_im, d_re * now_im + d_im * now_re
        psi, _, _, _ = phase_slopes(x, y, bend, then_u, then_v, then_w, wavenumber, SPHERICAL)
        a_re, a_im = unit(psi)
        re = tl.where(past[None, :], a_re * then_re - a_im * then_im - re, re)
        im = tl.where(past[None, :], a_re * then_im + a_im * then_re - im, im)
        out = basis_ptr + (scene * elements + n)[:, None] * (2 * RANK) + r[None, :]
        written = (n < elements)[:, None] & inside[None, :]
        tl.store(out, re, mask=written)
        tl.store(out + RANK, im, mask=written)


def _by_factors(
    position: Tensor,
    moment: Tensor,
    image: Tensor,
    fit: Tensor,
    grid: Tensor,
    atom: int,
    *,
    along_x: Tensor,
    along_y: Tensor,
) -> None:
    """Writes the position of a new atom: one launch."""
    (depths, wide, places_u, _), (_, high, places_v, _) = along_x.shape, along_y.shape
    search_kernel[(len(fit),)](
        position,
        moment,
        image,
        fit,
        along_x,
        along_y,
        grid,
        atom,
        wide,
        high,
        places_u,
        places_v,
        depths,
        STAGES=position.shape[1],
        WIDE=max(triton.next_power_of_2(wide), TILE),
        HIGH=max(triton.next_power_of_2(high), TILE),
        TILE=TILE,
        num_warps=2 * WARPS,  # with 4 registers run out
    )


def _by_dictionary(
    position: Tensor, moment: Tensor, image: Tensor, fit: Tensor, grid: Tensor, atom: int, *, dictionary: Tensor
) -> None:
    """Writes the position of a new atom: a product of torch between two launches."""
    (batch, elements, _), stages, residual = moment.shape, position.shape[1], moment
    if atom:
        residual, lanes = torch.empty_like(moment), min(LANES, triton.next_power_of_2(elements))
        residual_kernel[(batch, triton.cdiv(elements, lanes))](
            residual, moment, image, fit, atom, elements, STAGES=stages, LANES=lanes, num_warps=WARPS
        )
    scores = residual.flatten(1) @ dictionary
    pick_kernel[(batch,)](position, scores, grid, atom, len(grid), STAGES=stages, LANES=LANES, num_warps=WARPS)


@torch.no_grad()
def pursuit_features(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
    factored: bool,
) -> tuple[Tensor, Tensor]:
    """The operator on the device of `snapshots`; arguments as in reference.py.

    factored: searches by the factors of the grid, else by the dictionary; what it does not read may be empty.
    """
    y, h, c, snr_db, *constants = (
        each.float().contiguous() for each in (snapshots, channel, codes, snr_db, *constants)
    )
    x, y_axis, curvature, scale, low, high, trust, grid, dictionary, along_x, along_y = constants
    (batch, length, antennas, _), elements = y.shape, h.shape[2]
    columns, early = int(T) * stages, stages * (stages - 1) // 2
    new = y.new_empty
    inputs, basis = new((batch, reference.width(stages))), new((batch, elements, 2 * reference.rank(stages)))
    if batch == 0:
        return inputs, basis
    power = triton.next_power_of_2
    levels, moment, gram = new((batch, 2)), new((batch, elements, 2)), new((batch, elements, 2 * elements))
    inner_gram, inner, fit, left = new((batch, 2, columns, columns)), *(new((batch, 2, columns)) for _ in range(3))
    position, explained = new((batch, stages, 3)), new((batch, stages))
    stage_positions, stage_amplitudes = new((batch, early, 3)), new((batch, 2, early))
    array, spherical, norm = (x, y_axis, curvature, scale), bool(wavenumber), elements**-0.5
    stride, energy = 2 * length * elements if c.dim() == 4 else 0, float(length * antennas)
    tiles = triton.cdiv(elements, SIDE)
    search = (
        partial(_by_factors, along_x=along_x, along_y=along_y)
        if factored
        else partial(_by_dictionary, dictionary=dictionary)
    )
    image = moment  # of no atom: the first search reads none of it
    with torch.cuda.device_of(y), torch.autocast(y.device.type, enabled=False):
        scene_kernel[(batch,)](
            levels,
            moment,
            y,
            h,
            c,
            stride,
            antennas,
            elements,
            length,
            energy,
            length / elements,
            LANES=LANES,
            STRIP=WIDE_STRIP,
            num_warps=WARPS,
        )
        gram_kernel[(batch, tiles, tiles)](
            gram, h, c, levels, stride, antennas, elements, length, SIDE=SIDE, num_warps=WARPS
        )
        for atoms in range(1, stages + 1):
            search(position, moment, image, fit, grid, atoms - 1)
            found = new((batch, 2 * int(T) * atoms, 2 * elements))
            tangents_kernel[(batch, atoms)](
                found,
                position,
                *array,
                atoms,
                elements,
                norm,
                wavenumber,
                STAGES=stages,
                SPHERICAL=spherical,
                LANES=power(elements),
                num_warps=max(WARPS, power(elements) // 256),  # beyond 8 elements a thread registers run out
            )
            image = torch.bmm(found, gram.transpose(1, 2))
            inner_kernel[(batch,)](
                inner_gram,
                inner,
                found,
                image,
                moment,
                atoms,
                elements,
                STAGES=stages,
                SIZE=max(power(int(T) * atoms), DEPTH.value),
                STRIP=STRIP,
                num_warps=WARPS,
            )
            size = max(power(int(UNKNOWNS) * atoms + 1), 16)
            solve_kernel[(batch,)](
                fit,
                position,
                left,
                explained,
                stage_positions,
                stage_amplitudes,
                inner_gram,
                inner,
                snr_db,
                scale,
                low,
                high,
                trust,
                atoms,
                energy,
                STAGES=stages,
                SIZE=size,
                num_warps=1 if size <= 32 else 2 * WARPS,
            )
        inputs_kernel[(batch,)](
            inputs,
            position,
            fit,
            inner_gram,
            left,
            explained,
            stage_positions,
            stage_amplitudes,
            snr_db,
            scale,
            low,
            high,
            energy,
            inputs.shape[1],
            STAGES=stages,
            ATOMS=power(stages),
            LANES=power(columns),
            EARLY_LANES=power(max(early, 1)),
            num_warps=1,
        )
        basis_kernel[(batch,)](
            basis,
            position,
            fit,
            stage_positions,
            stage_amplitudes,
            *array,
            elements,
            norm,
            wavenumber,
            STAGES=stages,
            ATOMS=power(stages),
            SPHERICAL=spherical,
            ROWS=ROWS,
            SIZE=power(reference.rank(stages)),
            num_warps=WARPS,
        )
    return inputs, basis
