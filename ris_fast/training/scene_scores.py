"""The validation scenes one by one: how their errors are spread, and what tells those that are learned from the others.

Legend: B scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ris_fast.physics.scenes import Scenes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 4  # of a quantity that is a number: quarters of the scenes
BLOCKS = 8  # parts of the set in its own order, as files are
SOME = 0.03  # share of scenes
FEWEST = 16  # scenes, below which nothing is said of groups
BY_ORDER = ("index mod 2", "index mod 4", "half of a batch", "part of the set")  # say nothing of what a scene holds


class Division(NamedTuple):
    """One way to divide the scenes: the group of each, (B,) int64, and what the groups are called."""

    of: Tensor
    names: list[str]


def divisions(batches: Sequence[Scenes]) -> dict[str, Division]:
    """Ways to divide these scenes, by what they hold and by where they stand; empty for few scenes."""
    count = torch.cat([each.count for each in batches]).cpu() if batches else torch.zeros(0)
    if len(count) < FEWEST:
        return {}
    index = torch.arange(len(count))
    place = torch.cat([torch.arange(each.batch) * 2 // max(1, each.batch) for each in batches])
    found = {
        "number of sources": Division(count.long(), [str(number) for number in range(int(count.max()) + 1)]),
        "index mod 2": Division(index % 2, ["even", "odd"]),
        "index mod 4": Division(index % 4, ["0", "1", "2", "3"]),
        "half of a batch": Division(place, ["first", "second"]),
        "part of the set": Division(index * BLOCKS // len(index), [f"{n + 1} of {BLOCKS}" for n in range(BLOCKS)]),
    }
    numbers = {
        "SNR (dB)": torch.cat([each.snr_db for each in batches]),
        "azimuth (rad)": _first_source(batches, "azimuth"),
        "elevation (rad)": _first_source(batches, "elevation"),
        "range (m)": _first_source(batches, "range_m"),
    }
    return found | {name: _quarters(each.cpu().float()) for name, each in numbers.items() if each is not None}


def _first_source(batches: Sequence[Scenes], field: str) -> Tensor | None:
    parts = [getattr(each, field) for each in batches]
    return None if any(part is None for part in parts) else torch.cat([part[:, 0] for part in parts])


def _quarters(values: Tensor) -> Division:
    edges = torch.quantile(values[values.isfinite()], torch.linspace(0, 1, BINS + 1)) if len(values) else values
    group = torch.bucketize(values, edges[1:-1]) if len(values) else values.long()
    return Division(group, [f"{low:.3g} to {high:.3g}" for low, high in zip(edges.tolist(), edges.tolist()[1:])])


def scene_summary(nmse: Tensor, groups: Mapping[str, Division]) -> dict[str, Any]:
    """NMSE of each scene, (B,) on the host, in short: quantiles, the best division into two groups of low and of high
    error, and the mean of each group of `groups`. Empty for few scenes, or where one is not finite.

    `split`: of the logarithms, the two groups with the least variance within; `kept` is the share of all variance that
    they leave between them, `between` the share of scenes in the middle half of the way from one mean to the other.
    `by`: name -> [name of the group, scenes, mean NMSE, standard error, share of scenes in the high group]; `told_by`:
    name -> share of the variance of being in the high group that the division explains.
    """
    nmse = nmse.double()
    if len(nmse) < FEWEST or not bool(nmse.isfinite().all()):
        return {}
    found: dict[str, Any] = {
        "scenes": len(nmse),
        "quantiles": torch.quantile(nmse, torch.tensor(QUANTILES, dtype=torch.float64)).tolist(),
        "exactly_one": float(((nmse - 1.0).abs() < 1e-6).double().mean()),
    }
    split, high = _split(nmse)
    if SOME < found["exactly_one"] < 1.0 - SOME:  # an output of zero: these are the group to be told from the others
        high = ((nmse - 1.0).abs() < 1e-6).double()
    by, told_by = {}, {}
    for name, (of, names) in groups.items():
        if len(of) != len(nmse):
            continue
        rows = [(names[number], of == number) for number in of.unique().tolist()]
        by[name] = [
            [label, int(inside.sum()), float(nmse[inside].mean()), _error(nmse[inside]), float(high[inside].mean())]
            for label, inside in rows
        ]
        told_by[name] = _explained(high, [inside for _, inside in rows])
    return found | {"split": split, "by": by, "told_by": told_by}


def _split(nmse: Tensor) -> tuple[dict[str, float], Tensor]:
    """The division, and 1.0 for each scene of the high group, (B,) float64. Otsu's method on sorted logarithms."""
    logs, order = nmse.clamp_min(1e-9).log().sort()
    number = torch.arange(1, len(logs), dtype=torch.float64)
    below = logs.cumsum(0)[:-1]
    mean_low, mean_high = below / number, (logs.sum() - below) / (len(logs) - number)
    between = number * (len(logs) - number) * (mean_high - mean_low).square() / len(logs) ** 2
    at = int(between.argmax())
    low, high = float(mean_low[at]), float(mean_high[at])
    quarter = 0.25 * (high - low)
    inside = ((logs > low + quarter) & (logs < high - quarter)).double().mean()
    flags = torch.zeros_like(nmse)
    flags[order[at + 1 :]] = 1.0
    sorted_nmse = nmse[order]
    return {
        "share_high": 1.0 - (at + 1) / len(logs),
        "low": float(sorted_nmse[: at + 1].mean()),
        "high": float(sorted_nmse[at + 1 :].mean()),
        "kept": float(between[at] / logs.var(unbiased=False).clamp_min(1e-30)),
        "between": float(inside),
    }, flags


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")


def _explained(flags: Tensor, groups: Sequence[Tensor]) -> float:
    total = float(flags.var(unbiased=False))
    if total <= 0.0:
        return 0.0
    between = sum(float(inside.double().mean() * (flags[inside].mean() - flags.mean()).square()) for inside in groups)
    return between / total
