"""What a run has reported so far, as rules read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ris_fast.health.finding import Finding

Row = Mapping[str, Any]
NAMED = 8  # ranks in one message


@dataclass
class RunHistory:
    """Everything that a run has reported so far."""

    info: Row = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    epochs: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)

    @property
    def reading(self) -> Row:
        """The telemetry of the last step row; empty where there is none."""
        return (self.steps[-1].get("health") or {}) if self.steps else {}

    @property
    def validation(self) -> Row:
        return (self.epochs[-1].get("health") or {}) if self.epochs else {}

    @property
    def step(self) -> int:
        rows = [*self.steps[-1:], *self.epochs[-1:]]
        return max((int(row.get("step", 0)) for row in rows), default=0)

    def finding(self, cause: str, evidence: str, certain: bool = True) -> Finding:
        """A finding at the present step."""
        return Finding(cause, evidence, self.step, certain=certain)


Rule = Callable[[RunHistory], Iterator[Finding]]


def validated(row: Row) -> float:
    """Validation NMSE of an epoch: the better of raw and averaged weights, as far as they have a figure."""
    figures = [float(row[key]) for key in ("val_nmse_raw", "val_nmse_ema") if row.get(key) is not None]
    return min((value for value in figures if math.isfinite(value)), default=math.nan)


def named(ranks: Sequence[int]) -> str:
    """'rank 1', 'ranks 1 and 3', 'ranks 1, 2, ... and 40 more'."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown, rest = [str(rank) for rank in ranks[:NAMED]], len(ranks) - NAMED
    last = f"{rest} more" if rest > 0 else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"
