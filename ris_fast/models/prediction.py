"""What every network returns, and all that the loss and the localiser read.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded to K_max).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """A covariance as its factor (R = F F^H), and what else a network says; None for what it does not say."""

    factor: Tensor  # (B, N, Q, 2)  F
    azimuth: Tensor | None = None  # (B, K)        rad, a set: the order carries no meaning
    elevation: Tensor | None = None  # (B, K)        rad
    range_m: Tensor | None = None  # (B, K)        m, positive
    count_logits: Tensor | None = None  # (B, K)        entry k speaks for k + 1 sources

    def apply(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        """The same prediction with `change` applied to every output that is there."""
        return Prediction(*(None if value is None else change(value) for value in self))
