"""A shard while its scenes come in: columns, and what was seen of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_fast.data.geometry import Reach
from ris_fast.data.npz_load import Facts
from ris_fast.data.shard_columns import CODES
from ris_fast.data.statistics import measure
from ris_fast.data.unfinished import write_shard
from ris_fast.physics.scenes import Scenes

COUNTS = ("clamped", "wrong_channel", "conjugate_codes")


@dataclass
class Building:
    """Scenes of one shard, `rows` of them when it is whole. `codes`: of all its scenes, or None: a column."""

    path: Path
    rows: int
    facts: Facts
    codes: Tensor | None
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    there: int = 0
    other_powers: int = 0

    @property
    def full(self) -> bool:
        return self.there == self.rows

    def add(self, columns: dict[str, Tensor]) -> None:
        self.parts.append(columns)
        self.there += len(columns["count"])

    def write(self, max_sources: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Writes the shard. Returns: its entry in the manifest, and the facts for its receipt."""
        tensors = {}
        for name in tuple(self.parts[0]):
            tensors[name] = torch.cat([part.pop(name) for part in self.parts])
        if self.codes is not None:
            tensors[CODES] = self.codes
        names = {item.name for item in fields(Scenes)} & set(tensors)
        scenes = Scenes(index=torch.arange(self.rows), **{name: tensors[name] for name in names})
        entry = {"scenes": self.rows, "statistics": measure(scenes, max_sources)}
        return write_shard(self.path, tensors, entry), self._facts()

    def _facts(self) -> dict[str, Any]:
        return {
            **{name: getattr(self.facts, name) for name in COUNTS},
            "other_powers": self.other_powers,
            "stored": reach_list(self.facts.stored),
            "served": reach_list(self.facts.served),
        }


def reach_list(reach: Reach) -> list[float]:
    return [reach.azimuth, reach.elevation, reach.range_m]


def together(exact: bool, offset: tuple[float, float], facts: list[Mapping[str, Any]]) -> Facts:
    """The facts of a split from those of its shards."""
    whole = Facts(exact, offset)
    for name in COUNTS:
        setattr(whole, name, sum(each[name] for each in facts))
    for name in ("stored", "served"):
        columns = zip(*(each[name] for each in facts))
        setattr(whole, name, Reach(*(max(column) for column in columns)))
    return whole
