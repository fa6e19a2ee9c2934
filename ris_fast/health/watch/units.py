"""Units of one matrix that begin as copies of one another, and how many different ones training has made of them.

Legend: U units, the rows of a matrix or its columns; F numbers of each.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ris_fast.health.watch.graph import modules_of
from ris_fast.health.watch.hooks import plain_name
from ris_fast.health.watch.module_records import AlikeUnits
from ris_fast.health.watch.tensors import is_plain

UNITS, NUMBERS = 64, 64  # that are compared
SOON = 16  # steps
APART = 1e-2  # of the largest change of a number, beyond which two are different
TABLES = (nn.Embedding, nn.EmbeddingBag)  # whose rows are no units


@dataclass
class _Matrix:
    name: str
    axis: int
    tensor: weakref.ref[Tensor]
    unit: Tensor  # (F,) at the beginning


class Units:
    """Matrices all units of which are the same when the watch begins."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        found: list[tuple[_Matrix, Tensor]] = []
        for path, module in modules_of(model):
            for name, value in module._parameters.items():
                if value is None or is_lazy(value) or not is_plain(value) or value.ndim < 2 or not value.requires_grad:
                    continue
                for axis in (1,) if isinstance(module, TABLES) else (0, 1):
                    if min(value.shape[:2]) > 1 and value.numel():
                        rows = value.detach().movedim(axis, 0).flatten(1)
                        matrix = _Matrix(plain_name(f"{path}{name}"), axis, weakref.ref(value), rows[0].clone())
                        alike = (rows == rows[:1]).all()
                        # A last layer that begins at zero follows its targets, which may be equal.
                        last = axis == 0 and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
                        found.append((matrix, alike & rows.any() if last else alike))
        flags = torch.stack([flag.to(found[0][1].device) for _, flag in found]).tolist() if found else []
        self.matrices = [matrix for (matrix, _), flag in zip(found, flags) if flag]

        self.early: dict[int, Tensor] = {}  # changes after some steps, by the matrix' number

    def look(self, steps: int) -> None:
        """After some steps, before rounding has told equal units apart."""
        if steps == SOON and self.matrices:
            self.early = {number: each for number, each in enumerate(map(_moved, self.matrices)) if each is not None}

    def record(self) -> list[AlikeUnits]:
        """Of those that have changed. Reads the device."""
        found = []
        for number, each in enumerate(self.matrices):
            looks = [self.early.get(number), _moved(each)]
            counts = [count for moved in looks if moved is not None and sum(count := _groups(moved.cpu())) > 1]
            if counts:
                found.append(AlikeUnits(each.name, each.axis, counts[0], counts[-1]))
        return found


@torch.no_grad()
def _moved(matrix: _Matrix) -> Tensor | None:
    """(U, F), how far some units are from what all were; None where the matrix is gone, or another."""
    value = matrix.tensor()
    rows = value.detach().movedim(matrix.axis, 0).flatten(1) if value is not None and is_plain(value) else None
    if rows is None or rows.shape[1:] != matrix.unit.shape or rows.device != matrix.unit.device:
        return None
    unit, number = max(1, len(rows) // UNITS), max(1, len(matrix.unit) // NUMBERS)
    return rows[::unit, ::number] - matrix.unit[::number]


def _groups(moved: Tensor) -> list[int]:
    """How many are equal, of each kind of those that have moved; none where they have become no numbers."""
    near, counts = APART * moved.abs().max(), list[int]()
    rows = moved[moved.abs().amax(1) > near]
    while len(rows) and bool(near.isfinite()):
        other = (rows - rows[0]).abs().amax(1) > near
        rows, count = rows[other], len(rows)
        counts.append(count - len(rows))
    return counts
