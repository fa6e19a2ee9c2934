"""Steps, polish and elimination of the pursuit on the GPU, one scene a program, which takes no step it does not need.

What a step is made of are functions of their own in the machine code too (noinline): one body in which the compiler
moves what is constant out of the loop runs out of registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_images import renew, shift
from .triton_solve import amplitudes, at_least, clamp, newton, noise_of
from .triton_state import (
    HIGH,
    LOW,
    SCALE,
    TRUST,
    UNKNOWNS,
    T,
    amplitudes_of,
    change_of,
    cost_of,
    curvature_of,
    fit_of,
    flags_at,
    gram_of,
    inverse_of,
    is_doubtful,
    live_of,
    log_det_of,
    offset_of,
    overlap_of,
    positions_of,
    state_at,
)

REBASE = tl.constexpr(0.05)  # these five of search.py
NOISE_REBASE = tl.constexpr(0.5)
POLISH = tl.constexpr(2)
DOUBT = tl.constexpr(1.5)
TINY_POWER = tl.constexpr(1e-12)


@triton.jit
def landing(state_ptr, task_ptr, slot, used, axis: tl.constexpr, A: tl.constexpr):
    """Along one axis: the offset that a step leads to, and its place in the box with the offset from the base there."""
    base = tl.load(state_ptr + 3 * slot + axis, mask=used, other=0.0)
    scale, most = tl.load(task_ptr + SCALE + axis), 2.0 * tl.load(task_ptr + TRUST + axis)
    move = clamp(tl.load(change_of(state_ptr, A) + UNKNOWNS * slot + 2 + axis, mask=used, other=0.0), -most, most)
    offset = tl.load(offset_of(state_ptr, A) + 3 * slot + axis, mask=used, other=0.0) + move
    target = base + tl.div_rn(offset, scale + 0.0 * offset)
    target = clamp(target, tl.load(task_ptr + LOW + axis), tl.load(task_ptr + HIGH + axis))
    return offset, target, (target - base) * scale


@triton.jit
def land(state_ptr, slot, used, far, target, offset, axis: tl.constexpr, A: tl.constexpr):
    """There, by a new base or by the offset."""
    tl.store(state_ptr + 3 * slot + axis, target, mask=used & far)
    tl.store(offset_of(state_ptr, A) + 3 * slot + axis, tl.where(far, 0.0, offset), mask=used)


@triton.jit
def store_fit(state_ptr, slot, used, s_re, s_im, u, v, w, A: tl.constexpr):
    """Coefficients of s (a + u t_u + v t_v + w t_w)."""
    at = fit_of(state_ptr, A) + slot * T
    tl.store(at, s_re, mask=used)
    tl.store(at + T * A, s_im, mask=used)
    for d in tl.static_range(1, 4):
        offset = u if d == 1 else (v if d == 2 else w)
        tl.store(at + d, s_re * offset, mask=used)
        tl.store(at + T * A + d, s_im * offset, mask=used)


@triton.jit
def atoms_of(state_ptr, flags_ptr, k, atoms, A: tl.constexpr):
    """Slots and amplitudes of atoms k."""
    slot = tl.load(live_of(flags_ptr, A) + k, mask=k < atoms, other=0)
    at = amplitudes_of(state_ptr, atoms, A) + slot
    return slot, tl.load(at, mask=k < atoms, other=0.0), tl.load(at + A, mask=k < atoms, other=0.0)


@triton.jit(noinline=True)
def move(state_ptr, flags_ptr, task_ptr, noise, atoms, A: tl.constexpr, ATOMS: tl.constexpr):
    """Takes the step: new amplitudes and offsets into `fit`, bases and offsets moved; returns how many atoms got a new
    base."""
    k = tl.arange(0, ATOMS)
    used = k < atoms
    slot, s_re, s_im = atoms_of(state_ptr, flags_ptr, k, atoms, A)
    at = change_of(state_ptr, A) + UNKNOWNS * slot
    to_re, to_im = s_re + tl.load(at, mask=used, other=0.0), s_im + tl.load(at + 1, mask=used, other=0.0)
    u, target_u, offset_u = landing(state_ptr, task_ptr, slot, used, 0, A)
    v, target_v, offset_v = landing(state_ptr, task_ptr, slot, used, 1, A)
    w, target_w, offset_w = landing(state_ptr, task_ptr, slot, used, 2, A)
    power = at_least(s_re * s_re + s_im * s_im, TINY_POWER)
    limit = at_least(tl.div_rn(NOISE_REBASE * noise + 0.0 * power, power), REBASE * REBASE)
    far = used & (offset_u * offset_u + offset_v * offset_v + offset_w * offset_w > limit)
    tl.debug_barrier()  # several threads may hold one lane: all have read before one writes
    store_fit(state_ptr, slot, used, to_re, to_im, u, v, w, A)
    land(state_ptr, slot, used, far, target_u, offset_u, 0, A)
    land(state_ptr, slot, used, far, target_v, offset_v, 1, A)
    land(state_ptr, slot, used, far, target_w, offset_w, 2, A)
    tl.store(flags_ptr + slot, 1, mask=far)
    tl.debug_barrier()
    return tl.sum(far.to(tl.int32), 0)


@triton.jit(noinline=True)
def record(state_ptr, flags_ptr, task_ptr, cost, log_det, atoms, A: tl.constexpr, ATOMS: tl.constexpr):
    """What an order is in the end; its coefficients into `fit`."""
    tl.store(cost_of(state_ptr, A) + atoms - 1, cost)
    tl.store(log_det_of(state_ptr, A) + atoms - 1, log_det)
    k = tl.arange(0, ATOMS)
    used = k < atoms
    slot, s_re, s_im = atoms_of(state_ptr, flags_ptr, k, atoms, A)
    at = offset_of(state_ptr, A) + 3 * slot
    u, v = tl.load(at, mask=used, other=0.0), tl.load(at + 1, mask=used, other=0.0)
    w = tl.load(at + 2, mask=used, other=0.0)
    for axis in tl.static_range(3):
        offset = u if axis == 0 else (v if axis == 1 else w)
        base = tl.load(state_ptr + 3 * slot + axis, mask=used, other=0.0)
        value = base + tl.div_rn(offset, tl.load(task_ptr + SCALE + axis) + 0.0 * offset)
        tl.store(positions_of(state_ptr, atoms, A) + 3 * slot + axis, value, mask=used)
    store_fit(state_ptr, slot, used, s_re, s_im, u, v, w, A)
    tl.debug_barrier()


@triton.jit(noinline=True)
def copy_gram(state_ptr, flags_ptr, atoms, A: tl.constexpr, SIZE: tl.constexpr):
    """What the features read of the shifted gram."""
    C: tl.constexpr = T * A
    c, k = tl.arange(0, SIZE), tl.arange(0, SIZE // T)
    gram_ptr, live_ptr = gram_of(state_ptr, A), live_of(flags_ptr, A)
    row = tl.load(live_ptr + c // T, mask=c < atoms * T, other=0) * T + c % T
    at = gram_ptr + row * (C + 1) + tl.where(c % T == 0, 2 * C * C, 0)
    tl.store(curvature_of(state_ptr, A) + row, tl.load(at, mask=c < atoms * T, other=0.0), mask=c < atoms * T)
    slot = tl.load(live_ptr + k, mask=k < atoms, other=0)
    both = (k < atoms)[:, None] & (k < atoms)[None, :]
    at = gram_ptr + 2 * C * C + slot[:, None] * (T * C) + slot[None, :] * T
    to = overlap_of(state_ptr, A) + slot[:, None] * A + slot[None, :]
    tl.store(to, tl.load(at, mask=both, other=0.0), mask=both)
    tl.store(to + A * A, tl.load(at + C * C, mask=both, other=0.0), mask=both)
    tl.debug_barrier()


@triton.jit(noinline=True)
def drop(state_ptr, flags_ptr, atoms, A: tl.constexpr, ATOMS: tl.constexpr):
    """Takes the atom away without which the cost rises least, |s_k|^2 over its entry in the inverse normal matrix: it
    goes behind the others in `live`."""
    k, live_ptr = tl.arange(0, ATOMS), live_of(flags_ptr, A)
    used = k < atoms
    slot, s_re, s_im = atoms_of(state_ptr, flags_ptr, k, atoms, A)
    rise = tl.div_rn(s_re * s_re + s_im * s_im, tl.load(inverse_of(state_ptr, A) + slot, mask=used, other=1.0))
    least = tl.min(tl.where(used, rise, float("inf")), 0)
    gone = tl.min(tl.where(used & (rise == least), k, atoms - 1), 0)
    after = tl.load(live_ptr + k + 1, mask=k + 1 < atoms, other=0)
    last = tl.sum(tl.where(k == gone, slot, 0), 0)
    tl.debug_barrier()
    tl.store(live_ptr + k, tl.where(k == atoms - 1, last, tl.where(k < gone, slot, after)), mask=used)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["atoms", "last", "steps", "retry"])
def step_kernel(
    state_ptr,
    flags_ptr,
    columns_ptr,
    image_ptr,
    normal_ptr,
    moment_ptr,
    snr_db_ptr,
    task_ptr,
    atoms,
    last,
    steps,
    retry,
    elements,
    energy,
    norm,
    wavenumber,
    STAGES: tl.constexpr,
    A: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A step of `atoms` atoms; where `last` is no larger, also the polish and record of that order and of each lower
    one down to `last`, each without the least missed atom of the one above. Grid (B,).

    steps: -1 where the first step is the forward one, which is not counted; POLISH where the first order is polished.
    retry: 1 for the doubtful scenes alone. SIZE: a power of two above 5 `atoms`; LANES and ROWS: elements
    at a time, along and down P.
    """
    scene = tl.program_id(0).to(tl.int64)
    more = (retry == 0) | is_doubtful(flags_ptr, scene, A)
    state_ptr, flags_ptr = state_at(state_ptr, scene, A), flags_at(flags_ptr, scene, A)
    columns_ptr += scene * (2 * T * A * elements)
    image_ptr += scene * (2 * T * A * elements)
    normal_ptr += scene * (2 * elements * elements)
    moment_ptr += scene * (2 * elements)
    noise, ridge = noise_of(snr_db_ptr, scene, energy)
    log_det = tl.load(log_det_of(state_ptr, A) + atoms - 1)
    while more:
        renew(
            state_ptr,
            flags_ptr,
            columns_ptr,
            image_ptr,
            normal_ptr,
            moment_ptr,
            task_ptr,
            atoms,
            elements,
            norm,
            wavenumber,
            A,
            SPHERICAL,
            LANES,
            ROWS,
        )
        shift(state_ptr, flags_ptr, atoms, A, SIZE)
        explained = amplitudes(state_ptr, flags_ptr, ridge, atoms, A, SIZE // 2)
        if steps < POLISH:
            log_det = newton(state_ptr, flags_ptr, task_ptr, ridge, noise, atoms, A, SIZE)
            far = move(state_ptr, flags_ptr, task_ptr, noise, atoms, A, SIZE // T)
            steps = tl.where((far > 0) | (steps < 0), steps + 1, POLISH)
        else:
            cost = energy - explained
            record(state_ptr, flags_ptr, task_ptr, cost, log_det, atoms, A, SIZE // T)
            if atoms == STAGES:
                expected = energy - 2.5 * STAGES + DOUBT * tl.sqrt_rn(energy + 0.0 * cost)
                tl.store(flags_ptr + 2 * A, (cost > noise * expected).to(tl.int32))
                copy_gram(state_ptr, flags_ptr, atoms, A, SIZE)
            if atoms > last:
                drop(state_ptr, flags_ptr, atoms, A, SIZE // T)
            atoms -= 1
            steps = 0
        more = atoms >= last
