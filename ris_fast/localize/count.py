"""How many sources a covariance factor holds.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.localize.spectrum import Decomposition

SHARE = 1e-3  # of the trace: an eigenvalue below it is not told from the error of a good network


def count_sources(parts: Decomposition, most: int, share: float = SHARE) -> Tensor:
    """The number of sources in each factor, at most `most`: (B,) int64; zero for a factor of zeros.

    Rule: a factor whose rank is below its number of columns and at most `most` has no error of its own (a true one,
    or one made of so many steering vectors), and its rank is the answer, however weak the last source. Any other holds
    error; then each eigenvalue above `share` of the trace counts.
    """
    rank, columns = parts.rank, parts.value.shape[1]
    strong = (parts.value > share).sum(1)
    exact = (rank < columns) & (rank <= most)
    return torch.where(exact, rank, strong).clamp_max(most)
