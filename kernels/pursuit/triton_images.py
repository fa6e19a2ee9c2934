"""Images of atoms in the pursuit on the GPU: for each atom with a new base its tangents D, P D and the rows and columns
of D^H P D, and all of them shifted by the offsets of the atoms.

columns, image (B, C, 2N): row c is [Re | Im] of D_c and of P D_c, so that neighbouring lanes read neighbouring words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_state import SCALE, T, array_at, gram_of, inner_of, live_of, offset_of
from .triton_wave import phase_slopes, unit

DEPTH = tl.constexpr(16)  # elements that an inner product takes at a time: the least that tl.dot takes
SIDE = tl.constexpr(16)  # columns of D that it takes


@triton.jit
def slopes_at(task_ptr, n, elements, u, v, w, wavenumber, SPHERICAL: tl.constexpr):
    """psi and its slopes at elements n."""
    x, y, bend = array_at(task_ptr, n, elements)
    return phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)


@triton.jit
def store_pair(row_ptr, n, re, im, elements):
    """[re | im] of elements n into a row."""
    tl.store(row_ptr + n, re, mask=n < elements)
    tl.store(row_ptr + elements + n, im, mask=n < elements)


@triton.jit(noinline=True)
def tangents(
    columns_ptr,
    state_ptr,
    moment_ptr,
    task_ptr,
    slot,
    elements,
    norm,
    wavenumber,
    A: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
):
    """The T columns of the atom in a slot, and their products with b. norm = 1 / sqrt(N)."""
    base_ptr, inner_ptr = state_ptr + 3 * slot, inner_of(state_ptr, A) + slot * T
    u, v, w = tl.load(base_ptr), tl.load(base_ptr + 1), tl.load(base_ptr + 2)
    lane, t = tl.arange(0, LANES), tl.arange(0, 4)
    mean_u, mean_v, mean_w = 0.0, 0.0, 0.0
    for start in range(0, elements, LANES):
        inside = start + lane < elements
        _, along_u, along_v, along_w = slopes_at(task_ptr, start + lane, elements, u, v, w, wavenumber, SPHERICAL)
        mean_u += tl.sum(tl.where(inside, along_u, 0.0), 0)
        mean_v += tl.sum(tl.where(inside, along_v, 0.0), 0)
        mean_w += tl.sum(tl.where(inside, along_w, 0.0), 0)
    inner_re, inner_im = tl.zeros([4], tl.float32), tl.zeros([4], tl.float32)
    for start in range(0, elements, LANES):
        n = start + lane
        psi, along_u, along_v, along_w = slopes_at(task_ptr, n, elements, u, v, w, wavenumber, SPHERICAL)
        b_re = tl.load(moment_ptr + 2 * n, mask=n < elements, other=0.0)
        b_im = tl.load(moment_ptr + 2 * n + 1, mask=n < elements, other=0.0)
        a_re, a_im = unit(psi)
        a_re, a_im = a_re * norm, a_im * norm
        for part in tl.static_range(4):
            re, im = a_re, a_im
            if part > 0:
                slope = along_u if part == 1 else (along_v if part == 2 else along_w)
                mean = mean_u if part == 1 else (mean_v if part == 2 else mean_w)
                scale = tl.load(task_ptr + SCALE + part - 1)
                weight = tl.div_rn(slope - mean * (norm * norm), scale + 0.0 * slope)
                re, im = -weight * a_im, weight * a_re
            store_pair(columns_ptr + (slot * T + part) * (2 * elements), n, re, im, elements)
            inner_re += tl.where(t == part, tl.sum(re * b_re + im * b_im, 0), 0.0)
            inner_im += tl.where(t == part, tl.sum(re * b_im - im * b_re, 0), 0.0)
    tl.store(inner_ptr + t, inner_re)
    tl.store(inner_ptr + T * A + t, inner_im)
    tl.debug_barrier()


@triton.jit
def times(re, im, p_re, p_im, column_ptr, m, elements):
    """Adds (ROWS, LANES) entries of P times a column's entries m to re and im (LANES,)."""
    d_re = tl.load(column_ptr + m, mask=m < elements, other=0.0)[:, None]
    d_im = tl.load(column_ptr + elements + m, mask=m < elements, other=0.0)[:, None]
    return re + tl.sum(p_re * d_re - p_im * d_im, 0), im + tl.sum(p_re * d_im + p_im * d_re, 0)


@triton.jit(noinline=True)
def images(image_ptr, columns_ptr, normal_ptr, slot, elements, LANES: tl.constexpr, ROWS: tl.constexpr):
    """P D of the T columns of a slot. P is Hermitian: a lane an element n, down the rows m of conj P(m, n)."""
    lane, row, step = tl.arange(0, LANES), tl.arange(0, ROWS), 2 * elements
    column_ptr = columns_ptr + slot * (T * step)
    image_ptr += slot * (T * step)
    for start in range(0, elements, LANES):
        n = start + lane
        re0, im0 = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        re1, im1 = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        re2, im2 = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        re3, im3 = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        for first in range(0, elements, ROWS):
            m = first + row
            at = normal_ptr + m[:, None] * step + n[None, :]
            inside = (m < elements)[:, None] & (n < elements)[None, :]
            p_re, p_im = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
            re0, im0 = times(re0, im0, p_re, p_im, column_ptr, m, elements)
            re1, im1 = times(re1, im1, p_re, p_im, column_ptr + step, m, elements)
            re2, im2 = times(re2, im2, p_re, p_im, column_ptr + 2 * step, m, elements)
            re3, im3 = times(re3, im3, p_re, p_im, column_ptr + 3 * step, m, elements)
        store_pair(image_ptr, n, re0, im0, elements)
        store_pair(image_ptr + step, n, re1, im1, elements)
        store_pair(image_ptr + 2 * step, n, re2, im2, elements)
        store_pair(image_ptr + 3 * step, n, re3, im3, elements)
    tl.debug_barrier()


@triton.jit(noinline=True)
def products(state_ptr, flags_ptr, columns_ptr, image_ptr, slot, atoms, elements, A: tl.constexpr):
    """D^H (P D_slot) of the columns of all atoms, into gram's columns of the slot and, conjugated, into its rows."""
    C: tl.constexpr = T * A
    c, q, lane, step = tl.arange(0, SIDE), tl.arange(0, 2 * T), tl.arange(0, DEPTH), 2 * elements
    right, real = slot * T + q % T, (q < T)[None, :]  # lanes of real parts, then of imaginary parts
    gram_ptr = gram_of(state_ptr, A) + tl.where(real, 0, C * C)
    for first in range(0, atoms * T, SIDE):
        counted = first + c < atoms * T
        row = tl.load(live_of(flags_ptr, A) + (first + c) // T, mask=counted, other=0) * T + c % T
        out = tl.zeros([SIDE, 2 * T], tl.float32)
        for start in range(0, elements, DEPTH):
            n = start + lane
            at = columns_ptr + row[:, None] * step + n[None, :]
            inside = counted[:, None] & (n < elements)[None, :]
            d_re, d_im = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
            at = image_ptr + right[None, :] * step + n[:, None]
            inside = (n < elements)[:, None] & (q >= 0)[None, :]
            i_re, i_im = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
            out = tl.dot(d_re, tl.where(real, i_re, i_im), out, input_precision="ieee")
            out = tl.dot(d_im, tl.where(real, i_im, -i_re), out, input_precision="ieee")
        inside = counted[:, None] & (q >= 0)[None, :]
        tl.store(gram_ptr + row[:, None] * C + right[None, :], out, mask=inside)
        inside = inside & (row // T != slot)[:, None]
        tl.store(gram_ptr + right[None, :] * C + row[:, None], tl.where(real, out, -out), mask=inside)
    tl.debug_barrier()


@triton.jit
def renew(
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
    A: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Everything of the atoms whose flag says that their base is new: the tangents of all, then what they give."""
    for k in range(atoms):
        slot = tl.load(live_of(flags_ptr, A) + k)
        if tl.load(flags_ptr + slot) != 0:
            tangents(
                columns_ptr, state_ptr, moment_ptr, task_ptr, slot, elements, norm, wavenumber, A, SPHERICAL, LANES
            )
    for k in range(atoms):
        slot = tl.load(live_of(flags_ptr, A) + k)
        if tl.load(flags_ptr + slot) != 0:
            images(image_ptr, columns_ptr, normal_ptr, slot, elements, LANES, ROWS)
            tl.store(flags_ptr + slot, 0)
            products(state_ptr, flags_ptr, columns_ptr, image_ptr, slot, atoms, elements, A)


@triton.jit(noinline=True)
def shift(state_ptr, flags_ptr, atoms, A: tl.constexpr, SIZE: tl.constexpr):
    """The second halves of gram and inner: a + sum_d offset_d t_d in the place of each atom's a."""
    C: tl.constexpr = T * A
    PLANE: tl.constexpr = C * C
    gram_ptr, inner_ptr, live_ptr = gram_of(state_ptr, A), inner_of(state_ptr, A), live_of(flags_ptr, A)
    c, k = tl.arange(0, SIZE), tl.arange(0, SIZE // T)
    slot = tl.load(live_ptr + k, mask=k < atoms, other=0)
    row, column = tl.load(live_ptr + c // T, mask=c < atoms * T, other=0) * T + c % T, slot * T
    offset_ptr = offset_of(state_ptr, A) + 3 * slot - 1
    both = (c < atoms * T)[:, None] & (k < atoms)[None, :]
    at = gram_ptr + row[:, None] * C + column[None, :]
    re, im = tl.load(at, mask=both, other=0.0), tl.load(at + PLANE, mask=both, other=0.0)
    m_re = tl.load(inner_ptr + column, mask=k < atoms, other=0.0)
    m_im = tl.load(inner_ptr + C + column, mask=k < atoms, other=0.0)
    for d in tl.static_range(1, 4):
        offset = tl.load(offset_ptr + d, mask=k < atoms, other=0.0)
        re += offset[None, :] * tl.load(at + d, mask=both, other=0.0)
        im += offset[None, :] * tl.load(at + PLANE + d, mask=both, other=0.0)
        m_re += offset * tl.load(inner_ptr + column + d, mask=k < atoms, other=0.0)
        m_im += offset * tl.load(inner_ptr + C + column + d, mask=k < atoms, other=0.0)
    tl.store(inner_ptr + 2 * C + column, m_re, mask=k < atoms)
    tl.store(inner_ptr + 3 * C + column, m_im, mask=k < atoms)
    moved = gram_ptr + 2 * PLANE
    at = moved + row[:, None] * C + column[None, :]
    tl.store(at, re, mask=both)
    tl.store(at + PLANE, im, mask=both)
    at = moved + column[None, :] * C + row[:, None]
    both = both & (c % T > 0)[:, None]
    tl.store(at, re, mask=both)
    tl.store(at + PLANE, -im, mask=both)
    tl.debug_barrier()
    both = (k < atoms)[:, None] & (k < atoms)[None, :]
    at = moved + column[:, None] * C + column[None, :]
    re, im = tl.load(at, mask=both, other=0.0), tl.load(at + PLANE, mask=both, other=0.0)
    for d in tl.static_range(1, 4):
        offset = tl.load(offset_ptr + d, mask=k < atoms, other=0.0)[:, None]
        re += offset * tl.load(at + d * C, mask=both, other=0.0)
        im += offset * tl.load(at + PLANE + d * C, mask=both, other=0.0)
    tl.debug_barrier()
    tl.store(at, re, mask=both)
    tl.store(at + PLANE, im, mask=both)
    tl.debug_barrier()
