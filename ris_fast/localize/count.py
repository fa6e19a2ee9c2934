"""How many sources a covariance factor holds.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.localize.spectrum import Decomposition

SHARE = 5e-3  # of the trace: below it a good network's own error is as likely as a source
TAIL = 2.5  # times the mean eigenvalue beyond the most sources there can be, which is error for certain


def count_sources(parts: Decomposition, most: int, share: float = SHARE) -> Tensor:
    """The number of sources in each factor, at most `most`: (B,) int64; zero for a factor of zeros.

    Rule: a factor whose rank is below its number of columns and at most `most` has no error of its own (a true one,
    or one made of so many steering vectors), and its rank is the answer, however weak the last source. Any other holds
    error; then an eigenvalue counts if it is above `share` of the trace and above TAIL times the mean of the
    eigenvalues after the first `most`, where there are any.
    It knows no SNR: where the measurement is at hand, description length on it tells the number better.
    """
    rank, columns = parts.rank, parts.value.shape[1]
    exact = (rank < columns) & (rank <= most)
    floor = torch.full_like(parts.value[:, :1], share)
    if columns > most:
        floor = torch.maximum(floor, TAIL * parts.value[:, most:].mean(1, keepdim=True))
    return torch.where(exact, rank, (parts.value[:, :most] > floor).sum(1))
