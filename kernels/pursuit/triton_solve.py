"""The small systems of the pursuit on the GPU: one scene a program, everything of a stage's step in one launch.

With G = D^H P D and m = D^H b of K atoms, T = 4 columns each, in the order of solve.py and search.py:
amplitudes   (G_00 + noise / signal) s = m_0                            2 K real unknowns
Newton       (Re turn^H G turn + ridge) x = Re turn^H (m - G_0 s)       5 K real unknowns: re s, im s, u, v, w of each
step         fit = (s + x_s, s x_u, s x_v, s x_w), positions move by x / scale within the box
afterwards   residual_correlation = m - G fit, explained = Re fit^H (m + residual_correlation)
A system is a square tile of registers whose column n is the right-hand side; float32 throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

T = tl.constexpr(4)  # columns of an atom: itself and its derivatives along u, v and w
UNKNOWNS = tl.constexpr(5)  # of an atom: two of its amplitude, three of its position
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
def gather(values, index, SIZE: tl.constexpr):
    """values[index] for a vector of SIZE lanes; 0 where the index is outside."""
    return tl.sum(tl.where(tl.arange(0, SIZE)[None, :] == index[:, None], values[None, :], 0.0), 1)


@triton.jit
def spd_solve(a, n, SIZE: tl.constexpr):
    """x (SIZE,) of the leading n x n system of a tile whose column n is the right-hand side; n < SIZE.

    Elimination without pivoting; a pivot below LEAST_PIVOT of its diagonal entry is raised to that. Rows of the upper
    triangle stay in the tile for the way back.
    """
    i = tl.arange(0, SIZE)
    least = tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 0) * LEAST_PIVOT
    inverse = tl.zeros([SIZE], tl.float32)
    for k in range(n):
        row = tl.sum(tl.where(i[:, None] == k, a, 0.0), 0)
        pivot = tl.sum(tl.where(i == k, at_least(row, least), 0.0), 0)
        reciprocal = tl.div_rn(1.0, pivot)
        inverse = tl.where(i == k, reciprocal, inverse)
        a -= tl.where(i > k, row * reciprocal, 0.0)[:, None] * row[None, :]
    x = tl.where(i == n, -1.0, 0.0)
    for back in range(n):
        k = n - 1 - back
        row = tl.sum(tl.where(i[:, None] == k, a, 0.0), 0)
        value = tl.sum(tl.where(i > k, row * x, 0.0), 0)
        x = tl.where(i == k, -value * inverse, x)
    return x


@triton.jit
def amplitudes(gram_ptr, moment_ptr, ridge, atoms, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Ridge least squares over the amplitudes alone: real parts, then imaginary parts, in SIZE lanes."""
    i = tl.arange(0, SIZE)
    first, inside = (i % atoms) * T, i < 2 * atoms
    lower, right = (i >= atoms)[:, None], (i >= atoms)[None, :]
    at = first[:, None] * COLUMNS + first[None, :]
    imaginary = lower != right
    a = tl.load(
        gram_ptr + at + tl.where(imaginary, COLUMNS * COLUMNS, 0), mask=inside[:, None] & inside[None, :], other=0.0
    )
    a = tl.where(imaginary & right, -a, a)
    side = tl.load(moment_ptr + first + tl.where(i >= atoms, COLUMNS, 0), mask=inside, other=0.0)
    a += tl.where((i[:, None] == i[None, :]) & inside[:, None], ridge, 0.0)
    a = tl.where(i[None, :] == 2 * atoms, side[:, None], a)
    return spd_solve(a, 2 * atoms, SIZE)


@triton.jit
def newton(
    gram_ptr,
    moment_ptr,
    trust_ptr,
    s,
    ridge,
    noise,
    atoms,
    COLUMNS: tl.constexpr,
    PAIR: tl.constexpr,
    SIZE: tl.constexpr,
):
    """What the joint step changes: (re s, im s, u, v, w) of every atom, in SIZE lanes, and s in the lanes of its atom.

    s: `amplitudes`, PAIR lanes.
    """
    i, k = tl.arange(0, SIZE), tl.arange(0, PAIR)
    inside, atom, part = i < atoms * UNKNOWNS, i // UNKNOWNS, i % UNKNOWNS
    source = atom * T + tl.maximum(part - 1, 0)  # the column of G: an atom's own one serves both parts of its amplitude
    here_re, here_im = gather(s, atom, PAIR), gather(s, atom + atoms, PAIR)
    turn_re = tl.where(part == 0, 1.0, tl.where(part == 1, 0.0, here_re))
    turn_im = tl.where(part == 0, 0.0, tl.where(part == 1, 1.0, here_im))
    # m - G_0 s at the column of each unknown; lanes k of s are real parts up to K and imaginary parts beyond
    real = k < atoms
    at = source[:, None] * COLUMNS + (k % atoms)[None, :] * T
    both = inside[:, None] & (k < 2 * atoms)[None, :]
    g_re = tl.load(gram_ptr + at, mask=both, other=0.0)
    g_im = tl.load(gram_ptr + COLUMNS * COLUMNS + at, mask=both, other=0.0)
    left_re = tl.load(moment_ptr + source, mask=inside, other=0.0)
    left_im = tl.load(moment_ptr + COLUMNS + source, mask=inside, other=0.0)
    left_re -= tl.sum(tl.where(real[None, :], g_re, -g_im) * s[None, :], 1)
    left_im -= tl.sum(tl.where(real[None, :], g_im, g_re) * s[None, :], 1)
    side = left_re * turn_re + left_im * turn_im
    at = source[:, None] * COLUMNS + source[None, :]
    both = inside[:, None] & inside[None, :]
    g_re = tl.load(gram_ptr + at, mask=both, other=0.0)
    g_im = tl.load(gram_ptr + COLUMNS * COLUMNS + at, mask=both, other=0.0)
    a = g_re * (turn_re[:, None] * turn_re[None, :] + turn_im[:, None] * turn_im[None, :])
    a += g_im * (turn_im[:, None] * turn_re[None, :] - turn_re[:, None] * turn_im[None, :])
    trust = tl.load(trust_ptr + tl.maximum(part - 2, 0))
    damping = tl.where(part < 2, ridge, tl.div_rn(noise + 0.0 * trust, trust * trust))
    a += tl.where((i[:, None] == i[None, :]) & inside[:, None], damping[:, None], 0.0)
    a = tl.where(i[None, :] == atoms * UNKNOWNS, side[:, None], a)
    return spd_solve(a, atoms * UNKNOWNS, SIZE), here_re, here_im


@triton.jit
def noise_of(snr_db_ptr, scene, energy):
    """The noise power 1 / (1 + snr), and the ridge of amplitudes: noise over the expected |x|^2; energy: M L."""
    snr = tl.exp2(0.33219280948873623 * clamp(tl.load(snr_db_ptr + scene), -40.0, 20.0))  # WORKING_SNR_DB
    noise = tl.div_rn(1.0, 1.0 + snr)
    return noise, tl.div_rn(noise, energy * snr * noise)


@triton.jit(do_not_specialize=["atoms"])
def solve_kernel(
    fit_ptr,
    position_ptr,
    residual_correlation_ptr,
    explained_ptr,
    stage_positions_ptr,
    stage_amplitudes_ptr,
    gram_ptr,
    moment_ptr,
    snr_db_ptr,
    scale_ptr,
    low_ptr,
    high_ptr,
    trust_ptr,
    atoms,
    energy,
    STAGES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One stage's step: fit and residual_correlation (B, 2, TK), position (B, K, 3), explained (B, K), the fall of the
    cost up to this stage, and what a later stage revises, stage_positions (B, E, 3) and stage_amplitudes (B, 2, E).

    gram (B, 2, TK, TK), moment (B, 2, TK), K = STAGES, of which the first `atoms` are filled. Grid (B,); SIZE: a power
    of two above 5 `atoms`, so that half of it is above 2 `atoms`.
    """
    PAIR: tl.constexpr = SIZE // 2
    COLUMNS: tl.constexpr = T * STAGES
    EARLY: tl.constexpr = STAGES * (STAGES - 1) // 2
    scene = tl.program_id(0).to(tl.int64)
    gram_ptr += scene * (2 * COLUMNS * COLUMNS)
    moment_ptr += scene * (2 * COLUMNS)
    noise, ridge = noise_of(snr_db_ptr, scene, energy)
    s = amplitudes(gram_ptr, moment_ptr, ridge, atoms, COLUMNS, PAIR)
    change, s_re, s_im = newton(gram_ptr, moment_ptr, trust_ptr, s, ridge, noise, atoms, COLUMNS, PAIR, SIZE)

    i = tl.arange(0, SIZE)
    atom, part, inside = i // UNKNOWNS, i % UNKNOWNS, i < atoms * UNKNOWNS
    axis, moves = tl.maximum(part - 2, 0), inside & (part > 1)
    most = 2.0 * tl.load(trust_ptr + axis)
    move = clamp(change, -most, most)
    fit_re = tl.where(part == 0, s_re + change, s_re * move)
    fit_im = tl.where(part == 1, s_im + change, s_im * move)
    fit_ptr += scene * (2 * COLUMNS)
    at = fit_ptr + atom * T + tl.maximum(part - 1, 0)
    tl.store(at, fit_re, mask=inside & (part != 1))
    tl.store(at + COLUMNS, fit_im, mask=inside & (part != 0))
    at = 3 * atom + axis
    position = tl.load(position_ptr + scene * (3 * STAGES) + at, mask=moves, other=0.0)
    position = clamp(
        position + tl.div_rn(move, tl.load(scale_ptr + axis)), tl.load(low_ptr + axis), tl.load(high_ptr + axis)
    )
    tl.debug_barrier()  # several threads may hold one lane: all have read before one writes; the fit is read back below
    tl.store(position_ptr + scene * (3 * STAGES) + at, position, mask=moves)
    if atoms < STAGES:  # a later stage revises this
        early = atoms * (atoms - 1) // 2
        tl.store(stage_positions_ptr + scene * (3 * EARLY) + 3 * early + at, position, mask=moves)
        amplitude_ptr = stage_amplitudes_ptr + scene * (2 * EARLY) + early + atom
        tl.store(amplitude_ptr, fit_re, mask=inside & (part == 0))
        tl.store(amplitude_ptr + EARLY, fit_im, mask=inside & (part == 1))

    c = tl.arange(0, SIZE)
    inside = c < atoms * T
    fit_re = tl.load(fit_ptr + c, mask=inside, other=0.0)
    fit_im = tl.load(fit_ptr + COLUMNS + c, mask=inside, other=0.0)
    at, both = c[:, None] * COLUMNS + c[None, :], inside[:, None] & inside[None, :]
    g_re = tl.load(gram_ptr + at, mask=both, other=0.0)
    g_im = tl.load(gram_ptr + COLUMNS * COLUMNS + at, mask=both, other=0.0)
    m_re = tl.load(moment_ptr + c, mask=inside, other=0.0)
    m_im = tl.load(moment_ptr + COLUMNS + c, mask=inside, other=0.0)
    left_re = m_re - tl.sum(g_re * fit_re[None, :] - g_im * fit_im[None, :], 1)
    left_im = m_im - tl.sum(g_re * fit_im[None, :] + g_im * fit_re[None, :], 1)
    tl.store(residual_correlation_ptr + scene * (2 * COLUMNS) + c, left_re, mask=inside)
    tl.store(residual_correlation_ptr + scene * (2 * COLUMNS) + COLUMNS + c, left_im, mask=inside)
    reached = tl.sum(fit_re * (m_re + left_re) + fit_im * (m_im + left_im), 0)
    tl.store(explained_ptr + scene * STAGES + atoms - 1, reached)
