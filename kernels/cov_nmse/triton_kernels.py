"""Covariance NMSE on the GPU in Triton: two launches for either target, no N x N array beyond the target itself.

Letters: B batch, N elements, Q factor columns, X sample columns, K target columns, P = Q + X + K.

Low-rank target, Z = [F, X, S], D = Z diag(w) Z^H + e I, G = Z^H Z:
    w = (pred (1-blend) N/|F|^2 .., pred blend N/|X|^2 .., -true N/|S|^2 ..)
    |D|^2 = sum w_i w_j |G_ij|^2 + 2 e sum w_i G_ii + e^2 N,   |T|^2 likewise over S
    D F   = Z (w o G[:, F]) + e F,   dF = 4 w_F (D F - (tr(F^H D F)/|F|^2) F) / |T|^2
    launch 1 sums G over elements (float64), launch 2 reads it, forms every scalar again and writes value and gradient.
Dense target: launch 1 walks over 16 x 16 tiles of D = A A^H - tau T (A the normalised factors), adds up |D|^2, |T|^2
    and D A; launch 2 removes the component along A and scales.
A zero factor has w = 0: value as of R = 0, gradient 0.
Source: the formulas of reference.py, differentiated by hand; checked against its autograd in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Arguments, compute_dtype

# Complex columns of a Gram tile. In sums it goes second, or the interpreter makes a constexpr of the sum.
COLUMNS = tl.constexpr(16)
HOISTED = tl.constexpr(12)  # columns of a dense tile that stay in registers; with more of them sm_90 spills


@triton.jit
def _alpha(snr_ptr, scene, shrink):
    """clamp(shrink 10^(-snr/20), 1e-4, 5e-2); a NaN stays a NaN; 0 where shrinkage is off."""
    alpha = shrink
    if shrink != 0.0:
        alpha = shrink * tl.exp(tl.load(snr_ptr + scene).to(tl.float64) * (-0.11512925464970228))
        # A bare number in `where` would be float32.
        low, high = tl.full((), 1e-4, tl.float64), tl.full((), 5e-2, tl.float64)
        alpha = tl.where(alpha < low, low, tl.where(alpha > high, high, alpha))
    return alpha


@triton.jit
def _mixing(snr_ptr, scene, loading, target_loading, shrink):
    """Scales of the trace-N prediction and target, the identity in D, and the identity's share of the target."""
    alpha = _alpha(snr_ptr, scene, shrink)
    pred, true = (1 - alpha) / (1 + loading), (1 - alpha) / (1 + target_loading)
    eye_true = true * target_loading + alpha
    eye = tl.where(loading == target_loading, 0.0, pred * loading + alpha - eye_true)
    return pred, true, eye, eye_true


@triton.jit
def _normaliser(power, n):
    return tl.where(power == 0.0, 0.0, n / tl.where(power == 0.0, 1.0, power))


@triton.jit
def _row(inputs, row, column, Q: tl.constexpr, X: tl.constexpr, K: tl.constexpr):
    """Real columns `column` of rows of Z as float64; column 2p is the real part of column p.

    Added up before the one conversion: float64 conversions, not products, bound these kernels (16 a cycle and SM).
    inputs: pointers to F, X and S.
    """
    f_ptr, x_ptr, s_ptr = inputs
    z = tl.load(f_ptr + row * (2 * Q) + column, mask=column < 2 * Q, other=0.0).to(s_ptr.dtype.element_ty)
    if X > 0:
        own = column - 2 * Q
        z += tl.load(x_ptr + row * (2 * X) + own, mask=(own >= 0) & (own < 2 * X), other=0.0)
    own = column - 2 * (Q + X)
    z += tl.load(s_ptr + row * (2 * K) + own, mask=(own >= 0) & (own < 2 * K), other=0.0)
    return z.to(tl.float64)


@triton.jit
def _complex_row(inputs, row, column, Q: tl.constexpr, X: tl.constexpr, K: tl.constexpr):
    """Real and imaginary part of one column of Z at the elements `row`, as float64."""
    at = row * 0 + 2 * column
    return _row(inputs, row, at, Q, X, K), _row(inputs, row, at + 1, Q, X, K)


@triton.jit
def _down(OWN: tl.constexpr):
    """Index 0 .. 8 OWN - 1 as (OWN, 1, 8, 1): with `_across` a tile in which a thread owns OWN x OWN entries."""
    return tl.arange(0, OWN)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]


@triton.jit
def _across(OWN: tl.constexpr):
    """Index 0 .. 8 OWN - 1 as (1, OWN, 1, 8)."""
    return tl.arange(0, OWN)[None, :, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]


@triton.jit(do_not_specialize=["chunk"])  # it follows the number of scenes: one compilation serves every batch
def gram_kernel(
    f_ptr,
    x_ptr,
    s_ptr,
    gram_ptr,
    n,
    chunk,
    Q: tl.constexpr,
    X: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Real Gram matrix Zr^T Zr (Zr: N x 2P reals) of one chunk of elements; one pair of 16-column tiles a program.

    gram_ptr: (B, splits, 32 TILES, 32 TILES) float64.
    """
    scene, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    SIDE: tl.constexpr = 2 * COLUMNS
    left = _down(4) + (tl.program_id(2) // TILES) * SIDE
    right = _across(4) + (tl.program_id(2) % TILES) * SIDE
    inputs = f_ptr, x_ptr, s_ptr
    acc = tl.zeros((4, 4, 8, 8), tl.float64)
    first = split * chunk
    for i in range(first, tl.minimum(first + chunk, n)):
        row = scene * n + i
        acc += _row(inputs, row, left, Q, X, K) * _row(inputs, row, right, Q, X, K)
    part = scene * tl.num_programs(1) + split
    tl.store(gram_ptr + (part * (SIDE * TILES) + left) * (SIDE * TILES) + right, acc)


@triton.jit
def _gram_tile(gram_ptr, part, splits, i, j, LD: tl.constexpr):
    """Complex entries z_i^H z_j for columns i (down) and j (across), summed over splits in order."""
    re = tl.zeros((i.shape[0], j.shape[0]), tl.float64)
    im = tl.zeros((i.shape[0], j.shape[0]), tl.float64)
    for split in range(splits):
        at = gram_ptr + ((part + split) * LD + 2 * i[:, None]) * LD + 2 * j[None, :]
        re += tl.load(at) + tl.load(at + LD + 1)
        im += tl.load(at + 1) - tl.load(at + LD)
    return re, im


@triton.jit
def _gram_diagonal(gram_ptr, part, splits, i, LD: tl.constexpr):
    total = tl.zeros((i.shape[0],), tl.float64)
    for split in range(splits):
        at = gram_ptr + (part + split) * LD * LD + 2 * i * (LD + 1)
        total += tl.load(at) + tl.load(at + LD + 1)
    return total


@triton.jit
def _column_weight(column, weights, Q: tl.constexpr, X: tl.constexpr, K: tl.constexpr):
    w_f, w_x, w_s = weights
    return tl.where(column < Q, w_f, tl.where(column < Q + X, w_x, w_s))


@triton.jit
def _residual(inputs, scene, n, weights, eye, Q: tl.constexpr, X: tl.constexpr, K: tl.constexpr):
    """|D|^2 entry by entry, O(N^2 P): exact near zero, where the Gram form is a difference of large terms."""
    total = tl.zeros((COLUMNS, COLUMNS), tl.float64)
    for i0 in range(0, n, COLUMNS):
        for j0 in range(0, n, COLUMNS):
            i, j = tl.arange(0, COLUMNS) + i0, tl.arange(0, COLUMNS) + j0
            here = (i[:, None] < n) & (j[None, :] < n)
            row_i, row_j = scene * n + tl.minimum(i, n - 1), scene * n + tl.minimum(j, n - 1)
            re, im = tl.zeros((COLUMNS, COLUMNS), tl.float64), tl.zeros((COLUMNS, COLUMNS), tl.float64)
            for p in range(Q + X + K):
                w = _column_weight(p, weights, Q, X, K)
                ir, ii = _complex_row(inputs, row_i, p, Q, X, K)
                jr, ji = _complex_row(inputs, row_j, p, Q, X, K)
                ir, ii = ir * w, ii * w
                re += ir[:, None] * jr[None, :] + ii[:, None] * ji[None, :]
                im += ii[:, None] * jr[None, :] - ir[:, None] * ji[None, :]
            re += tl.where(i[:, None] == j[None, :], eye, 0.0)
            total += tl.where(here, re * re + im * im, 0.0)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit(do_not_specialize=["splits", "groups"])  # as above
def apply_kernel(
    f_ptr,
    x_ptr,
    s_ptr,
    snr_ptr,
    gram_ptr,
    loss_ptr,
    grad_f_ptr,
    grad_x_ptr,
    n,
    splits,
    groups,
    blend: tl.float64,
    loading: tl.float64,
    target_loading: tl.float64,
    shrink: tl.float64,
    Q: tl.constexpr,
    X: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scalars of the scene from G; then value (group 0), and the gradients of every groups-th block of elements."""
    scene, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    LD: tl.constexpr = 2 * COLUMNS * TILES
    part = scene * splits
    pred, true, eye, eye_true = _mixing(snr_ptr, scene, loading, target_loading, shrink)

    power_f = pred * 0
    power_x = pred * 0
    power_s = pred * 0
    for tile in tl.static_range(TILES):
        i = tl.arange(0, COLUMNS) + tile * COLUMNS
        g = _gram_diagonal(gram_ptr, part, splits, i, LD)
        power_f += tl.sum(tl.where(i < Q, g, 0.0), 0)
        power_x += tl.sum(tl.where((i >= Q) & (i < Q + X), g, 0.0), 0)
        power_s += tl.sum(tl.where(i >= Q + X, g, 0.0), 0)
    w_f = pred * _normaliser(power_f, n)
    if X > 0:
        w_f = w_f * (1 - blend)
    w_x = pred * blend * _normaliser(power_x, n)
    w_s = -true * _normaliser(power_s, n)

    inputs, weights = (f_ptr, x_ptr, s_ptr), (w_f, w_x, w_s)
    error = eye * eye * n
    truth = eye_true * eye_true * n - 2 * eye_true * w_s * power_s
    pull_f = eye * power_f
    pull_x = eye * power_x
    for pair in range(TILES * TILES):
        i, j = tl.arange(0, COLUMNS) + (pair // TILES) * COLUMNS, tl.arange(0, COLUMNS) + (pair % TILES) * COLUMNS
        w_i = tl.where(i < Q + X + K, _column_weight(i, weights, Q, X, K), 0.0)[:, None]
        w_j = tl.where(j < Q + X + K, _column_weight(j, weights, Q, X, K), 0.0)[None, :]
        re, im = _gram_tile(gram_ptr, part, splits, i, j, LD)
        m = re * re + im * im
        in_s = (i[:, None] >= Q + X) & (j[None, :] >= Q + X)
        in_x = (j[None, :] >= Q) & (j[None, :] < Q + X)
        error += tl.sum(tl.sum(w_i * w_j * m, 1), 0)
        truth += tl.sum(tl.sum(tl.where(in_s, w_i * w_j * m, 0.0), 1), 0)
        pull_f += tl.sum(tl.sum(tl.where(j[None, :] < Q, w_i * m, 0.0), 1), 0)
        pull_x += tl.sum(tl.sum(tl.where(in_x, w_i * m, 0.0), 1), 0)
    error += 2 * eye * (w_f * power_f + w_x * power_x + w_s * power_s)
    if group == 0:
        if error < 1e-9 * truth:
            error = _residual(inputs, scene, n, weights, eye, Q, X, K)
        tl.store(loss_ptr + scene, error / truth)
    place = scene, group, groups, n, splits
    if GRADIENTS >= 1:
        diagonal = eye - pull_f / tl.where(power_f == 0, 1.0, power_f)
        _pull(inputs, weights, gram_ptr, grad_f_ptr, place, diagonal, 4 * w_f / truth, Q, X, K, 0, Q, LD, BLOCK)
    if GRADIENTS >= 2:
        diagonal = eye - pull_x / tl.where(power_x == 0, 1.0, power_x)
        _pull(inputs, weights, gram_ptr, grad_x_ptr, place, diagonal, 4 * w_x / truth, Q, X, K, Q, X, LD, BLOCK)


@triton.jit
def _pull(
    inputs,
    weights,
    gram_ptr,
    grad_ptr,
    place,
    diagonal,
    scale,
    Q: tl.constexpr,
    X: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    LD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad = scale (D F - along F) for columns FIRST .. FIRST + WIDTH of Z, 16 at a time; diagonal: e - along."""
    scene, group, groups, n, splits = place
    SIDE: tl.constexpr = 2 * COLUMNS
    OWN: tl.constexpr = BLOCK // 8
    part = scene * splits
    for block in range(group * BLOCK, n, groups * BLOCK):
        i = _down(OWN) + block
        row = scene * n + tl.minimum(i, n - 1)
        for c0 in tl.static_range(0, 2 * WIDTH, SIDE):
            c = _across(4) + c0
            to = tl.minimum(c, 2 * WIDTH - 1) + 2 * FIRST
            twin, sign = to ^ 1, 1.0 - 2.0 * (to % 2).to(tl.float64)
            out = tl.zeros((OWN, 4, 8, 8), tl.float64)
            for p in range(Q + X + K):
                w = _column_weight(p, weights, Q, X, K)
                same, other = tl.zeros((1, 4, 1, 8), tl.float64), tl.zeros((1, 4, 1, 8), tl.float64)
                for split in range(splits):  # columns of Zr in pairs: C_re = rr + ii, C_im = ri - ir
                    at = gram_ptr + ((part + split) * LD + 2 * p) * LD
                    same += tl.load(at + to) + sign * tl.load(at + LD + twin)
                    other += tl.load(at + LD + to) - sign * tl.load(at + twin)
                re, im = _complex_row(inputs, row, p, Q, X, K)
                out += re * (w * same) + im * (w * other)
            out += diagonal * _row(inputs, row, to, Q, X, K)
            tl.store(grad_ptr + (scene * n + i) * (2 * WIDTH) + c, out * scale, mask=(i < n) & (c < 2 * WIDTH))


@triton.jit
def _power(x_ptr, scene, count, SIZE: tl.constexpr):
    """Sum of squares of a scene's `count` reals, in float64."""
    total = tl.zeros((SIZE,), tl.float64)
    for k in range(0, count, SIZE):
        at = tl.arange(0, SIZE) + k
        v = tl.load(x_ptr + scene * count + at, mask=at < count, other=0.0).to(tl.float64)
        total += v * v
    return tl.sum(total, 0)


@triton.jit
def _pair_column(f_ptr, x_ptr, row, column, here, Q: tl.constexpr, X: tl.constexpr, W: tl.constexpr):
    """Real and imaginary part of one column of [F, X] at the elements `row`, zero where not here or past the end."""
    column = row * 0 + column  # a vector, because the interpreter takes no mask made of a scalar
    re = tl.load(f_ptr + row * (2 * Q) + 2 * column, mask=here & (column < Q), other=0.0).to(W)
    im = tl.load(f_ptr + row * (2 * Q) + 2 * column + 1, mask=here & (column < Q), other=0.0).to(W)
    if X > 0:
        own = column - Q
        inside = here & (own >= 0) & (own < X)
        re += tl.load(x_ptr + row * (2 * X) + 2 * own, mask=inside, other=0.0).to(W)
        im += tl.load(x_ptr + row * (2 * X) + 2 * own + 1, mask=inside, other=0.0).to(W)
    return re, im


@triton.jit
def _outer(dr, di, ir, ii, jr, ji):
    """D += a_i conj(a_j)."""
    dr += ir[:, None] * jr[None, :] + ii[:, None] * ji[None, :]
    di += ii[:, None] * jr[None, :] - ir[:, None] * ji[None, :]
    return dr, di


@triton.jit
def dense_kernel(
    f_ptr,
    x_ptr,
    target_ptr,
    snr_ptr,
    partial_ptr,
    grad_f_ptr,
    grad_x_ptr,
    n,
    blend: tl.float64,
    loading: tl.float64,
    target_loading: tl.float64,
    shrink: tl.float64,
    Q: tl.constexpr,
    X: tl.constexpr,
    GRADIENTS: tl.constexpr,
    PULLS: tl.constexpr,
    PACKED: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
):
    """D = A A^H - tau T for TILE columns j of D, all rows i: squares, and w (D^H F)_j for PULLS columns of [F, X].

    partial_ptr: (B, tiles, blocks, 8) float64: |D|^2, |T|^2, tr(F^H D F) w, the same of X, |F|^2, |X|^2.
    PACKED: the target is read as 64-bit words (re, im), which float32 pairs are.
    """
    scene, tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    pred, true, eye, eye_true = _mixing(snr_ptr, scene, loading, target_loading, shrink)
    power_f = _power(f_ptr, scene, 2 * n * Q, 512)
    w_f = pred * _normaliser(power_f, n)
    power_x = power_f * 0
    w_x = power_x
    if X > 0:
        w_f = w_f * (1 - blend)
        power_x = _power(x_ptr, scene, 2 * n * X, 512)
        w_x = pred * blend * _normaliser(power_x, n)
    trace = tl.zeros((128,), tl.float64)
    for k in range(0, n, 128):
        at = tl.arange(0, 128) + k
        entry = (scene * n + at) * n + at
        trace += tl.load(target_ptr + 2 * entry, mask=at < n, other=0.0).to(tl.float64)
    tau = (true * _normaliser(tl.sum(trace, 0), n)).to(W)

    j = tl.arange(0, TILE) + tile * TILE
    here_j = j < n
    row_j = scene * n + tl.minimum(j, n - 1)
    hoisted = ()
    if Q + X <= HOISTED:
        for p in tl.static_range(Q + X):
            jr, ji = _pair_column(f_ptr, x_ptr, row_j, p, here_j, Q, X, tl.float64)
            if p < Q:
                hoisted = hoisted + ((jr * w_f).to(W), (ji * w_f).to(W))
            else:
                hoisted = hoisted + ((jr * w_x).to(W), (ji * w_x).to(W))
    acc = ()
    if GRADIENTS >= 1:
        for _ in tl.static_range(2 * PULLS):
            acc = acc + (tl.zeros((TILE, TILE), W),)
    error = tl.zeros((TILE, TILE), W)
    truth = tl.zeros((TILE, TILE), W)
    for i0 in range(0, n, TILE):
        i = tl.arange(0, TILE) + i0
        here_i = i < n
        row_i = scene * n + tl.minimum(i, n - 1)
        here = here_i[:, None] & here_j[None, :]
        entry = row_i[:, None] * n + j[None, :]
        if PACKED:
            word = tl.load(target_ptr.to(tl.pointer_type(tl.uint64)) + entry, mask=here, other=0)
            tr = tau * (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
            ti = tau * (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        else:
            tr = tau * tl.load(target_ptr + 2 * entry, mask=here, other=0.0).to(W)
            ti = tau * tl.load(target_ptr + 2 * entry + 1, mask=here, other=0.0).to(W)
        on = (i[:, None] == j[None, :]) & here
        dr = tl.where(on, eye.to(W), 0.0) - tr
        di = -ti
        if Q + X <= HOISTED:
            for p in tl.static_range(Q + X):
                ir, ii = _pair_column(f_ptr, x_ptr, row_i, p, here_i, Q, X, W)
                dr, di = _outer(dr, di, ir, ii, hoisted[2 * p], hoisted[2 * p + 1])
        else:
            for p in range(Q + X):
                ir, ii = _pair_column(f_ptr, x_ptr, row_i, p, here_i, Q, X, W)
                jr, ji = _pair_column(f_ptr, x_ptr, row_j, p, here_j, Q, X, tl.float64)
                w = tl.where(p < Q, w_f, w_x)
                dr, di = _outer(dr, di, ir, ii, (jr * w).to(W), (ji * w).to(W))
        tr += tl.where(on, eye_true.to(W), 0.0)
        error += dr * dr + di * di
        truth += tr * tr + ti * ti
        if GRADIENTS >= 1:
            after = ()
            for q in tl.static_range(PULLS):
                ir, ii = _pair_column(f_ptr, x_ptr, row_i, block * PULLS + q, here_i, Q, X, W)
                after = after + (
                    acc[2 * q] + (dr * ir[:, None] + di * ii[:, None]),
                    acc[2 * q + 1] + (dr * ii[:, None] - di * ir[:, None]),
                )
            acc = after

    along_f = power_f * 0
    along_x = power_f * 0
    if GRADIENTS >= 1:
        for q in tl.static_range(PULLS):
            column = block * PULLS + q
            in_f = column < Q
            w = tl.where(in_f, w_f, w_x)
            re, im = tl.sum(acc[2 * q].to(tl.float64), 0) * w, tl.sum(acc[2 * q + 1].to(tl.float64), 0) * w
            jr, ji = _pair_column(f_ptr, x_ptr, row_j, column, here_j, Q, X, tl.float64)
            along = tl.sum(re * jr + im * ji, 0)
            along_f += tl.where(in_f, along, 0.0)
            along_x += tl.where(in_f, 0.0, along)
            spread = row_j * 0 + column
            tl.store(grad_f_ptr + row_j * (2 * Q) + 2 * spread, re, mask=here_j & (spread < Q))
            tl.store(grad_f_ptr + row_j * (2 * Q) + 2 * spread + 1, im, mask=here_j & (spread < Q))
            if GRADIENTS >= 2:
                own = spread - Q
                inside = here_j & (own >= 0) & (own < X)
                tl.store(grad_x_ptr + row_j * (2 * X) + 2 * own, re, mask=inside)
                tl.store(grad_x_ptr + row_j * (2 * X) + 2 * own + 1, im, mask=inside)
    to = partial_ptr + ((scene * tl.num_programs(1) + tile) * tl.num_programs(2) + block) * 8
    tl.store(to, tl.sum(tl.sum(error.to(tl.float64), 1), 0))
    tl.store(to + 1, tl.sum(tl.sum(truth.to(tl.float64), 1), 0))
    tl.store(to + 2, along_f)
    tl.store(to + 3, along_x)
    tl.store(to + 4, power_f)
    tl.store(to + 5, power_x)


@triton.jit
def finish_kernel(
    f_ptr,
    x_ptr,
    partial_ptr,
    loss_ptr,
    grad_f_ptr,
    grad_x_ptr,
    n,
    tiles,
    blocks,
    Q: tl.constexpr,
    X: tl.constexpr,
    GRADIENTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the partial sums, writes the value, takes the component along the factor out of the gradient, in place."""
    scene, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, SPAN)
    part = partial_ptr + (scene * tiles * blocks + at) * 8
    every, first = at < tiles * blocks, (at < tiles * blocks) & (at % blocks == 0)
    error = tl.sum(tl.load(part, mask=first, other=0.0), 0)
    truth = tl.sum(tl.load(part + 1, mask=first, other=0.0), 0)
    if group == 0:
        tl.store(loss_ptr + scene, error / truth)
    if GRADIENTS >= 1:
        power = tl.load(partial_ptr + scene * tiles * blocks * 8 + 4)
        along = tl.sum(tl.load(part + 2, mask=every, other=0.0), 0)
        _without_along(f_ptr, grad_f_ptr, scene, group, 2 * n * Q, along, power, truth, BLOCK)
    if GRADIENTS >= 2:
        power = tl.load(partial_ptr + scene * tiles * blocks * 8 + 5)
        along = tl.sum(tl.load(part + 3, mask=every, other=0.0), 0)
        _without_along(x_ptr, grad_x_ptr, scene, group, 2 * n * X, along, power, truth, BLOCK)


@triton.jit
def _without_along(f_ptr, grad_ptr, scene, group, count, along, power, truth, BLOCK: tl.constexpr):
    ratio, scale = along / tl.where(power == 0, 1.0, power), 4 / truth
    for k in range(group * BLOCK, count, tl.num_programs(1) * BLOCK):
        at = tl.arange(0, BLOCK) + k
        here = at < count
        own = tl.load(f_ptr + scene * count + at, mask=here, other=0.0).to(tl.float64)
        pull = tl.load(grad_ptr + scene * count + at, mask=here, other=0.0).to(tl.float64)
        tl.store(grad_ptr + scene * count + at, (pull - ratio * own) * scale, mask=here)


DENSE_TILE, PULLS_AT_MOST, APPLY_BLOCK, FINISH_BLOCK = 16, {1: 12, 2: 8}, 32, 1024
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def cov_nmse(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Value and unit gradients; arguments and results as `ris_fast::cov_nmse` (op.py). Two launches.

    Numerics: low-rank target in float64 throughout; dense target in the compute dtype, sums over tiles in float64.
    """
    a = Arguments(*args)
    dtype = compute_dtype(a.factor.dtype)
    f, t = a.factor.contiguous(), None if a.target_cov is None else a.target_cov.contiguous()
    s, x, snr = (None if y is None else y.to(dtype).contiguous() for y in (a.target_factor, a.sample_factor, a.snr_db))
    loss = f.new_empty(len(f), dtype=dtype)
    grad_f = f.new_empty(f.shape if a.gradients >= 1 else 0, dtype=dtype)
    grad_x = f.new_empty(x.shape if a.gradients >= 2 else 0, dtype=dtype)
    if len(f):
        inputs = f, f if x is None else x, s if t is None else t, f if snr is None else snr  # any pointer where unread
        run = _low_rank if t is None else _dense
        run(inputs, (loss, grad_f, grad_x), a[5:9], a.sample_columns, a.gradients)
    return loss, grad_f, grad_x


Tensors = tuple[Tensor, ...]


def _low_rank(inputs: Tensors, outputs: Tensors, settings: tuple[float, ...], columns: int, gradients: int) -> None:
    f, x, s, _ = inputs
    (b, n, q, _), k = f.shape, s.shape[2]
    tiles = triton.cdiv(q + columns + k, 16)
    splits = max(1, min(triton.cdiv(n, 16), 1024 // (b * tiles * tiles)))  # few scenes: several programs share one
    chunk = triton.cdiv(n, splits)
    gram = f.new_empty((b, splits, 32 * tiles, 32 * tiles), dtype=torch.float64)
    gram_kernel[(b, splits, tiles * tiles)](
        f, x, s, gram, n, chunk, q, columns, k, tiles, num_warps=2, enable_fp_fusion=True
    )
    groups = max(1, min(triton.cdiv(n, APPLY_BLOCK), 2048 // b)) if gradients else 1
    sizes, constants = (n, splits, groups), (q, columns, k, tiles, gradients, APPLY_BLOCK)
    apply_kernel[(b, groups)](
        *inputs, gram, *outputs, *sizes, *settings, *constants, num_warps=2, enable_fp_fusion=True
    )


def _dense(inputs: Tensors, outputs: Tensors, settings: tuple[float, ...], columns: int, gradients: int) -> None:
    (f, x, t, _), (loss, grad_f, grad_x) = inputs, outputs
    b, n, q, _ = f.shape
    width = q + (columns if gradients >= 2 else 0)
    blocks = triton.cdiv(width, PULLS_AT_MOST[gradients]) if gradients else 1
    tiles, pulls = triton.cdiv(n, DENSE_TILE), triton.cdiv(width, blocks)
    partial = f.new_empty((b, tiles, blocks, 8), dtype=torch.float64)
    packed, dtype = t.dtype == torch.float32, DTYPES[loss.dtype]
    constants = (q, columns, gradients, pulls, packed, dtype, DENSE_TILE)
    dense_kernel[(b, tiles, blocks)](
        *inputs, partial, grad_f, grad_x, n, *settings, *constants, num_warps=2, enable_fp_fusion=True
    )
    count = 2 * n * max(q, columns) if gradients else 1
    sizes, constants = (n, tiles, blocks), (q, columns, gradients, triton.next_power_of_2(tiles * blocks), FINISH_BLOCK)
    finish_kernel[(b, triton.cdiv(count, 4 * FINISH_BLOCK))](
        f, x, partial, loss, grad_f, grad_x, *sizes, *constants, num_warps=4, enable_fp_fusion=True
    )
