"""The answer of the pursuit on the GPU: the network's inputs and the columns of its factors, in the order of `live`."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_solve import at_least, clamp, noise_of
from .triton_state import (
    HIGH,
    LOW,
    SCALE,
    T,
    amplitudes_of,
    array_at,
    cost_of,
    curvature_of,
    flags_at,
    live_of,
    log_det_of,
    overlap_of,
    positions_of,
    state_at,
)
from .triton_wave import phase_slopes, unit

TINY = tl.constexpr(1e-12)  # of reference.py


@triton.jit
def early(e, STAGES: tl.constexpr):
    """The order that estimate e of the lower ones is of, and its atom there: 1: 0; 2: 0, 1; 3: 0, 1, 2; ..."""
    order = e * 0 + 1
    for later in tl.static_range(2, STAGES):
        order += (e >= later * (later - 1) // 2).to(tl.int32)
    return order, e - order * (order - 1) // 2


@triton.jit
def log_share(power, total):
    return tl.log(at_least(tl.div_rn(power, total), 1e-6)) / 4


@triton.jit
def inputs_kernel(
    inputs_ptr,
    state_ptr,
    flags_ptr,
    snr_db_ptr,
    task_ptr,
    energy,
    width,
    STAGES: tl.constexpr,
    A: tl.constexpr,
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
    state_ptr, live_ptr = state_at(state_ptr, scene, A), live_of(flags_at(flags_ptr, scene, A), A)
    position_ptr, amplitude_ptr = positions_of(state_ptr, STAGES, A), amplitudes_of(state_ptr, STAGES, A)
    noise, _ = noise_of(snr_db_ptr, scene, energy)
    k = tl.arange(0, ATOMS)
    real = k < STAGES
    slot = tl.load(live_ptr + k, mask=real, other=0)
    s_re = tl.load(amplitude_ptr + slot, mask=real, other=0.0)
    s_im = tl.load(amplitude_ptr + A + slot, mask=real, other=0.0)
    power = at_least(s_re * s_re + s_im * s_im, TINY)
    total = tl.sum(tl.where(real, power, 0.0), 0)
    for axis in tl.static_range(3):
        low, high = tl.load(task_ptr + LOW + axis), tl.load(task_ptr + HIGH + axis)
        position = tl.load(position_ptr + 3 * slot + axis, mask=real, other=0.0)
        value = tl.div_rn(position - (high + low) / 2, at_least((high - low) / 2, TINY) + 0.0 * position)
        tl.store(out + 3 * k + axis, value, mask=real)
    out += 3 * STAGES
    e = tl.arange(0, EARLY_LANES)
    order, atom = early(e, STAGES)
    past = e < EARLY
    about = tl.load(live_ptr + atom, mask=past, other=0)
    for axis in tl.static_range(3):
        then = tl.load(positions_of(state_ptr, order, A) + 3 * about + axis, mask=past, other=0.0)
        now = tl.load(position_ptr + 3 * about + axis, mask=past, other=0.0)
        tl.store(out + 3 * e + axis, clamp((then - now) * tl.load(task_ptr + SCALE + axis), -3.0, 3.0), mask=past)
    out += 3 * EARLY
    tl.store(out + k, log_share(power, total), mask=real)
    out += STAGES
    at = amplitudes_of(state_ptr, order, A) + about
    then_re, then_im = tl.load(at, mask=past, other=0.0), tl.load(at + A, mask=past, other=0.0)
    tl.store(out + e, log_share(then_re * then_re + then_im * then_im, total), mask=past)
    out += EARLY
    cost = tl.load(cost_of(state_ptr, A) + k, mask=real, other=0.0)
    before = tl.load(cost_of(state_ptr, A) + k - 1, mask=real & (k > 0), other=0.0)
    gain = tl.where(k > 0, before, energy) - cost
    tl.store(out + k, tl.log(1.0 + tl.div_rn(at_least(gain, 0.0), noise)) / 4 - 1, mask=real)
    out += STAGES
    c = tl.arange(0, LANES)
    inside = c < COLUMNS
    own = tl.load(live_ptr + c // T, mask=inside, other=0)
    x_re = tl.load(amplitude_ptr + own, mask=inside, other=0.0)
    x_im = tl.load(amplitude_ptr + A + own, mask=inside, other=0.0)
    curvature = tl.load(curvature_of(state_ptr, A) + own * T + c % T, mask=inside, other=0.0)
    information = at_least(tl.div_rn(at_least(x_re * x_re + x_im * x_im, TINY) * curvature, noise), TINY)
    tl.store(out + c, tl.log(1.0 + information) / 4 - 1, mask=inside)
    out += COLUMNS
    root = tl.sqrt_rn(power)
    a_re, a_im = tl.div_rn(s_re, root), tl.div_rn(s_im, root)
    both = real[:, None] & real[None, :]
    at = overlap_of(state_ptr, A) + slot[:, None] * A + slot[None, :]
    g_re, g_im = tl.load(at, mask=both, other=0.0), tl.load(at + A * A, mask=both, other=0.0)
    c_re = g_re * a_re[None, :] - g_im * a_im[None, :]
    c_im = g_re * a_im[None, :] + g_im * a_re[None, :]
    at = out + k[:, None] * STAGES + k[None, :]
    tl.store(at, a_re[:, None] * c_re + a_im[:, None] * c_im, mask=both)
    tl.store(at + STAGES * STAGES, a_re[:, None] * c_im - a_im[:, None] * c_re, mask=both)
    out += 2 * STAGES * STAGES
    log_det = tl.load(log_det_of(state_ptr, A) + k, mask=real, other=0.0)
    volume = tl.div_rn(log_det, 5.0 * (k + 1).to(tl.float32)) - tl.log(noise)
    tl.store(out + k, volume / 4 - 1, mask=real)
    out += STAGES
    tl.store(out, clamp(tl.load(snr_db_ptr + scene), -40.0, 20.0) / 10 - 1)
    left = at_least(tl.load(cost_of(state_ptr, A) + STAGES - 1), TINY)
    tl.store(out + 1, clamp(tl.log(tl.div_rn(left, energy * noise)), -4.0, 4.0))


@triton.jit
def slope_along(axis, along_u, along_v, along_w):
    return tl.where(axis <= 0, along_u, tl.where(axis == 1, along_v, along_w))


@triton.jit
def basis_kernel(
    basis_ptr,
    state_ptr,
    flags_ptr,
    task_ptr,
    elements,
    norm,
    wavenumber,
    STAGES: tl.constexpr,
    A: tl.constexpr,
    ATOMS: tl.constexpr,
    SPHERICAL: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """basis (B, N, 2R): amplitudes of norm one times tangents, then each estimate of a lower order less the final one.

    A lane an element and a column, so that rows are written whole; grid (B,), SIZE >= R and ATOMS >= K.
    """
    COLUMNS: tl.constexpr = T * STAGES
    EARLY: tl.constexpr = STAGES * (STAGES - 1) // 2
    RANK: tl.constexpr = COLUMNS + EARLY
    scene, k, r, lane = tl.program_id(0).to(tl.int64), tl.arange(0, ATOMS), tl.arange(0, SIZE), tl.arange(0, ROWS)
    state_ptr, live_ptr = state_at(state_ptr, scene, A), live_of(flags_at(flags_ptr, scene, A), A)
    position_ptr, amplitude_ptr = positions_of(state_ptr, STAGES, A), amplitudes_of(state_ptr, STAGES, A)
    slot = tl.load(live_ptr + k, mask=k < STAGES, other=0)
    s_re = tl.load(amplitude_ptr + slot, mask=k < STAGES, other=0.0)
    s_im = tl.load(amplitude_ptr + A + slot, mask=k < STAGES, other=0.0)
    level = tl.div_rn(norm, tl.sqrt_rn(at_least(tl.sum(s_re * s_re + s_im * s_im, 0), TINY)))
    past, inside = (r >= COLUMNS) & (r < RANK), r < RANK
    order, atom = early(tl.maximum(r - COLUMNS, 0), STAGES)
    slot = tl.load(live_ptr + tl.where(past, atom, r // T), mask=inside, other=0)
    axis = tl.where(past, -1, r % T - 1)  # -1: the steering vector itself
    at = position_ptr + 3 * slot
    u, v = tl.load(at, mask=inside, other=0.0)[None, :], tl.load(at + 1, mask=inside, other=0.0)[None, :]
    w = tl.load(at + 2, mask=inside, other=0.0)[None, :]
    now_re = level * tl.load(amplitude_ptr + slot, mask=inside, other=0.0)[None, :]
    now_im = level * tl.load(amplitude_ptr + A + slot, mask=inside, other=0.0)[None, :]
    at = positions_of(state_ptr, order, A) + 3 * slot
    then_u, then_v = tl.load(at, mask=past, other=0.0)[None, :], tl.load(at + 1, mask=past, other=0.0)[None, :]
    then_w = tl.load(at + 2, mask=past, other=0.0)[None, :]
    at = amplitudes_of(state_ptr, order, A) + slot
    then_re = level * tl.load(at, mask=past, other=0.0)[None, :]
    then_im = level * tl.load(at + A, mask=past, other=0.0)[None, :]
    mean = tl.zeros([SIZE], tl.float32)
    for start in range(0, elements, ROWS):
        n = start + lane
        x, y, bend = array_at(task_ptr, n[:, None], elements)
        _, along_u, along_v, along_w = phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)
        slope = slope_along(axis[None, :], along_u, along_v, along_w)
        mean += tl.sum(tl.where((n < elements)[:, None], slope, 0.0), 0)
    mean *= norm * norm
    scale = tl.load(task_ptr + SCALE + tl.maximum(axis, 0))
    for start in range(0, elements, ROWS):
        n = start + lane
        x, y, bend = array_at(task_ptr, n[:, None], elements)
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
