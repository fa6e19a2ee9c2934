"""Images of atoms in the pursuit on the GPU: for each atom with a new base its tangents D, P D and the rows and columns
of D^H P D, and all of them shifted by the offsets of the atoms.

Layouts of a scene, A slots, C = T A columns (rows along the array, so that neighbouring lanes read neighbouring words):
columns, image (C, 2N)   row c: [Re | Im] of D_c and of P D_c
gram (2, 2, C, C), inner (2, 2, C) of triton_solve.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_solve import T
from .triton_wave import phase_slopes, unit

DEPTH = tl.constexpr(16)  # elements that an inner product takes at a time: the least that tl.dot takes
ROWS = tl.constexpr(4)  # rows of P that a step of P D takes


@triton.jit
def array_block(x_ptr, y_ptr, bend_ptr, n, elements):
    """x, y and curvature of the wavefront at elements n."""
    inside = n < elements
    x, y = tl.load(x_ptr + n, mask=inside, other=0.0), tl.load(y_ptr + n, mask=inside, other=0.0)
    return x, y, tl.load(bend_ptr + n, mask=inside, other=0.0)


@triton.jit
def store_column(column_ptr, moment_ptr, n, re, im, elements):
    """[re | im] of a block of elements into a row of `columns`; returns its product with b."""
    inside = n < elements
    tl.store(column_ptr + n, re, mask=inside)
    tl.store(column_ptr + elements + n, im, mask=inside)
    b_re = tl.load(moment_ptr + 2 * n, mask=inside, other=0.0)
    b_im = tl.load(moment_ptr + 2 * n + 1, mask=inside, other=0.0)
    return tl.sum(re * b_re + im * b_im, 0), tl.sum(re * b_im - im * b_re, 0)


@triton.jit
def tangents(
    columns_ptr,
    inner_ptr,
    base_ptr,
    moment_ptr,
    x_ptr,
    y_ptr,
    bend_ptr,
    scale_ptr,
    slot,
    elements,
    norm,
    wavenumber,
    COLUMNS: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
):
    """The T columns of the atom in a slot, and their products with b. norm = 1 / sqrt(N)."""
    u, v, w = tl.load(base_ptr + 3 * slot), tl.load(base_ptr + 3 * slot + 1), tl.load(base_ptr + 3 * slot + 2)
    lane, t = tl.arange(0, LANES), tl.arange(0, 4)
    mean_u, mean_v, mean_w = 0.0, 0.0, 0.0
    for start in range(0, elements, LANES):
        n = start + lane
        x, y, bend = array_block(x_ptr, y_ptr, bend_ptr, n, elements)
        _, along_u, along_v, along_w = phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)
        mean_u += tl.sum(tl.where(n < elements, along_u, 0.0), 0)
        mean_v += tl.sum(tl.where(n < elements, along_v, 0.0), 0)
        mean_w += tl.sum(tl.where(n < elements, along_w, 0.0), 0)
    inner_re, inner_im = tl.zeros([4], tl.float32), tl.zeros([4], tl.float32)
    column_ptr = columns_ptr + slot * (T * 2 * elements)
    for start in range(0, elements, LANES):
        n = start + lane
        x, y, bend = array_block(x_ptr, y_ptr, bend_ptr, n, elements)
        psi, along_u, along_v, along_w = phase_slopes(x, y, bend, u, v, w, wavenumber, SPHERICAL)
        a_re, a_im = unit(psi)
        a_re, a_im = a_re * norm, a_im * norm
        for part in tl.static_range(4):
            re, im = a_re, a_im
            if part > 0:
                slope = along_u if part == 1 else (along_v if part == 2 else along_w)
                mean = mean_u if part == 1 else (mean_v if part == 2 else mean_w)
                weight = tl.div_rn(slope - mean * (norm * norm), tl.load(scale_ptr + part - 1) + 0.0 * slope)
                re, im = -weight * a_im, weight * a_re
            here = column_ptr + part * (2 * elements)
            with_re, with_im = store_column(here, moment_ptr, n, re, im, elements)
            inner_re += tl.where(t == part, with_re, 0.0)
            inner_im += tl.where(t == part, with_im, 0.0)
    tl.store(inner_ptr + slot * T + t, inner_re)
    tl.store(inner_ptr + COLUMNS + slot * T + t, inner_im)


@triton.jit
def times(re, im, p_re, p_im, column_ptr, m, elements):
    """Adds (ROWS, LANES) entries of P times a column's entries m to re and im (LANES,)."""
    d_re = tl.load(column_ptr + m, mask=m < elements, other=0.0)[:, None]
    d_im = tl.load(column_ptr + elements + m, mask=m < elements, other=0.0)[:, None]
    return re + tl.sum(p_re * d_re - p_im * d_im, 0), im + tl.sum(p_re * d_im + p_im * d_re, 0)


@triton.jit
def store_image(image_ptr, n, re, im, elements):
    tl.store(image_ptr + n, re, mask=n < elements)
    tl.store(image_ptr + elements + n, im, mask=n < elements)


@triton.jit
def images(image_ptr, columns_ptr, normal_ptr, slot, elements, LANES: tl.constexpr):
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
        store_image(image_ptr, n, re0, im0, elements)
        store_image(image_ptr + step, n, re1, im1, elements)
        store_image(image_ptr + 2 * step, n, re2, im2, elements)
        store_image(image_ptr + 3 * step, n, re3, im3, elements)


@triton.jit
def products(
    gram_ptr,
    columns_ptr,
    image_ptr,
    live_ptr,
    slot,
    atoms,
    elements,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """D^H (P D_slot) of the columns of all atoms, into gram's columns of the slot and, conjugated, into its rows."""
    COLUMNS: tl.constexpr = T * SLOTS
    c, q, lane, step = tl.arange(0, SIZE), tl.arange(0, 2 * T), tl.arange(0, DEPTH), 2 * elements
    counted = c < atoms * T
    row = tl.load(live_ptr + c // T, mask=counted, other=0) * T + c % T
    right = slot * T + q % T  # lanes of real parts, then of imaginary parts
    out = tl.zeros([SIZE, 2 * T], tl.float32)
    for start in range(0, elements, DEPTH):
        n = start + lane
        at = columns_ptr + row[:, None] * step + n[None, :]
        inside = counted[:, None] & (n < elements)[None, :]
        d_re, d_im = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
        at = image_ptr + right[None, :] * step + n[:, None]
        inside = (n < elements)[:, None] & (q >= 0)[None, :]
        i_re, i_im = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
        real = (q < T)[None, :]
        out = tl.dot(d_re, tl.where(real, i_re, i_im), out, input_precision="ieee")
        out = tl.dot(d_im, tl.where(real, i_im, -i_re), out, input_precision="ieee")
    gram_ptr += tl.where(q < T, 0, COLUMNS * COLUMNS)[None, :]
    tl.store(gram_ptr + row[:, None] * COLUMNS + right[None, :], out, mask=counted[:, None] & (q >= 0)[None, :])
    mirrored = tl.where((q < T)[None, :], out, -out)
    itself = (row // T == slot)[:, None]
    at = gram_ptr + right[None, :] * COLUMNS + row[:, None]
    tl.store(at, mirrored, mask=counted[:, None] & (q >= 0)[None, :] & (itself == 0))


@triton.jit
def renewed(
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
    SLOTS: tl.constexpr,
    SPHERICAL: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Everything of the atoms whose flag in fresh (A,) says that their base is new."""
    for k in range(atoms):
        slot = tl.load(live_ptr + k)
        if tl.load(fresh_ptr + slot) != 0:
            tangents(
                columns_ptr,
                inner_ptr,
                base_ptr,
                moment_ptr,
                x_ptr,
                y_ptr,
                bend_ptr,
                scale_ptr,
                slot,
                elements,
                norm,
                wavenumber,
                T * SLOTS,
                SPHERICAL,
                LANES,
            )
            tl.debug_barrier()
            tl.store(fresh_ptr + slot, 0)
            images(image_ptr, columns_ptr, normal_ptr, slot, elements, LANES)
            tl.debug_barrier()
            products(gram_ptr, columns_ptr, image_ptr, live_ptr, slot, atoms, elements, SLOTS, SIZE)
    tl.debug_barrier()


@triton.jit
def shifted(
    gram_ptr,
    inner_ptr,
    offset_ptr,
    live_ptr,
    atoms,
    SLOTS: tl.constexpr,
    ATOMS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The second halves of gram and inner: a + sum_d offset_d t_d in the place of each atom's a."""
    COLUMNS: tl.constexpr = T * SLOTS
    PLANE: tl.constexpr = COLUMNS * COLUMNS
    c, k = tl.arange(0, SIZE), tl.arange(0, ATOMS)
    row = tl.load(live_ptr + c // T, mask=c < atoms * T, other=0) * T + c % T
    column = tl.load(live_ptr + k, mask=k < atoms, other=0) * T
    both = (c < atoms * T)[:, None] & (k < atoms)[None, :]
    at = gram_ptr + row[:, None] * COLUMNS + column[None, :]
    re, im = tl.load(at, mask=both, other=0.0), tl.load(at + PLANE, mask=both, other=0.0)
    m_re = tl.load(inner_ptr + column, mask=k < atoms, other=0.0)
    m_im = tl.load(inner_ptr + COLUMNS + column, mask=k < atoms, other=0.0)
    for d in tl.static_range(1, 4):
        offset = tl.load(offset_ptr + (column // T) * 3 + d - 1, mask=k < atoms, other=0.0)
        re += offset[None, :] * tl.load(at + d, mask=both, other=0.0)
        im += offset[None, :] * tl.load(at + PLANE + d, mask=both, other=0.0)
        m_re += offset * tl.load(inner_ptr + column + d, mask=k < atoms, other=0.0)
        m_im += offset * tl.load(inner_ptr + COLUMNS + column + d, mask=k < atoms, other=0.0)
    tl.store(inner_ptr + 2 * COLUMNS + column, m_re, mask=k < atoms)
    tl.store(inner_ptr + 3 * COLUMNS + column, m_im, mask=k < atoms)
    moved = gram_ptr + 2 * PLANE
    at = moved + row[:, None] * COLUMNS + column[None, :]
    tl.store(at, re, mask=both)
    tl.store(at + PLANE, im, mask=both)
    at = moved + column[None, :] * COLUMNS + row[:, None]
    both = both & (c % T > 0)[:, None]
    tl.store(at, re, mask=both)
    tl.store(at + PLANE, -im, mask=both)
    tl.debug_barrier()
    both = (k < atoms)[:, None] & (k < atoms)[None, :]
    at = moved + column[:, None] * COLUMNS + column[None, :]
    re, im = tl.load(at, mask=both, other=0.0), tl.load(at + PLANE, mask=both, other=0.0)
    for d in tl.static_range(1, 4):
        offset = tl.load(offset_ptr + (column // T) * 3 + d - 1, mask=k < atoms, other=0.0)[:, None]
        re += offset * tl.load(at + d * COLUMNS, mask=both, other=0.0)
        im += offset * tl.load(at + PLANE + d * COLUMNS, mask=both, other=0.0)
    tl.debug_barrier()
    tl.store(at, re, mask=both)
    tl.store(at + PLANE, im, mask=both)
    tl.debug_barrier()
