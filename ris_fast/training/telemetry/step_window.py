"""The steps between two reports, a record each: what the fused step measured of every tensor, in order and in short.

The optimizer keeps the records in a ring on its device (`FusedAdamW.records`); they come to the host with a report.

Legend: T tensors, R records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LISTED = 8  # names in one entry
DECAY = 0.01  # of a tensor in one step, at most, by a weight decay of one's own
JUMP = 3e-5  # of a tensor's norm: more than rounding in a sum of squares
RECORDS = 64  # steps in the ring at most: T * 16 bytes each, and all of them are copied with every report


def ring_size(every: int) -> int:
    """Steps that the optimizer keeps records of where a report comes at least once in `every`."""
    return min(max(1, every), RECORDS)


@dataclass(frozen=True)
class Window:
    """The steps since the last report, each as the fused step recorded it.

    numbers: attempted steps as the optimizer counts them, ascending; table: (len(numbers), T, 4), the columns of
    `FusedAdamW.telemetry`; made: steps since the last report, of which those that the ring had no room for are missing;
    before: (T, 4), the record of the step before the first, where that is known.
    """

    numbers: list[int]
    table: Tensor
    made: int
    before: Tensor | None = None

    @classmethod
    def after(
        cls, reported: int, records: Tensor, numbers: Tensor, made: int, last: tuple[int, Tensor] | None = None
    ) -> Window:
        """Records (R, T, 4) and their numbers (R,), on the host, put in order; those up to `reported` are left out.
        `last`: the number and the record of a step before them."""
        newest = int(numbers.max()) if len(numbers) else 0
        order = numbers.argsort()
        order = order[
            numbers[order] > (reported if newest >= reported else 0)
        ]  # a count that fell: another optimizer's
        found = numbers[order].long().tolist()
        follows = last is not None and found and last[0] == found[0] - 1 and last[1].shape == records.shape[1:]
        return cls(found, records[order], made, last[1] if follows else None)

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
            **self._still(names, good, total),
            **self._moved_outside(names),
        }

    def _still(self, names: Sequence[str], good: Sequence[int], total: Tensor) -> dict[str, Any]:
        """Steps and tensors whose gradient is exactly zero, steps that move nothing, and updates that are not finite
        though the gradients are; empty where there is nothing of the kind."""
        if not good:
            return {}
        norms, moved = self.table[good, :, 0], self.table[good, :, 2]
        numbers, zero = [self.numbers[row] for row in good], norms == 0
        none, some = zero.all(0), zero[total[good] > 0].any(0) & ~zero.all(0)
        pattern = zero[:, int(some.int().argmax())].tolist() if bool(some.any()) else []
        broken = ~(moved.isfinite() & self.table[good, :, 1].isfinite())
        kinds = {
            "zero_steps": (total[good] == 0).tolist(),
            "unmoved_steps": ((total[good] > 0) & (moved == 0).all(1)).tolist(),
            "nonfinite_updates": broken.any(1).tolist(),
            "partly_zero_steps": [each and bool(norms[row].any()) for row, each in enumerate(pattern)],
        }
        found: dict[str, Any] = {
            name: _when(steps)
            for name, chosen in kinds.items()
            if (steps := [number for number, each in zip(numbers, chosen) if each])
        }
        if found.get("nonfinite_updates"):
            row = broken.any(1).int().argmax()
            found["nonfinite_updates"]["tensor"] = names[int(broken[row].int().argmax())]
        for name, chosen in (("without_gradient", none), ("partly_zero", some)):
            if bool(chosen.any()):
                found[name] = _listed([names[index] for index in chosen.nonzero().flatten().tolist()])
        return found

    def _moved_outside(self, names: Sequence[str]) -> dict[str, Any]:
        """Steps between which a tensor's norm changed by more than the update of the second: something else moved it,
        and not a weight decay of one's own; empty where there is none."""
        rows = self.table if self.before is None else torch.cat([self.before[None], self.table])
        numbers = self.numbers if self.before is None else [self.numbers[0] - 1, *self.numbers]
        if len(numbers) < 2:
            return {}
        weights, updates = rows[..., 1].double(), rows[1:, :, 2].double()
        change = weights.diff(dim=0)
        jump = change.abs() - torch.where(change < 0, DECAY * weights[:-1], 0.0)
        known = (weights[:-1] > 0) & (rows[1:, :, 0] > 0) & (updates > 0)  # other records keep what was there before
        outside = known & (jump > (1 + 1e-3) * updates + JUMP * weights[1:]) & jump.isfinite()
        follows = torch.tensor([b == a + 1 for a, b in zip(numbers, numbers[1:])])
        outside &= follows[:, None]
        steps = [numbers[row + 1] for row in outside.any(1).nonzero().flatten().tolist()]
        if not steps:
            return {}
        row = int(outside.any(1).int().argmax())
        chosen = [names[index] for index in outside[row].nonzero().flatten().tolist()]
        return {"changed_outside": _when(steps) | _listed(chosen)}


def _when(steps: Sequence[int]) -> dict[str, Any]:
    """How many steps there are, the first of them, and how far they are apart where that is always the same."""
    apart = {b - a for a, b in zip(steps, steps[1:])}
    return {
        "steps": len(steps),
        "first": steps[0],
        "every": apart.pop() if len(apart) == 1 and len(steps) > 2 else None,
    }


def _listed(names: Sequence[str]) -> dict[str, Any]:
    return {"tensors": len(names), "names": list(names[:LISTED])}


def _first_bad(norms: Tensor, bad: Tensor) -> int:
    """The first tensor (T,) with non-finite values, else the first whose norm is none, else the largest."""
    for wrong in (bad > 0, ~norms.isfinite()):
        if bool(wrong.any()):
            return int(wrong.int().argmax())
    return int(norms.argmax())


def median(values: Sequence[float]) -> float:
    """The upper one of two; not-a-number for none."""
    return sorted(values)[len(values) // 2] if values else math.nan
