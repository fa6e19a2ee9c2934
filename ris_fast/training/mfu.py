"""Tells a run's observers which share of the machine's peak matmul rate its products reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ris_fast.benchmarks.train_step import step_flops
from ris_fast.timing import peak_matmul_rate
from ris_fast.training.trainer import Observer, Trainer


class WithShare:
    """Passes everything on to `observer`; rows get `mfu`.

    Model: scenes/s times the FLOPs that a scene's forward and backward need, over the rate of one large matrix product
        in the run's precision, measured once when the run starts (about a third of a second).
    """

    def __init__(self, observer: Observer, trainer: Trainer) -> None:
        self.observer, self.trainer, self.scenes_per_s = observer, trainer, 0.0

    def start(self, info: Mapping[str, Any]) -> None:
        device = self.trainer.device
        with torch.random.fork_rng(
            [device] if device.type == "cuda" else []
        ):  # the run's random numbers stay what they were
            most = peak_matmul_rate(device, self.trainer.config.training.precision, seconds=0.3)
            self.scenes_per_s = most / max(step_flops(self.trainer, 1), 1)
        self.observer.start({**info, "peak_matmul_flop_per_s": most})

    def step(self, row: Mapping[str, Any]) -> None:
        self.observer.step(self._shared(row))

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.observer.epoch(self._shared(row))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.observer.finish(summary)

    def _shared(self, row: Mapping[str, Any]) -> dict[str, Any]:
        share = row["scenes_per_s"] / self.scenes_per_s
        return {
            **row,
            "mfu": share if share <= 1.0 else None,
        }  # above: other work ran while it was measured
