"""What tests of single checks share: small trainers, and the causes that a check names."""

from __future__ import annotations

from typing import Any

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.config.schema import Config
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.training.trainer import Trainer


def causes(check: Any, trainer: Trainer) -> list[str]:
    return [finding.cause for finding in check(PreflightContext(trainer))]


def preflight_of(trainer: Trainer) -> list[str]:
    return [finding.cause for finding in Watchdog(trainer).preflight()]


def small(twin: str, **settings: Any) -> Config:
    return changed(TWINS[twin](), settings)


def at(snr_db: float) -> dict[str, float]:
    """Every scene at this SNR; the two limits in the order in which neither passes the other."""
    limits = {"task.snr_min_db": snr_db, "task.snr_max_db": snr_db}
    return dict(sorted(limits.items(), reverse=snr_db < 0))
