"""Hashes of scenes, to find the same scene in two splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

PIECE = 2**20  # hashes compared at a time


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


def scene_hashes(snapshots: Tensor) -> np.ndarray:
    """(B,) uint64, from the bytes of each scene's snapshots (B, L, M, 2).

    Numerics: among 1e8 scenes of one split and 1e5 of another, two different ones agree with a probability of 5e-7.
    """
    rows = snapshots.detach().to("cpu", torch.float32).contiguous().flatten(1).numpy()
    return np.frombuffer(b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows), "<u8")


def find_overlap(first: str, first_hashes: ArrayLike, second: str, second_hashes: ArrayLike) -> Overlap:
    """How many scenes of `second` are in `first`, and whether one shift of the index explains all of them.

    A scene that `first` has more than once counts as its first one. Memory: besides the hashes a few times the shorter.
    """
    there, asked = np.asarray(first_hashes, np.uint64), np.asarray(second_hashes, np.uint64)
    known = np.unique(asked)
    parts = (np.flatnonzero(_member(there[at : at + PIECE], known)) + at for at in range(0, len(there), PIECE))
    place = np.concatenate([np.empty(0, np.int64), *parts])  # of the scenes of `first` that `second` has too
    shared, earliest = np.unique(there[place], return_index=True)
    found = np.flatnonzero(_member(asked, shared))
    shifts = np.unique(place[earliest[np.searchsorted(shared, asked[found])]] - found)
    return Overlap(first, second, len(found), len(asked), int(shifts[0]) if len(shifts) == 1 else None)


def _member(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each value is among `known`, which are sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values


def find_copies(hashes: ArrayLike) -> int:
    """How many scenes of one split repeat an earlier one."""
    return len(np.asarray(hashes)) - len(np.unique(hashes))
