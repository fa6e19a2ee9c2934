"""The scenes of every step as it was served: eight bytes each, in a ring on the device, so that a scene that comes
again is seen also between two steps that are looked at closely.

Legend: B batch, S scenes of a step, R records.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ris_fast.physics.scenes import Scenes

MOST_SCENES = 2**16  # of one step, beyond which none is recorded
READ = 1024  # scenes of one report that the host compares; of more, the same share of all, chosen by their bytes
REMEMBERED = 2**17  # scenes of an epoch that are kept to compare with
FEW, NEARLY_ALL = 2, 0.9  # of a step's scenes that came again: a sampler that draws with replacement repeats fewer
MIXER = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed number of 64 bits


def fingerprints(snapshots: Tensor) -> Tensor:
    """(B,) int64: the bytes of each scene's first number, which noise makes its own. Snapshots (B, L, M, 2)."""
    snapshots = snapshots.detach()
    if snapshots.dtype != torch.float32 or not snapshots.is_contiguous():
        snapshots = snapshots[:, :1, :1].float().contiguous()
    return snapshots.view(torch.int64)[:, 0, 0, 0]


class SceneRing:
    """Records of the last R steps. Args: records: R; scenes: of a full step on this rank."""

    def __init__(self, records: int, scenes: int, device: torch.device) -> None:
        self.size = scenes if 0 < scenes <= MOST_SCENES else 0
        self.every = max(1, records * scenes // READ)  # of how many scenes the host looks at one
        self.table = torch.zeros(records if self.size else 1, max(1, self.size), dtype=torch.int64, device=device)
        self.numbers = torch.zeros(len(self.table), dtype=torch.int64, device=device)
        self.row = torch.zeros(max(1, self.size), dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.at, self.made, self.reported = 0, 0, 0
        self.starts: list[int] = [0]  # steps made before each epoch
        self.validation: frozenset[int] = frozenset()
        self.epoch, self.now, self.last = 0, set(), set()
        self.complete, self.last_complete = True, False  # whether all steps of the epoch were compared

    # ---- called by the step, also within a CUDA graph ------------------------------------------------------------

    def begin(self) -> None:
        self.at = 0
        self.row.zero_()

    def add(self, scenes: Scenes) -> None:
        """One micro-batch."""
        if self.at + scenes.batch <= self.size:
            self.row[self.at : self.at + scenes.batch].copy_(fingerprints(scenes.snapshots))
        self.at += scenes.batch

    def close(self) -> None:
        """After the step."""
        slot = self.count.remainder(len(self.table))
        self.count += 1
        self.table.index_copy_(0, slot, self.row[None])
        self.numbers.index_copy_(0, slot, self.count)

    # ---- called by the host --------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """The steps from here on belong to the next epoch."""
        if self.made != self.starts[-1]:
            self.starts.append(self.made)

    def know_validation(self, batches: Iterable[Scenes]) -> None:
        """The scenes that are validated."""
        prints = [fingerprints(scenes.snapshots) for scenes in batches]
        self.validation = frozenset(torch.cat(prints).tolist()) - {0} if prints else frozenset()

    def tensors(self) -> dict[str, Tensor]:
        return {"served": self.table.clone(), "served_steps": self.numbers.clone()} if self.size else {}

    def read(self, table: Tensor, numbers: Tensor) -> dict[str, Any]:
        """The steps since the last report in plain numbers: scenes that came again in their epoch, that are validated
        too, and that the epoch before had."""
        order = numbers.argsort()
        order = order[numbers[order] > self.reported]
        steps = numbers[order].tolist()
        if not steps:
            return {}
        found: dict[str, Any] = {"scenes": 0, "again": 0, "of_validation": 0, "of_last_epoch": 0, "compared": 0}
        again_at: list[int] = []
        if steps[0] != self.reported + 1:
            self.complete = False
        for number, row in zip(steps, table[order]):
            self._enter_epoch(number)
            row = row[row != 0]
            if self.every > 1:
                row = row[(row * MIXER >> 40).remainder(self.every) == 0]
            served = row.tolist()
            distinct = set(served)
            again = len(served) - len(distinct) + len(distinct & self.now)
            found["scenes"] += len(served)
            found["again"] += again
            found["of_validation"] += len(distinct & self.validation)
            if self.last_complete:
                found["compared"] += len(distinct)
                found["of_last_epoch"] += len(distinct & self.last)
            if again > max(FEW, NEARLY_ALL * len(served)):
                again_at.append(number)
            if len(self.now) < REMEMBERED:
                self.now |= distinct
            else:
                self.complete = False
        self.reported = steps[-1]
        return found | {"again_steps": len(again_at), "first_again": again_at[:1]} if again_at else found

    def _enter_epoch(self, number: int) -> None:
        epoch = sum(number > start for start in self.starts) - 1
        if epoch != self.epoch:
            self.last, self.last_complete = self.now, self.complete and epoch == self.epoch + 1
            self.now, self.epoch, self.complete = set(), epoch, True
