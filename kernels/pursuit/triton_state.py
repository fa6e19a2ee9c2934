"""Where the pursuit on the GPU keeps what it knows of a scene.

Atoms sit in A = K + EXTRA slots and stay there. T = 4 columns an atom, C = T A.

flags, int32 (B, 2A + 1)
    fresh (A)              1 where the base is new and nothing of the atom is formed yet
    live (A)               slots in use, in the order of the atoms; those taken away stand behind, the last to go first,
                           so that in the end it is the order of the answer
    doubtful               1 where the fit of K atoms leaves more than noise
state, float32 (B, 42 A + 71 A^2)
    base, offset (A, 3)    where the tangents are, and from there, times scale
    change (A, 5)          of a Gauss-Newton step: re s, im s, u, v, w
    inverse (A)            diagonal of the inverse normal matrix of the amplitudes
    fit (2, C)             coefficients of the columns, for the residual of the next search
    curvature (C)          diagonal of the shifted gram of K atoms
    cost, log_det (A)      of each order, at its number of atoms less 1
    inner (2, 2, C)        D^H b: at the bases, then shifted; of each the real and the imaginary part
    positions (A, A, 3)    of each order, by slot
    amplitudes (A, 2, A)   likewise
    overlap (2, A, A)      of the shifted steering vectors of K atoms
    gram (2, 2, C, C)      D^H P D, as inner; of the shifted one only the rows and columns of the steering vectors are
                           filled, the others are the same
task, float32 (12 + 3N): scale, low, high, trust (3 each), x, y, curvature (N each)
"""

from __future__ import annotations

import triton
import triton.language as tl

T = tl.constexpr(4)  # columns of an atom: itself and its derivatives along u, v and w
UNKNOWNS = tl.constexpr(5)  # of an atom: two of its amplitude, three of its position
SCALE, LOW, HIGH, TRUST, ARRAY = (tl.constexpr(3 * part) for part in range(5))  # in `task`


def state_size(slots: int) -> int:
    """Floats of a scene."""
    return 42 * slots + 71 * slots**2


@triton.jit
def live_of(flags_ptr, A: tl.constexpr):
    return flags_ptr + A


@triton.jit
def is_doubtful(flags_ptr, scene, A: tl.constexpr):
    return tl.load(flags_ptr + scene * (2 * A + 1) + 2 * A) != 0


@triton.jit
def flags_at(flags_ptr, scene, A: tl.constexpr):
    return flags_ptr + scene * (2 * A + 1)


@triton.jit
def state_at(state_ptr, scene, A: tl.constexpr):
    return state_ptr + scene * (42 * A + 71 * A * A)


@triton.jit
def offset_of(state_ptr, A: tl.constexpr):
    return state_ptr + 3 * A


@triton.jit
def change_of(state_ptr, A: tl.constexpr):
    return state_ptr + 6 * A


@triton.jit
def inverse_of(state_ptr, A: tl.constexpr):
    return state_ptr + 11 * A


@triton.jit
def fit_of(state_ptr, A: tl.constexpr):
    return state_ptr + 12 * A


@triton.jit
def curvature_of(state_ptr, A: tl.constexpr):
    return state_ptr + 20 * A


@triton.jit
def cost_of(state_ptr, A: tl.constexpr):
    return state_ptr + 24 * A


@triton.jit
def log_det_of(state_ptr, A: tl.constexpr):
    return state_ptr + 25 * A


@triton.jit
def inner_of(state_ptr, A: tl.constexpr):
    return state_ptr + 26 * A


@triton.jit
def positions_of(state_ptr, order, A: tl.constexpr):
    return state_ptr + 42 * A + (order - 1) * (3 * A)


@triton.jit
def amplitudes_of(state_ptr, order, A: tl.constexpr):
    return state_ptr + 42 * A + 3 * A * A + (order - 1) * (2 * A)


@triton.jit
def overlap_of(state_ptr, A: tl.constexpr):
    return state_ptr + 42 * A + 5 * A * A


@triton.jit
def gram_of(state_ptr, A: tl.constexpr):
    return state_ptr + 42 * A + 7 * A * A


@triton.jit
def array_at(task_ptr, n, elements):
    """x, y and curvature of elements n of any shape."""
    at, inside = task_ptr + ARRAY + n, n < elements
    x, y = tl.load(at, mask=inside, other=0.0), tl.load(at + elements, mask=inside, other=0.0)
    return x, y, tl.load(at + 2 * elements, mask=inside, other=0.0)
