"""From a factor, and a measurement where there is one, to sources with standard deviations: one call for every network.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_fast.config.schema import ConfigError, Task
from ris_fast.data.measurements import Measured
from ris_fast.inference.located import Located
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.likelihood import refine
from ris_fast.localize.locate import locate
from ris_fast.localize.noise import estimate_snr
from ris_fast.localize.order import CRITERIA
from ris_fast.localize.sources import Sources

METHODS = ("likelihood", "music", "mvdr", "pursuit")
STEPS = 2  # of Gauss-Newton before sources are removed: starts are near
NEED_MEASUREMENT = ("likelihood", "pursuit")


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
    measured: Measured | None = None,
    *,
    method: str,
    count: int | str | Tensor | None,
    atoms: bool = False,
) -> Located:
    """The sources of covariances F F^H; where the channel is known, with powers in the units of the measurement.

    Model: 'likelihood' starts from the peaks of the factor's spectrum or the atoms of a pursuit, brings down
        |y - G A s|^2, and keeps as many sources as the description length pays for; the other methods leave the
        positions where they are.
    Args: factor (B, N, Q, 2); measured: of the same scenes, see `with_snr`; method: one of `METHODS`; count: a number,
        (B,), 'mdl', 'aic', or None for as many as the factor has; atoms: start from the pursuit, as a network that is
        fed by one does.
    """
    count = torch.full(factor.shape[:1], count, device=factor.device) if isinstance(count, int) else count
    if measured is None or measured.channel is None:
        snr_db = None if measured is None else measured.snr_db
        return Located.of(factor, _peaks(task, factor, method, count), snr_db=snr_db)
    inputs = _inputs(measured)
    if method == "likelihood":
        given = None if isinstance(count, str) else count
        near = pursuit_sources(task, *inputs) if atoms else _peaks(task, factor, "music", given)
        found = refine(task, *inputs, near, count=count, steps=STEPS)
    else:
        found = refine(task, *inputs, _start(task, factor, inputs, method, count), steps=0)
    chance = found.count_probability if isinstance(count, str) else None
    return Located.of(
        factor, found.sources, deviations=found.deviations, count_probability=chance, snr_db=measured.snr_db
    )


def _start(
    task: Task, factor: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], method: str, count: Tensor | None
) -> Sources:
    """What a method finds without the likelihood."""
    if method != "pursuit":
        return _peaks(task, factor, method, count)
    return pursuit_sources(task, *inputs, count="order" if count is None else count)


def _inputs(measured: Measured) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert measured.channel is not None
    return measured.snapshots, measured.channel, measured.codes, measured.snr_db


def _peaks(task: Task, factor: Tensor, method: str, count: Tensor | None = None) -> Sources:
    """Of the factor's spectrum, in the precision of measurements."""
    sources = locate(factor, task, method=method, count=count)
    return Sources(*(each.float() for each in sources[:4]), sources.count)


def with_snr(task: Task, measured: Measured) -> Measured:
    """The same with an estimated SNR where it was NaN. Raises: ValueError where the channel is not known, without which
    there is no estimate."""
    unknown = measured.snr_db.isnan()
    if not bool(unknown.any()):
        return measured
    if measured.channel is None:
        raise ValueError("predict: snr_db is not known, and cannot be estimated without the channel. Give it.")
    estimate = estimate_snr(task, *_inputs(measured)[:3])
    return measured._replace(snr_db=torch.where(unknown, estimate, measured.snr_db))
