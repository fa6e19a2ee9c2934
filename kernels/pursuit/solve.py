"""Small symmetric positive definite systems for a whole batch at once, in plain tensor operations.

LAPACK and cuSOLVER take small systems one by one; here every operation runs over the batch, which is the last axis,
so that the same few lines serve a CPU, a GPU and a captured graph.

Legend: B batch, n unknowns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spd_solve(matrix_nnB: Tensor, rhs_nB: Tensor, ridge_nB: Tensor) -> Tensor:
    """Solves (A + diag(ridge)) x = r for every scene: (n, n, B), (n, B) or (n, R, B), (n, B) -> the shape of r.

    Numerics: elimination without pivoting, stable for symmetric positive definite A; a pivot below 1e-6 of its
        diagonal entry is raised to that, so that two equal atoms share a weight instead of giving infinities.
    Cost: n^3/3 multiply-adds a scene. Source: Golub and Van Loan, Matrix Computations, 4.2.
    """
    return spd_solve_log_det(matrix_nnB, rhs_nB, ridge_nB)[0]


def spd_solve_log_det(matrix_nnB: Tensor, rhs_nB: Tensor, ridge_nB: Tensor) -> tuple[Tensor, Tensor]:
    """`spd_solve`, and the logarithm of the determinant: (B,)."""
    if torch.compiler.is_exporting():  # elimination by single operations makes a graph of 35,000 nodes
        return _by_lapack(matrix_nnB, rhs_nB, ridge_nB)
    size = matrix_nnB.shape[0]
    diagonal = torch.diagonal(matrix_nnB, dim1=0, dim2=1).T + ridge_nB
    sides = rhs_nB if rhs_nB.dim() == 3 else rhs_nB[:, None]
    rest = torch.cat((matrix_nnB + torch.diag_embed(ridge_nB.T).permute(1, 2, 0), sides), dim=1)
    rows, pivots = [], []
    for k in range(size):
        pivot = torch.maximum(rest[0, 0], 1e-6 * diagonal[k])
        pivots.append(pivot)
        row = rest[0, 1:] / pivot
        rows.append(row)
        if k + 1 < size:
            rest = rest[1:, 1:] - rest[1:, :1] * row
    solution: list[Tensor] = []
    for row in reversed(rows):
        value = row[-sides.shape[1] :]
        if solution:
            value = value - (row[: -sides.shape[1], None] * torch.stack(solution[::-1])).sum(0)
        solution.append(value)
    return torch.stack(solution[::-1]).reshape(rhs_nB.shape), torch.stack(pivots).log().sum(0)


def _by_lapack(matrix_nnB: Tensor, rhs_nB: Tensor, ridge_nB: Tensor) -> tuple[Tensor, Tensor]:
    """The same in three operations; a pivot is not raised, so two equal atoms may share their weight otherwise."""
    matrix_Bnn = matrix_nnB.permute(2, 0, 1) + torch.diag_embed(ridge_nB.T)
    sides_BnR = (rhs_nB if rhs_nB.dim() == 3 else rhs_nB[:, None]).permute(2, 0, 1)
    solved_BnR = torch.linalg.solve_ex(matrix_Bnn, sides_BnR)[0]
    return solved_BnR.permute(1, 2, 0).reshape(rhs_nB.shape), torch.linalg.slogdet(matrix_Bnn)[1]
