"""What a run has reported so far, as rules read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ris_fast.health.finding import Finding

Row = Mapping[str, Any]


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


Rule = Callable[[RunHistory], Iterator[Finding]]

# Keys that earlier versions wrote into metrics.jsonl and summary.json.
RENAMED = {
    "floors": "baselines",
    "left_over": "residual_grad_norm",
    "asleep": "modules_in_eval_mode",
    "first_asleep": "first_module_in_eval_mode",
    "groups_read": "optimizer_batches",
    "between_epochs": "weight_drift_between_epochs",
    "around_validation": "weight_drift_in_validation",
    "answers": "prediction_hash",
}


def with_current_keys(row: Row) -> dict[str, Any]:
    """The row of a run of any version under the keys of this one, also in what it nests."""
    current = {
        RENAMED.get(key, key): with_current_keys(value) if isinstance(value, Mapping) else value
        for key, value in row.items()
    }
    if "prediction_hash" in current and "modules_in_eval_mode" in current:  # of a score, which now says so in one word
        current["in_eval_mode"] = current.pop("modules_in_eval_mode")
    return current


def validated(row: Row) -> float:
    """Validation NMSE of an epoch: the better of raw and averaged weights, as far as they have a figure."""
    figures = [float(row[key]) for key in ("val_nmse_raw", "val_nmse_ema") if row.get(key) is not None]
    return min((value for value in figures if math.isfinite(value)), default=math.nan)
