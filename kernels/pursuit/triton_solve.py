"""The small systems of the pursuit on the GPU, one scene a program.

With G = D^H P D and m = D^H b, the first column of each atom shifted by its offset, as in search.py:
amplitudes   (G_00 + ridge) s = m_0                                     2 K real unknowns
Newton       (Re turn^H G turn + ridge) x = Re turn^H (m - G_0 s)       5 K real unknowns: re s, im s, u, v, w of each
A system is a square tile of registers with its right-hand side in column and row n; float32 throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_state import (
    TRUST,
    UNKNOWNS,
    T,
    amplitudes_of,
    change_of,
    gram_of,
    inner_of,
    inverse_of,
    live_of,
)

SHARE = tl.constexpr(0.1)  # of search.py
LEAST_PIVOT = tl.constexpr(1e-6)  # of its diagonal entry


@triton.jit
def at_least(x, low):
    """The larger one; NaN stays NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def noise_of(snr_db_ptr, scene, energy):
    """The noise power 1 / (1 + snr), and the ridge of amplitudes: noise over the expected |s|^2; energy: M L."""
    snr = tl.exp2(0.33219280948873623 * clamp(tl.load(snr_db_ptr + scene), -40.0, 20.0))  # WORKING_SNR_DB
    noise = tl.div_rn(1.0, 1.0 + snr)
    return noise, tl.div_rn(noise, SHARE * (energy * snr * noise))


@triton.jit
def sweep(a, n, SIZE: tl.constexpr):
    """The symmetric tile [A r; r^T 0] of n unknowns, n < SIZE, becomes [-1/A x; x^T -r^T x] with x = A^-1 r.

    Returns it and log det A. The sweep operator, which keeps the tile symmetric, so that a row serves as the column
    too. No pivoting; a pivot below LEAST_PIVOT of its diagonal entry is raised to that. Source: Goodnight, "A tutorial
    on the SWEEP operator", The American Statistician 33 (1979) 149-158.
    """
    i = tl.arange(0, SIZE)
    least = tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 0) * LEAST_PIVOT
    pivots = tl.full([SIZE], 1.0, tl.float32)
    for k in range(n):
        row = tl.sum(tl.where(i[:, None] == k, a, 0.0), 0)
        pivot = tl.sum(tl.where(i == k, at_least(row, least), 0.0), 0)
        pivots = tl.where(i == k, pivot, pivots)
        row = tl.where(i == k, -1.0, row)
        swept = (i == k)[:, None] | (i == k)[None, :]
        a = tl.where(swept, 0.0, a) - (row * tl.div_rn(1.0, pivot))[:, None] * row[None, :]
    return a, tl.sum(tl.log(pivots), 0)


@triton.jit
def with_side(a, side, n, SIZE: tl.constexpr):
    """The tile with `side` in its column and row n."""
    i = tl.arange(0, SIZE)
    a = tl.where((i == n)[None, :], side[:, None], a)
    return tl.where((i == n)[:, None], side[None, :], a)


@triton.jit(noinline=True)
def amplitudes(state_ptr, flags_ptr, ridge, atoms, A: tl.constexpr, SIZE: tl.constexpr):
    """Ridge least squares of the amplitudes alone, and the diagonal of their inverse normal matrix; returns what of the
    cost they explain."""
    C: tl.constexpr = T * A
    gram_ptr, inner_ptr = gram_of(state_ptr, A) + 2 * C * C, inner_of(state_ptr, A) + 2 * C
    i = tl.arange(0, SIZE)
    inside, second = i < 2 * atoms, i >= atoms
    slot = tl.load(live_of(flags_ptr, A) + i % atoms, mask=inside, other=0)
    imaginary = second[:, None] != second[None, :]
    at = slot[:, None] * (T * C) + slot[None, :] * T + tl.where(imaginary, C * C, 0)
    a = tl.load(gram_ptr + at, mask=inside[:, None] & inside[None, :], other=0.0)
    a = tl.where(imaginary & second[None, :], -a, a)
    a += tl.where((i[:, None] == i[None, :]) & inside[:, None], ridge, 0.0)
    side = tl.load(inner_ptr + slot * T + tl.where(second, C, 0), mask=inside, other=0.0)
    a, _ = sweep(with_side(a, side, 2 * atoms, SIZE), 2 * atoms, SIZE)
    x = tl.sum(tl.where((i == 2 * atoms)[:, None], a, 0.0), 0)
    tl.store(amplitudes_of(state_ptr, atoms, A) + slot + tl.where(second, A, 0), x, mask=inside)
    inverse = -tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 0)
    tl.store(inverse_of(state_ptr, A) + slot, inverse, mask=i < atoms)
    tl.debug_barrier()
    return tl.sum(tl.where(inside, x * side, 0.0), 0)


@triton.jit(noinline=True)
def newton(state_ptr, flags_ptr, task_ptr, ridge, noise, atoms, A: tl.constexpr, SIZE: tl.constexpr):
    """What the joint step changes; returns the logarithm of the system's determinant."""
    C: tl.constexpr = T * A
    PLANE: tl.constexpr = C * C
    gram_ptr, inner_ptr, live_ptr = gram_of(state_ptr, A), inner_of(state_ptr, A), live_of(flags_ptr, A)
    amplitude_ptr = amplitudes_of(state_ptr, atoms, A)
    i, k = tl.arange(0, SIZE), tl.arange(0, SIZE // T)
    inside, part = i < atoms * UNKNOWNS, i % UNKNOWNS
    slot = tl.load(live_ptr + i // UNKNOWNS, mask=inside, other=0)
    source = slot * T + tl.maximum(part - 1, 0)  # an atom's own column serves both parts of its amplitude
    s_re = tl.load(amplitude_ptr + slot, mask=inside, other=0.0)
    s_im = tl.load(amplitude_ptr + A + slot, mask=inside, other=0.0)
    turn_re = tl.where(part == 0, 1.0, tl.where(part == 1, 0.0, s_re))
    turn_im = tl.where(part == 0, 0.0, tl.where(part == 1, 1.0, s_im))
    # m - G_0 s at the column of each unknown
    other = tl.load(live_ptr + k, mask=k < atoms, other=0)
    o_re = tl.load(amplitude_ptr + other, mask=k < atoms, other=0.0)[None, :]
    o_im = tl.load(amplitude_ptr + A + other, mask=k < atoms, other=0.0)[None, :]
    at = gram_ptr + 2 * PLANE + source[:, None] * C + other[None, :] * T
    both = inside[:, None] & (k < atoms)[None, :]
    g_re, g_im = tl.load(at, mask=both, other=0.0), tl.load(at + PLANE, mask=both, other=0.0)
    at = inner_ptr + source + tl.where(part < 2, 2 * C, 0)
    left_re = tl.load(at, mask=inside, other=0.0) - tl.sum(g_re * o_re - g_im * o_im, 1)
    left_im = tl.load(at + C, mask=inside, other=0.0) - tl.sum(g_re * o_im + g_im * o_re, 1)
    side = left_re * turn_re + left_im * turn_im
    shifted = (part < 2)[:, None] | (part < 2)[None, :]
    at = gram_ptr + source[:, None] * C + source[None, :] + tl.where(shifted, 2 * PLANE, 0)
    both = inside[:, None] & inside[None, :]
    a = tl.load(at, mask=both, other=0.0) * (turn_re[:, None] * turn_re[None, :] + turn_im[:, None] * turn_im[None, :])
    g_im = tl.load(at + PLANE, mask=both, other=0.0)
    a += g_im * (turn_im[:, None] * turn_re[None, :] - turn_re[:, None] * turn_im[None, :])
    trust = tl.load(task_ptr + TRUST + tl.maximum(part - 2, 0))
    damping = tl.where(part < 2, ridge, tl.div_rn(noise + 0.0 * trust, trust * trust))
    a += tl.where((i[:, None] == i[None, :]) & inside[:, None], damping[:, None], 0.0)
    n = atoms * UNKNOWNS
    a, log_det = sweep(with_side(a, side, n, SIZE), n, SIZE)
    x = tl.sum(tl.where((i == n)[:, None], a, 0.0), 0)
    tl.store(change_of(state_ptr, A) + slot * UNKNOWNS + part, x, mask=inside)
    tl.debug_barrier()
    return log_det
