"""The steps between two reports, a record each: what the fused step measured of every tensor, in order and in short.

The optimizer keeps the records in a ring on its device (`FusedAdamW.records`); they come to the host with a report.

Legend: T tensors, R records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

RECORDS = 64  # steps in the ring at most: T * 16 bytes each, and all of them are copied with every report


def ring_size(every: int) -> int:
    """Steps that the optimizer keeps records of where a report comes at least once in `every`."""
    return min(max(1, every), RECORDS)


@dataclass(frozen=True)
class Window:
    """The steps since the last report, each as the fused step recorded it.

    numbers: attempted steps as the optimizer counts them, ascending; table: (len(numbers), T, 4), the columns of
    `FusedAdamW.telemetry`; made: steps since the last report, of which those that the ring had no room for are missing.
    """

    numbers: list[int]
    table: Tensor
    made: int

    @classmethod
    def after(cls, reported: int, records: Tensor, numbers: Tensor, made: int) -> Window:
        """Records (R, T, 4) and their numbers (R,), on the host, put in order; those up to `reported` are left out."""
        newest = int(numbers.max()) if len(numbers) else 0
        order = numbers.argsort()
        order = order[
            numbers[order] > (reported if newest >= reported else 0)
        ]  # a count that fell: another optimizer's
        return cls(numbers[order].long().tolist(), records[order], made)

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """The largest gradient and the non-finite ones, in plain numbers; None where there is no such step."""
        norms, bad = self.table[..., 0].double(), self.table[..., 3]
        total = norms.square().sum(1).sqrt()
        finite = (~(bad > 0).any(1) & total.isfinite()).tolist()
        good = [row for row, each in enumerate(finite) if each]
        largest = max(good, key=total.tolist().__getitem__, default=None)
        first = finite.index(False) if len(good) < len(finite) else None
        return {
            "steps": self.made,
            "recorded": len(self.numbers),
            "nonfinite_steps": len(finite) - len(good),
            "first_nonfinite_step": None if first is None else self.numbers[first],
            "first_nonfinite_tensor": None if first is None else names[_first_bad(norms[first], bad[first])],
            "median_grad_norm": median(total[good].tolist()) if good else None,
            "largest_grad_norm": None if largest is None else float(total[largest]),
            "largest_step": None if largest is None else self.numbers[largest],
            "largest_tensor": None if largest is None else names[int(norms[largest].argmax())],
            "largest_tensor_norm": None if largest is None else float(norms[largest].max()),
        }


def _first_bad(norms: Tensor, bad: Tensor) -> int:
    """The first tensor (T,) with non-finite values, else the first whose norm is none, else the largest."""
    for wrong in (bad > 0, ~norms.isfinite()):
        if bool(wrong.any()):
            return int(wrong.int().argmax())
    return int(norms.argmax())


def median(values: Sequence[float]) -> float:
    """The upper one of two; not-a-number for none."""
    return sorted(values)[len(values) // 2] if values else math.nan
