"""Hashes of scenes, to find the same scene in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Overlap:
    """`count` of the `total` scenes of `second` are bit-identical to scenes of `first`."""

    first: str
    second: str
    count: int
    total: int
    shift: int | None = None  # second[i] == first[i + shift] for every one of them

    def __str__(self) -> str:
        rule = (
            f" ({self.second}[i] == {self.first}[i{f'{self.shift:+d}' if self.shift else ''}])"
            if self.shift is not None
            else ""
        )
        return (
            f"{self.count} of {self.total} {self.second} scenes are copies of {self.first} scenes{rule}: "
            "their NMSE says nothing about new scenes"
        )


def scene_hashes(snapshots: Tensor) -> list[bytes]:
    """16 bytes for each scene, from the bytes of its snapshots (B, L, M, 2)."""
    rows = snapshots.detach().to("cpu", torch.float32).contiguous().flatten(1).numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def find_overlap(first: str, first_hashes: Sequence[bytes], second: str, second_hashes: Sequence[bytes]) -> Overlap:
    """How many scenes of `second` are in `first`, and whether one shift of the index explains all of them."""
    number = {value: i for i, value in reversed(list(enumerate(first_hashes)))}
    shifts = Counter(number[value] - i for i, value in enumerate(second_hashes) if value in number)
    count = sum(shifts.values())
    return Overlap(first, second, count, len(second_hashes), next(iter(shifts)) if len(shifts) == 1 else None)


def find_copies(hashes: Sequence[bytes]) -> int:
    """How many scenes of one split repeat an earlier one."""
    return len(hashes) - len(set(hashes))
