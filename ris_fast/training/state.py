"""Progress of a run: what a checkpoint must remember to continue it, and the meters of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast import exit_codes
from ris_fast.training.step_result import StepResult


def trainable(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class RunStopped(RuntimeError):
    """The run cannot go on; the message says what was seen, why it matters and what to do. Exit code 4."""

    exit_code = exit_codes.NOT_LEARNED

    def __init__(self, message: str, finding: str) -> None:
        super().__init__(message)
        self.finding = finding


@dataclass
class RunState:
    """Counts since the start of the run, over all resumptions."""

    epoch: int = 0  # epochs completed
    epoch_step: int = 0  # optimizer steps made in the epoch under way
    epoch_scenes: int = 0  # scenes of it that these steps took, on all ranks
    step: int = 0  # optimizer steps attempted
    scenes_seen: int = 0
    seconds: float = 0.0  # training and validation, not start-up
    initial_nmse: float = math.nan  # validation before the first step
    best_nmse: float = math.inf
    best_weights: str = ""  # "raw" or "ema"
    epochs_since_best: int = 0
    train_loss: float = math.nan
    val_nmse_raw: float = math.nan
    val_nmse_ema: float = math.nan
    skipping: int = 0  # steps skipped in a row, as reports saw it

    def to_json(self) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunState:
        return cls(
            **{key: float(value) if isinstance(getattr(cls, key), float) else value for key, value in values.items()}
        )


@dataclass
class Meter:
    """Means over scenes, summed on the device and read once."""

    scenes: int = 0
    steps: int = 0
    names: tuple[str, ...] = ()  # of the terms
    sums: Tensor | None = None  # (1 + terms,) float64, loss first

    def add(self, result: StepResult) -> None:
        row = torch.stack([result.loss, *result.terms.values()]).double() * result.scenes
        self.join(Meter(result.scenes, 1, tuple(result.terms), row))

    def join(self, other: Meter) -> None:
        """Adds what another meter has seen."""
        self.steps, self.scenes, self.names = (
            self.steps + other.steps,
            self.scenes + other.scenes,
            other.names or self.names,
        )
        if other.sums is not None:
            self.sums = other.sums if self.sums is None else self.sums + other.sums

    def join_ranks(self, sum_: Callable[[Tensor], Tensor]) -> None:
        """Adds what other ranks have seen in the same steps, whose scenes are counted already, by `Ranks.sum_`."""
        if self.sums is not None:
            sum_(self.sums)

    def read(self, copied: Tensor | None = None) -> None:
        """Waits for the sums and brings them to the host; takes `copied`, a copy that is there already, where given."""
        if self.sums is not None:
            self.sums = self.sums.cpu() if copied is None else copied

    def mean_loss(self) -> float:
        return float(self.sums[0]) / self.scenes if self.sums is not None else math.nan

    def mean_terms(self, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """name -> raw and weighted mean."""
        means = zip(self.names, [] if self.sums is None else (self.sums[1:] / self.scenes).tolist())
        return {name: {"raw": mean, "weighted": mean * weights[name]} for name, mean in means}


COUNTED = ("attempted", "applied", "clipped", "skipped")  # the optimizer's counters that reports are made of


@dataclass
class EpochMeters:
    """What has been measured of the epoch under way: up to the last report, and since.

    `before`, `reported`: the optimizer's counters at the start of the epoch and at the last report.
    """

    epoch: Meter = field(default_factory=Meter)
    window: Meter = field(default_factory=Meter)
    before: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, Any] = field(default_factory=dict)

    def close_window(self) -> None:
        """Adds the window to the epoch and begins another; an interrupt finds both done or neither."""
        joined = replace(self.epoch)
        joined.join(self.window)
        self.epoch, self.window = joined, Meter()

    def sums(self, terms: int, device: torch.device) -> Tensor:
        """(2, 1 + terms) float64: of the epoch and of the window; zeros where nothing was measured yet."""
        nothing = torch.zeros(1 + terms, dtype=torch.float64, device=device)
        parts = (nothing if meter.sums is None else meter.sums.to(device) for meter in (self.epoch, self.window))
        return torch.stack(list(parts))

    def to_json(self) -> dict[str, Any]:
        """All but the sums."""
        return {
            "names": list(self.epoch.names or self.window.names),
            "scenes": [self.epoch.scenes, self.window.scenes],
            "steps": [self.epoch.steps, self.window.steps],
            "before": {key: self.before[key] for key in COUNTED if key in self.before},
            "reported": {key: self.reported[key] for key in COUNTED if key in self.reported},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], sums: Tensor, device: torch.device) -> EpochMeters:
        """What `to_json` and `sums` were made of."""
        meters = [
            Meter(scenes, steps, tuple(values["names"]), row.to(device)) if steps else Meter()
            for scenes, steps, row in zip(values["scenes"], values["steps"], sums)
        ]
        return cls(*meters, values["before"], values["reported"])
