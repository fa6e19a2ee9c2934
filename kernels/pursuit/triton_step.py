"""Steps, polish and elimination of the pursuit on the GPU, one scene a program, which takes no step it does not need.

State of a scene, A = K + EXTRA slots (all (B, ...)):
base, offset (A, 3)                  where the tangents are, and from there, times scale
fresh (A)                            1 where the base is new and nothing of the atom is formed yet
live (A)                             slots in use, in the order of the atoms; those taken away stand behind, the last
                                     to go first, so that in the end it is the order of the answer
fit (2, C)                           coefficients of the columns, for the residual of the next search
change (A, 5), inverse (A)           scratch
doubtful ()                          1 where the fit of K atoms leaves more than noise
Of each order, at its number of atoms less 1:
positions (A, A, 3), amplitudes (A, 2, A)   by slot
cost, log_det (A)
Of order K, shifted, by slot:
curvature (C)                        diagonal of the gram
overlap (2, A, A)                    between the steering vectors
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_images import renewed, shifted
from .triton_solve import UNKNOWNS, T, amplitudes, at_least, clamp, newton, noise_of

REBASE = tl.constexpr(0.05)  # these five of search.py
NOISE_REBASE = tl.constexpr(0.5)
POLISH = tl.constexpr(2)
DOUBT = tl.constexpr(1.5)
TINY_POWER = tl.constexpr(1e-12)


@triton.jit
def landing(base_ptr, offset_ptr, change_ptr, scale_ptr, low_ptr, high_ptr, trust_ptr, slot, used, axis: tl.constexpr):
    """Along one axis: the offset that a step leads to, and its place in the box with the offset from the base there."""
    base = tl.load(base_ptr + 3 * slot + axis, mask=used, other=0.0)
    scale, most = tl.load(scale_ptr + axis), 2.0 * tl.load(trust_ptr + axis)
    move = clamp(tl.load(change_ptr + UNKNOWNS * slot + 2 + axis, mask=used, other=0.0), -most, most)
    offset = tl.load(offset_ptr + 3 * slot + axis, mask=used, other=0.0) + move
    target = clamp(base + tl.div_rn(offset, scale + 0.0 * offset), tl.load(low_ptr + axis), tl.load(high_ptr + axis))
    return offset, target, (target - base) * scale


@triton.jit
def land(base_ptr, offset_ptr, slot, used, far, target, offset, axis: tl.constexpr):
    tl.store(base_ptr + 3 * slot + axis, target, mask=used & far)
    tl.store(offset_ptr + 3 * slot + axis, tl.where(far, 0.0, offset), mask=used)


@triton.jit
def store_fit(fit_ptr, slot, used, s_re, s_im, u, v, w, COLUMNS: tl.constexpr):
    """Coefficients of s (a + u t_u + v t_v + w t_w)."""
    at = fit_ptr + slot * T
    tl.store(at, s_re, mask=used)
    tl.store(at + COLUMNS, s_im, mask=used)
    for d in tl.static_range(1, 4):
        offset = u if d == 1 else (v if d == 2 else w)
        tl.store(at + d, s_re * offset, mask=used)
        tl.store(at + COLUMNS + d, s_im * offset, mask=used)


@triton.jit
def move(
    base_ptr,
    offset_ptr,
    fresh_ptr,
    fit_ptr,
    change_ptr,
    amplitude_ptr,
    live_ptr,
    scale_ptr,
    low_ptr,
    high_ptr,
    trust_ptr,
    noise,
    atoms,
    SLOTS: tl.constexpr,
    ATOMS: tl.constexpr,
):
    """Takes the step: new amplitudes and offsets into `fit`, bases and offsets moved; returns how many atoms got a new
    base."""
    k = tl.arange(0, ATOMS)
    used = k < atoms
    slot = tl.load(live_ptr + k, mask=used, other=0)
    s_re = tl.load(amplitude_ptr + slot, mask=used, other=0.0)
    s_im = tl.load(amplitude_ptr + SLOTS + slot, mask=used, other=0.0)
    change = change_ptr + UNKNOWNS * slot
    to_re, to_im = s_re + tl.load(change, mask=used, other=0.0), s_im + tl.load(change + 1, mask=used, other=0.0)
    u, target_u, offset_u = landing(
        base_ptr, offset_ptr, change_ptr, scale_ptr, low_ptr, high_ptr, trust_ptr, slot, used, 0
    )
    v, target_v, offset_v = landing(
        base_ptr, offset_ptr, change_ptr, scale_ptr, low_ptr, high_ptr, trust_ptr, slot, used, 1
    )
    w, target_w, offset_w = landing(
        base_ptr, offset_ptr, change_ptr, scale_ptr, low_ptr, high_ptr, trust_ptr, slot, used, 2
    )
    power = at_least(s_re * s_re + s_im * s_im, TINY_POWER)
    limit = at_least(tl.div_rn(NOISE_REBASE * noise + 0.0 * power, power), REBASE * REBASE)
    far = used & (offset_u * offset_u + offset_v * offset_v + offset_w * offset_w > limit)
    tl.debug_barrier()  # several threads may hold one lane: all have read before one writes
    store_fit(fit_ptr, slot, used, to_re, to_im, u, v, w, T * SLOTS)
    land(base_ptr, offset_ptr, slot, used, far, target_u, offset_u, 0)
    land(base_ptr, offset_ptr, slot, used, far, target_v, offset_v, 1)
    land(base_ptr, offset_ptr, slot, used, far, target_w, offset_w, 2)
    tl.store(fresh_ptr + slot, 1, mask=far)
    return tl.sum(far.to(tl.int32), 0)


@triton.jit
def record(
    positions_ptr,
    fit_ptr,
    base_ptr,
    offset_ptr,
    amplitude_ptr,
    live_ptr,
    scale_ptr,
    atoms,
    SLOTS: tl.constexpr,
    ATOMS: tl.constexpr,
):
    """Positions of an order into positions (A, 3), its coefficients into `fit`."""
    k = tl.arange(0, ATOMS)
    used = k < atoms
    slot = tl.load(live_ptr + k, mask=used, other=0)
    at = offset_ptr + 3 * slot
    u, v = tl.load(at, mask=used, other=0.0), tl.load(at + 1, mask=used, other=0.0)
    w = tl.load(at + 2, mask=used, other=0.0)
    for axis in tl.static_range(3):
        offset = u if axis == 0 else (v if axis == 1 else w)
        base = tl.load(base_ptr + 3 * slot + axis, mask=used, other=0.0)
        value = base + tl.div_rn(offset, tl.load(scale_ptr + axis) + 0.0 * offset)
        tl.store(positions_ptr + 3 * slot + axis, value, mask=used)
    s_re = tl.load(amplitude_ptr + slot, mask=used, other=0.0)
    s_im = tl.load(amplitude_ptr + SLOTS + slot, mask=used, other=0.0)
    store_fit(fit_ptr, slot, used, s_re, s_im, u, v, w, T * SLOTS)


@triton.jit
def drop(live_ptr, amplitude_ptr, inverse_ptr, atoms, SLOTS: tl.constexpr, ATOMS: tl.constexpr):
    """Takes the atom away without which the cost rises least, |s_k|^2 over its entry in the inverse normal matrix: it
    goes behind the others in `live`."""
    k = tl.arange(0, ATOMS)
    used = k < atoms
    slot = tl.load(live_ptr + k, mask=used, other=0)
    s_re = tl.load(amplitude_ptr + slot, mask=used, other=0.0)
    s_im = tl.load(amplitude_ptr + SLOTS + slot, mask=used, other=0.0)
    rise = tl.div_rn(s_re * s_re + s_im * s_im, tl.load(inverse_ptr + slot, mask=used, other=1.0))
    least = tl.min(tl.where(used, rise, float("inf")), 0)
    gone = tl.min(tl.where(used & (rise == least), k, atoms - 1), 0)
    after = tl.load(live_ptr + k + 1, mask=k + 1 < atoms, other=0)
    last = tl.sum(tl.where(k == gone, slot, 0), 0)
    tl.debug_barrier()
    tl.store(live_ptr + k, tl.where(k == atoms - 1, last, tl.where(k < gone, slot, after)), mask=used)


@triton.jit
def copy_gram(
    curvature_ptr, overlap_ptr, gram_ptr, live_ptr, atoms, SLOTS: tl.constexpr, ATOMS: tl.constexpr, SIZE: tl.constexpr
):
    """What the features read of the shifted gram."""
    COLUMNS: tl.constexpr = T * SLOTS
    PLANE: tl.constexpr = COLUMNS * COLUMNS
    c, k = tl.arange(0, SIZE), tl.arange(0, ATOMS)
    row = tl.load(live_ptr + c // T, mask=c < atoms * T, other=0) * T + c % T
    at = gram_ptr + row * (COLUMNS + 1) + tl.where(c % T == 0, 2 * PLANE, 0)
    tl.store(curvature_ptr + row, tl.load(at, mask=c < atoms * T, other=0.0), mask=c < atoms * T)
    slot = tl.load(live_ptr + k, mask=k < atoms, other=0)
    both = (k < atoms)[:, None] & (k < atoms)[None, :]
    at = gram_ptr + 2 * PLANE + slot[:, None] * (T * COLUMNS) + slot[None, :] * T
    to = overlap_ptr + slot[:, None] * SLOTS + slot[None, :]
    tl.store(to, tl.load(at, mask=both, other=0.0), mask=both)
    tl.store(to + SLOTS * SLOTS, tl.load(at + PLANE, mask=both, other=0.0), mask=both)


@triton.jit(do_not_specialize=["atoms", "last", "steps", "retry"])
def step_kernel(
    base_ptr,
    offset_ptr,
    fresh_ptr,
    live_ptr,
    fit_ptr,
    change_ptr,
    inverse_ptr,
    positions_ptr,
    amplitudes_ptr,
    cost_ptr,
    log_det_ptr,
    curvature_ptr,
    overlap_ptr,
    doubtful_ptr,
    columns_ptr,
    image_ptr,
    gram_ptr,
    inner_ptr,
    normal_ptr,
    moment_ptr,
    snr_db_ptr,
    x_ptr,
    y_ptr,
    bend_ptr,
    scale_ptr,
    low_ptr,
    high_ptr,
    trust_ptr,
    atoms,
    last,
    steps,
    retry,
    elements,
    energy,
    norm,
    wavenumber,
    STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A step of `atoms` atoms; where `last` is no larger, also the polish of that order and its record, and the same for
    each lower order down to `last`, without the least missed atom of the one above. Grid (B,).

    steps: -1 where the first step is the forward one, which is not counted; POLISH where the first order is polished.
    retry: 1 for the doubtful scenes alone. SIZE: a power of two above 5 `atoms`; LANES: elements at a time.
    """
    COLUMNS: tl.constexpr = T * SLOTS
    ATOMS: tl.constexpr = SIZE // T  # then SIZE is enough for the columns too
    scene = tl.program_id(0).to(tl.int64)
    more = (retry == 0) | (tl.load(doubtful_ptr + scene) != 0)
    base_ptr += scene * (3 * SLOTS)
    offset_ptr += scene * (3 * SLOTS)
    fresh_ptr += scene * SLOTS
    live_ptr += scene * SLOTS
    fit_ptr += scene * (2 * COLUMNS)
    change_ptr += scene * (UNKNOWNS * SLOTS)
    inverse_ptr += scene * SLOTS
    positions_ptr += scene * (3 * SLOTS * SLOTS)
    amplitudes_ptr += scene * (2 * SLOTS * SLOTS)
    cost_ptr += scene * SLOTS
    log_det_ptr += scene * SLOTS
    columns_ptr += scene * (2 * COLUMNS * elements)
    image_ptr += scene * (2 * COLUMNS * elements)
    gram_ptr += scene * (4 * COLUMNS * COLUMNS)
    inner_ptr += scene * (4 * COLUMNS)
    normal_ptr += scene * (2 * elements * elements)
    moment_ptr += scene * (2 * elements)
    noise, ridge = noise_of(snr_db_ptr, scene, energy)
    log_det = tl.load(log_det_ptr + atoms - 1)
    while more:
        amplitude_ptr = amplitudes_ptr + (atoms - 1) * (2 * SLOTS)
        renewed(
            fresh_ptr,
            columns_ptr,
            image_ptr,
            gram_ptr,
            inner_ptr,
            base_ptr,
            live_ptr,
            normal_ptr,
            moment_ptr,
            x_ptr,
            y_ptr,
            bend_ptr,
            scale_ptr,
            atoms,
            elements,
            norm,
            wavenumber,
            SLOTS,
            SPHERICAL,
            LANES,
            SIZE,
        )
        shifted(gram_ptr, inner_ptr, offset_ptr, live_ptr, atoms, SLOTS, ATOMS, SIZE)
        explained = amplitudes(
            amplitude_ptr, inverse_ptr, gram_ptr, inner_ptr, live_ptr, ridge, atoms, SLOTS, SIZE // 2
        )
        tl.debug_barrier()
        if steps < POLISH:
            log_det = newton(
                change_ptr,
                amplitude_ptr,
                gram_ptr,
                inner_ptr,
                live_ptr,
                trust_ptr,
                ridge,
                noise,
                atoms,
                SLOTS,
                ATOMS,
                SIZE,
            )
            tl.debug_barrier()
            far = move(
                base_ptr,
                offset_ptr,
                fresh_ptr,
                fit_ptr,
                change_ptr,
                amplitude_ptr,
                live_ptr,
                scale_ptr,
                low_ptr,
                high_ptr,
                trust_ptr,
                noise,
                atoms,
                SLOTS,
                ATOMS,
            )
            steps = tl.where((far > 0) | (steps < 0), steps + 1, POLISH)
        else:
            cost = energy - explained
            tl.store(cost_ptr + atoms - 1, cost)
            tl.store(log_det_ptr + atoms - 1, log_det)
            record(
                positions_ptr + (atoms - 1) * (3 * SLOTS),
                fit_ptr,
                base_ptr,
                offset_ptr,
                amplitude_ptr,
                live_ptr,
                scale_ptr,
                atoms,
                SLOTS,
                ATOMS,
            )
            if atoms == STAGES:
                expected = energy - 2.5 * STAGES + DOUBT * tl.sqrt_rn(energy + 0.0 * cost)
                tl.store(doubtful_ptr + scene, (cost > noise * expected).to(tl.int32))
                overlaps = overlap_ptr + scene * (2 * SLOTS * SLOTS)
                copy_gram(curvature_ptr + scene * COLUMNS, overlaps, gram_ptr, live_ptr, atoms, SLOTS, ATOMS, SIZE)
            if atoms > last:
                drop(live_ptr, amplitude_ptr, inverse_ptr, atoms, SLOTS, ATOMS)
            atoms -= 1
            steps = 0
        more = atoms >= last
        tl.debug_barrier()
