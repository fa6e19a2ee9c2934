"""From a factor, and a measurement where there is one, to sources with standard deviations: one call for every network.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import ConfigError, Task
from ris_fast.inference.located import Located
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.likelihood import CRITERIA, refine
from ris_fast.localize.locate import locate
from ris_fast.localize.sources import Sources

METHODS = ("likelihood", "music", "mvdr", "pursuit")
FIRST_SNR_DB = 10.0  # of the first search in scenes whose SNR is not known
STEPS = 4  # of Gauss-Newton before sources are removed
NEED_MEASUREMENT = ("likelihood", "pursuit")


class Measurement(NamedTuple):
    """What was measured of some scenes, on one device: real pairs, float32."""

    snapshots: Tensor  # (B, L, M, 2)
    channel: Tensor  # (B, M, N, 2)
    codes: Tensor  # (L, N, 2) or (B, L, N, 2)
    snr_db: Tensor  # (B,)


def choose_method(method: str | None, measured: bool) -> str:
    """The method, or the best one that there is data for: likelihood with a measurement, music without. Raises:
    ConfigError."""
    if method is None:
        return "likelihood" if measured else "music"
    if method not in METHODS:
        raise ConfigError(f"predict: method is {method!r}; it must be one of: {', '.join(METHODS)}.")
    if method in NEED_MEASUREMENT and not measured:
        raise ConfigError(f"predict: method '{method}' needs snapshots and the channel. Give them, or take 'music'.")
    return method


def choose_count(count: int | str | Tensor | None, method: str, task: Task) -> int | str | Tensor | None:
    """The number of sources, checked: a number, one a scene, 'mdl', 'aic', 'network', or the method's own. Raises:
    ConfigError."""
    if count is None:
        return "mdl" if method == "likelihood" else None
    if isinstance(count, str) and count not in (*CRITERIA, "network"):
        raise ConfigError(f"predict: count is {count!r}; expected a whole number, {', '.join(CRITERIA)} or network.")
    if isinstance(count, str) and count in CRITERIA and method != "likelihood":
        raise ConfigError(f"predict: count '{count}' compares likelihoods, which method '{method}' has none of.")
    if isinstance(count, int) and not 0 <= count <= task.max_sources:
        raise ConfigError(f"predict: count is {count}; expected 0 to {task.max_sources} (task.max_sources).")
    return count


def locate_sources(
    task: Task,
    factor: Tensor,
    measurement: Measurement | None = None,
    *,
    method: str,
    count: int | str | Tensor | None,
    snr_db: Tensor | None = None,
) -> Located:
    """The sources of covariances F F^H; with a measurement their powers in its units, and standard deviations.

    Model: 'likelihood' takes the atoms of the pursuit and the peaks of the spectrum of F for starts, brings down
        |y - G A s|^2 from there and keeps as many as the description length pays for; the other methods leave the
        positions where they are.
    Args: factor (B, N, Q, 2); method: one of `METHODS`; count: a number, (B,), 'mdl', 'aic', or None for as many as
        the factor has.
    """
    number = torch.full(factor.shape[:1], count, device=factor.device) if isinstance(count, int) else count
    if measurement is None:
        return Located.of(factor, _single(locate(factor, task, method=method, count=number)), snr_db=snr_db)
    start, wanted, steps = _start(task, factor, measurement, method, number)
    found = refine(task, *measurement, start, count=wanted, steps=steps)
    chance = found.count_probability if method == "likelihood" else None
    return Located.of(
        factor, found.sources, deviations=found.deviations, count_probability=chance, snr_db=measurement.snr_db
    )


def known_snr(task: Task, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Tensor:
    """The SNR (B,) in dB, estimated where it is NaN: what K_max sources leave of the snapshots is noise."""
    unknown = snr_db.isnan()
    if not bool(unknown.any()):
        return snr_db
    guess = torch.where(unknown, FIRST_SNR_DB, snr_db)
    for _ in range(2):
        atoms = pursuit_sources(task, snapshots, channel, codes, guess, task.max_sources)
        cost = refine(task, snapshots, channel, codes, guess, atoms, steps=2).cost
        energy, size = snapshots.square().sum((1, 2, 3)), snapshots[0].numel() / 2
        sets = 1 if task.symbols == "static" else task.snapshots
        free = max(1.0, size - task.max_sources * (1.5 + sets))
        signal = (energy - cost * size / free).clamp_min(1e-4 * energy)
        guess = torch.where(unknown, 10.0 * (signal * free / (size * cost)).log10(), snr_db)
    return guess


def _start(
    task: Task, factor: Tensor, measurement: Measurement, method: str, count: str | Tensor | None
) -> tuple[Sources, str | Tensor | None, int]:
    """Where the likelihood starts, how many of these it keeps (None: all), and in how many steps."""
    if method == "likelihood":
        return pursuit_sources(task, *measurement, task.max_sources), count, STEPS
    if method == "pursuit":
        atoms = pursuit_sources(task, *measurement, task.max_sources)
        return atoms._replace(count=locate(factor, task, count=count).count), None, 0
    return _single(locate(factor, task, method=method, count=count)), None, 0


def _single(sources: Sources) -> Sources:
    """In the precision of measurements."""
    return Sources(*(each.float() for each in sources[:4]), sources.count)
