"""How many scenes each split has, and which rows of a pool they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.errors import DataError
from ris_fast.physics.random import SPLITS


def split_sizes(train: int) -> dict[str, int]:
    """Validation and test in the proportions of RIS-12x12 (160 : 40 : 8), at least one scene each."""
    return {"train": train, "val": max(1, train // 4), "test": max(1, train // 20)}


def split_rows(path: Path, total: int, wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """Disjoint row numbers for each split out of one pool, the same on every call.

    The first sum(wanted) rows are used, or all of them in the same proportions. Validation and test are spread
    evenly, so that a file sorted by anything still gives fair splits.
    """
    asked = sum(wanted.values())
    if total < len(SPLITS):
        raise DataError(
            path, "", f"{total} scenes to split", f"at least {len(SPLITS)}", "Give more scenes, or train/ and val/."
        )
    used = min(total, asked)
    val, test = (max(1, wanted[split] * used // asked) for split in ("val", "test"))
    held = val + test
    if held >= used:
        val, test, held = 1, 1, 2
    positions = (2 * torch.arange(held) + 1) * used // (2 * held)
    chosen = (2 * torch.arange(test) + 1) * held // (2 * test)
    is_test = torch.zeros(held, dtype=torch.bool)
    is_test[chosen] = True
    is_train = torch.ones(used, dtype=torch.bool)
    is_train[positions] = False
    return {"train": is_train.nonzero()[:, 0], "val": positions[~is_test], "test": positions[is_test]}


def size_notes(config: Config, found: Mapping[str, int], used: Mapping[str, int]) -> list[str]:
    """Where a split has more scenes than are used, or fewer than someone asked for: a preset and a default only
    limit."""
    notes = []
    for split, there in found.items():
        wanted, origin = (
            getattr(config.data, f"{split}_scenes"),
            config.provenance.get(f"data.{split}_scenes", "default"),
        )
        if there > used[split]:
            notes.append(f"{used[split]} of {there} {split} scenes in use (data.{split}_scenes)")
        elif wanted > there and origin != "default" and not origin.startswith("preset "):
            notes.append(
                f"data.{split}_scenes is {wanted} ({origin}), but there are {there} {split} scenes: all are in use"
            )
    return notes
