"""The search of the pursuit on the GPU: what the fit leaves of b, and the grid's position that best explains it.

By the factors of the grid where it has them (search_kernel), else by the dictionary: residual_kernel, a product of
torch, pick_kernel. The position found becomes the base of a new atom. retry: 1 for the doubtful scenes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_state import T, fit_of, flags_at, is_doubtful, live_of, offset_of, state_at

LANES = 1024  # scores that a pass takes
TILE = 16  # positions along u and v that a step of the search takes
WARPS = 4


@triton.jit
def residual_at(moment_ptr, image_ptr, state_ptr, scene, n, inside, atoms, elements, A: tl.constexpr):
    """b - P x of the last fit, of the first `atoms` atoms, at elements n of any shape."""
    at = moment_ptr + 2 * (scene * elements + n)
    re, im = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    image_ptr += scene * (2 * T * A * elements)
    fit_ptr = fit_of(state_at(state_ptr, scene, A), A)
    for c in range(atoms * T):
        x_re, x_im = tl.load(fit_ptr + c), tl.load(fit_ptr + T * A + c)
        i_re = tl.load(image_ptr + 2 * c * elements + n, mask=inside, other=0.0)
        i_im = tl.load(image_ptr + (2 * c + 1) * elements + n, mask=inside, other=0.0)
        re -= x_re * i_re - x_im * i_im
        im -= x_re * i_im + x_im * i_re
    return re, im


@triton.jit
def add_atom(state_ptr, flags_ptr, grid_ptr, scene, atom, found, A: tl.constexpr):
    """A new atom in the slot of its number, its base a position of the grid."""
    state_ptr, flags_ptr, axis = state_at(state_ptr, scene, A), flags_at(flags_ptr, scene, A), tl.arange(0, 4)
    base = tl.load(grid_ptr + 3 * found + axis, mask=axis < 3, other=0.0)
    tl.store(state_ptr + 3 * atom + axis, base, mask=axis < 3)
    tl.store(offset_of(state_ptr, A) + 3 * atom + axis, tl.zeros([4], tl.float32), mask=axis < 3)
    tl.store(flags_ptr + atom, 1)
    tl.store(live_of(flags_ptr, A) + atom, atom)


@triton.jit(do_not_specialize=["atom", "retry"])
def search_kernel(
    state_ptr,
    flags_ptr,
    moment_ptr,
    image_ptr,
    along_x_ptr,
    along_y_ptr,
    grid_ptr,
    atom,
    retry,
    wide,
    high,
    positions_u,
    positions_v,
    positions_w,
    A: tl.constexpr,
    WIDE: tl.constexpr,
    HIGH: tl.constexpr,
    TILE: tl.constexpr,
):
    """A new atom at the first position with the largest |a^H r|, r = b - P x of the `atom` atoms before it.

    a = along_x (W, X, U, 2) times along_y (W, Y, V, 2), so that r, a tile (Y, X), is correlated along x and then along
    y, for TILE values of u and of v at a time. NaN never is the largest. Grid (B,); WIDE >= X and HIGH >= Y.
    """
    scene, x, y, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE), tl.arange(0, HIGH), tl.arange(0, TILE)
    n, on_array = y[:, None] * wide + x[None, :], (y < high)[:, None] & (x < wide)[None, :]
    if (retry == 0) | (is_doubtful(flags_ptr, scene, A)):
        r_re, r_im = residual_at(moment_ptr, image_ptr, state_ptr, scene, n, on_array, atom, wide * high, A)
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
        found = tl.min(tl.min(tl.where(best == top, index, last), 1), 0)
        add_atom(state_ptr, flags_ptr, grid_ptr, scene, atom, found, A)


@triton.jit(do_not_specialize=["atoms", "retry"])
def residual_kernel(
    residual_ptr,
    moment_ptr,
    image_ptr,
    state_ptr,
    flags_ptr,
    atoms,
    retry,
    elements,
    A: tl.constexpr,
    LANES: tl.constexpr,
):
    """residual (B, N, 2) = b - P x of the fit x (B, 2, C); grid (B, blocks of LANES elements)."""
    scene, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * LANES + tl.arange(0, LANES)
    if (retry == 0) | (is_doubtful(flags_ptr, scene, A)):
        re, im = residual_at(moment_ptr, image_ptr, state_ptr, scene, n, n < elements, atoms, elements, A)
        at = residual_ptr + 2 * (scene * elements + n)
        tl.store(at, re, mask=n < elements)
        tl.store(at + 1, im, mask=n < elements)


@triton.jit(do_not_specialize=["atom", "retry"])
def pick_kernel(
    state_ptr,
    flags_ptr,
    scores_ptr,
    grid_ptr,
    atom,
    retry,
    positions,
    A: tl.constexpr,
    LANES: tl.constexpr,
):
    """A new atom at the first position of the largest score (B, 2G) = [real | imaginary]; NaN never is.

    Grid (B,).
    """
    scene, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    if (retry == 0) | (is_doubtful(flags_ptr, scene, A)):
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
        add_atom(state_ptr, flags_ptr, grid_ptr, scene, atom, found, A)


def add_by_factors(
    state: Tensor,
    flags: Tensor,
    moment: Tensor,
    image: Tensor,
    grid: Tensor,
    along_x: Tensor,
    along_y: Tensor,
    slots: int,
    atom: int,
    retry: int,
) -> None:
    """Adds an atom: one launch."""
    (depths, wide, places_u, _), (_, high, places_v, _) = along_x.shape, along_y.shape
    search_kernel[(len(state),)](
        state,
        flags,
        moment,
        image,
        along_x,
        along_y,
        grid,
        atom,
        retry,
        wide,
        high,
        places_u,
        places_v,
        depths,
        A=slots,
        WIDE=max(triton.next_power_of_2(wide), TILE),
        HIGH=max(triton.next_power_of_2(high), TILE),
        TILE=TILE,
        num_warps=2 * WARPS,  # with 4 registers run out
    )


def add_by_dictionary(
    state: Tensor,
    flags: Tensor,
    moment: Tensor,
    image: Tensor,
    grid: Tensor,
    dictionary: Tensor,
    slots: int,
    atom: int,
    retry: int,
) -> None:
    """Adds an atom: a product of torch, which takes every scene, between two launches."""
    (batch, elements, _), residual = moment.shape, moment
    if atom:
        residual, lanes = torch.empty_like(moment), min(LANES, triton.next_power_of_2(elements))
        residual_kernel[(batch, triton.cdiv(elements, lanes))](
            residual, moment, image, state, flags, atom, retry, elements, A=slots, LANES=lanes, num_warps=WARPS
        )
    scores = residual.flatten(1) @ dictionary
    pick_kernel[(batch,)](state, flags, scores, grid, atom, retry, len(grid), A=slots, LANES=LANES, num_warps=WARPS)
