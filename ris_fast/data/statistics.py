"""Input statistics of scenes: written into a manifest, and measured again when it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ris_fast.physics.scenes import Scenes

RELATIVE_TOLERANCE = 1e-3
BLOCK = 512  # scenes squared at a time


def measure(scenes: Scenes, max_sources: int) -> dict[str, Any]:
    """rms of y and of H (over all entries), mean SNR in dB, and how many scenes have 1, 2, ... sources.

    Numerics: float64, summed by numpy in one order whatever the number of threads: a data set has one manifest.
    """

    def rms(values: Tensor | None) -> float:
        if values is None:
            return 0.0
        squares = (np.square(part.numpy(), dtype=np.float64).sum() for part in values.detach().cpu().split(BLOCK))
        return float(np.sqrt(sum(squares) / (values.numel() // 2)))

    counts = scenes.count.cpu().bincount(minlength=max_sources + 1)[1:].tolist()
    return {
        "scenes": scenes.batch,
        "snapshots_rms": rms(scenes.snapshots),
        "channel_rms": rms(scenes.channel),
        "snr_db_mean": float(scenes.snr_db.detach().cpu().numpy().mean(dtype=np.float64)),
        "count_histogram": counts,
    }


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics of all scenes from those of their parts."""
    total = sum(part["scenes"] for part in parts)

    def mean(key: str, power: int) -> float:
        return float((sum(part["scenes"] * part[key] ** power for part in parts) / total) ** (1 / power))

    columns = zip(*(part["count_histogram"] for part in parts))
    return {
        "scenes": total,
        "snapshots_rms": mean("snapshots_rms", 2),
        "channel_rms": mean("channel_rms", 2),
        "snr_db_mean": mean("snr_db_mean", 1),
        "count_histogram": [sum(column) for column in columns],
    }


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One sentence for each entry that does not match, to a relative 1e-3."""
    wrong = []
    for key, value in found.items():
        wanted = expected.get(key)
        if isinstance(value, float) and isinstance(wanted, (int, float)):
            if abs(value - wanted) <= RELATIVE_TOLERANCE * max(abs(value), abs(wanted), 1e-12):
                continue
        elif value == wanted:
            continue
        wrong.append(f"{key} is {value}, the manifest says {wanted}")
    return wrong
