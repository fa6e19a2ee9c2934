"""MUSIC and MVDR spectra of a covariance R = F F^H from its factor F: only Gram matrices, Q x Q, are decomposed.

Model: with the eigenvectors u_i and eigenvalues l_i of R, largest first, both spectra are one over
    n(a) = 1 - |B^H a|^2,   B = [sqrt(w_1) u_1, sqrt(w_2) u_2, ...],
MUSIC with w_i = 1 for i <= K and 0 beyond, MVDR with w_i = l_i / (l_i + eps), since Woodbury gives
    (F F^H + eps I)^-1 = (I - F (F^H F + eps I)^-1 F^H) / eps = (I - B B^H) / eps.
So everything that follows takes the basis B and need not know which it is.
Source: Schmidt, "Multiple emitter location and signal parameter estimation" (IEEE Trans. AP 34, 1986); Capon, "High-
resolution frequency-wavenumber spectrum analysis" (Proc. IEEE 57, 1969).

Legend: B batch, N RIS elements, Q factor columns, K sources.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task, section_of
from ris_fast.kernels.scale import rescaled
from ris_fast.physics.real_complex import to_pairs

MOST_COLUMNS = 32
RANK_FLOOR = 1e-12  # of the largest eigenvalue: a float32 factor's rounding leaves 1e-14
METHODS = ("music", "mvdr")
LOADING = 1e-2  # of the trace: above the eigenvalues of a network's own error, which would count as sources below it


class Decomposition(NamedTuple):
    """Factors of trace 1 with the eigenvectors of their Gram matrices, largest eigenvalue first, double precision."""

    factor: Tensor  # (B, N, Q) complex; zero where the given one was zero or not finite
    value: Tensor  # (B, Q)    eigenvalues of F^H F, the non-zero ones of R; their sum is 1
    vector: Tensor  # (B, Q, Q) complex, columns

    @property
    def rank(self) -> Tensor:
        """(B,) int64: eigenvalues that are not rounding."""
        return ((self.value > RANK_FLOOR * self.value[:, :1]) & (self.value > 0)).sum(1)


def check_factor(who: str, factor: Tensor, task: Task) -> Tensor:
    """The factors of scenes as real pairs (B, N, Q, 2); complex (B, N, Q) are taken too.

    Raises: TypeError or ValueError that names `who`, the shape and what to do.
    """
    section_of(who, "task", task, Task)
    if not isinstance(factor, Tensor):
        raise TypeError(f"{who}: factor is a {type(factor).__name__}, expected a tensor. Pass torch.as_tensor(factor).")
    pairs = to_pairs(factor)
    if pairs.dim() != 4 or pairs.shape[1] != task.elements or pairs.shape[3] != 2 or not pairs.shape[2]:
        raise ValueError(
            f"{who}: factor is {tuple(factor.shape)}, expected (B, {task.elements}, Q, 2), or complex without the last"
            f" axis, for the {task.elements} elements of the task. Pass the factor F of R = F F^H of this task."
        )
    if pairs.shape[2] > MOST_COLUMNS:
        raise ValueError(
            f"{who}: factor has {pairs.shape[2]} columns, expected at most {MOST_COLUMNS}. Pass its leading left"
            f" singular vectors times their singular values, at most {MOST_COLUMNS} of them."
        )
    return pairs


def decompose(factor: Tensor) -> Decomposition:
    """`Decomposition` of factors (B, N, Q, 2); a scene with a number that is not finite becomes zeros.

    Cost: 8 N Q^2 FLOPs and one Q x Q `eigh` a scene.
    """
    factor = factor.detach()
    finite = factor.isfinite().all(dim=3).all(dim=2).all(dim=1)
    pairs = rescaled(torch.where(finite[:, None, None, None], factor, 0.0).double().contiguous())
    size = pairs.square().sum((1, 2, 3), keepdim=True)
    pairs = torch.where(size > 0, pairs * size.rsqrt(), 0.0)
    columns = torch.view_as_complex(pairs)
    value, vector = torch.linalg.eigh(columns.mH @ columns)
    return Decomposition(columns, value.flip(-1).clamp_min(0.0), vector.flip(-1))


def signal_basis(
    parts: Decomposition, count: Tensor, most: int, method: str = "music", loading: float = LOADING
) -> Tensor:
    """The basis B of the file's model: (B, N, Q') complex128.

    Args: count (B,): K, which MUSIC needs; method: "music" or "mvdr"; loading: MVDR's eps, as a share of the trace.
    """
    if method not in METHODS:
        raise ValueError(f"signal_basis: method is {method!r}, expected one of {', '.join(METHODS)}.")
    if method == "mvdr":
        if not loading > 0:
            raise ValueError(
                f"signal_basis: loading is {loading}, expected a share of the trace above 0, such as 1e-2."
            )
        return parts.factor @ (parts.vector * (parts.value + loading).rsqrt()[:, None])
    kept = torch.arange(parts.value.shape[1], device=count.device) < torch.minimum(count, parts.rank)[:, None]
    weight = torch.where(kept, parts.value.clamp_min(1e-300).rsqrt(), 0.0)
    return parts.factor @ (parts.vector * weight[:, None])[..., :most]


def signal_factor(parts: Decomposition, count: Tensor, most: int) -> Tensor:
    """The nearest factor of rank `count` (B,), [sqrt(l_1) u_1, ... sqrt(l_K) u_K]: (B, N, most) complex128.

    Its columns carry the weights with which subspace fitting has least variance where noise is weak (Viberg and
    Ottersten 1991, W = (L - sigma^2 I)^2 / L): an eigenvector of little power holds the error of all others.
    """
    kept = torch.arange(parts.value.shape[1], device=count.device) < count[:, None]
    return parts.factor @ (parts.vector * kept[:, None])[..., :most]
