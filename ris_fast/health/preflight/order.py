"""Preflight of the order in which scenes are served: each step has scenes of all kinds, as the whole split does.

Statistics are one number a scene. Between steps lies a share of their variance that is (G - 1) / (N - 1) by chance,
for N scenes in G steps.
Legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.distributions import (
    FEWEST,
    SIGNIFICANCE,
    chance,
    labels_and_sizes,
    ranks,
    two_sample_distance,
)
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.physics.scenes import Scenes

SCENES = 1024  # of the split, at even distances
STEPS, EACH = 3, 4  # at least; scenes of each
ALIKE = 0.4  # share of the variance that lies between steps
SIZE = "number of sources"  # by which batches may be made on purpose, so that nothing is padded
MONOTONE = 0.9  # of the order of the steps, by the mean of their scenes
AWAY = 0.3  # of D between the first steps and the split


def order(context: PreflightContext) -> Iterator[Finding]:
    """The scenes of a step are no more alike than those of the split, and the first steps have scenes of all kinds."""
    steps = [Scenes.concatenate(list(group)) for group in context.groups]
    sizes = [scenes.batch for scenes in steps]
    statistics = [labels_and_sizes(scenes) for scenes in steps]
    seen = [_alike(name, [each[name] for each in statistics]) for name in statistics[0]] if len(steps) >= STEPS else []
    if any(each is not None and each[2] == SIZE and not each[3] for each in seen):
        context.note = "batches are made of scenes with as many sources, and come in any order"
        return
    if min(sizes) < EACH or not any(seen):
        seen = _unlike_the_split(context, statistics, sum(sizes))
    found = sorted(filter(None, seen), reverse=True)
    if not found:
        return
    yield Finding(
        "distributions_differ",
        f"{found[0][1]}{f' ({len(found) - 1} more quantities are like that)' if len(found) > 1 else ''}: scenes come in"
        " an order of what they hold, as of the time or the class in which they were recorded, and each step pulls the"
        " weights towards its own kind. Where a curriculum is meant, that is meant.",
        advice="Draw the order of the scenes anew for each epoch (shuffle=True, or a permutation of all numbers).",
        certain=False,
    )


def _alike(name: str, parts: list[Tensor]) -> tuple[float, str, str, bool] | None:
    """A quantity that is alike within steps: its share between steps, in words, its name, and whether it goes one way
    from step to step."""
    parts = [each.double().cpu() for each in parts]
    values = torch.cat(parts)
    if not bool(values.isfinite().all()) or not float(values.std()) > 0:
        return None
    values = ranks(values)  # no outlier decides
    parts = list(values.split([len(each) for each in parts]))
    means = torch.stack([each.mean() for each in parts])
    count, steps = len(values), len(parts)
    weights = torch.tensor([len(each) for each in parts], dtype=torch.float64)
    share = float((weights * (means - values.mean()).square()).sum() / (values - values.mean()).square().sum())
    if share < ALIKE or _by_chance(share, count, steps) > SIGNIFICANCE:
        return None
    along = float(torch.corrcoef(torch.stack((ranks(means), torch.arange(steps).double())))[0, 1])
    monotone = abs(along) > MONOTONE
    way = ("goes up" if along > 0 else "goes down") if monotone else "changes"
    return (
        share,
        f"within the first {steps} steps the {name} {way} from step to step, and {share:.0%} of its variance lies"
        f" between the steps, where {(steps - 1) / (count - 1):.0%} would by chance",
        name,
        monotone,
    )


def _by_chance(share: float, count: int, steps: int) -> float:
    """A bound of the probability of so large a share: it has the distribution Beta((G - 1) / 2, (N - G) / 2)."""
    size, mean, x = (count - 1) / 2, (steps - 1) / (count - 1), min(share, 1 - 1e-9)
    if x <= mean:
        return 1.0
    return math.exp(-size * (mean * math.log(mean / x) + (1 - mean) * math.log((1 - mean) / (1 - x))))


def _unlike_the_split(
    context: PreflightContext, statistics: list[dict[str, Tensor]], served: int
) -> list[tuple[float, str, str, bool] | None]:
    """Quantities whose distribution in the first steps is not that of the split, where these are a part of it."""
    source = context.trainer.source
    size = source.size("train")
    if served < FEWEST or 2 * served > size:
        return []
    index = torch.linspace(0, size - 1, min(SCENES, size)).long().to(source.index_device)
    parts = [labels_and_sizes(source.batch("train", part)) for part in index.split(256)]
    found: list[tuple[float, str, str, bool] | None] = []
    for name in statistics[0]:
        whole, first = (
            torch.cat([each[name] for each in group]).double().cpu().sort()[0] for group in (parts, statistics)
        )
        if not bool(whole.isfinite().all()) or not bool(first.isfinite().all()):
            continue
        distance = two_sample_distance(first, whole)
        count = len(first) * len(whole) / (len(first) + len(whole))
        if distance > AWAY and chance(distance, count) * len(statistics[0]) < SIGNIFICANCE:
            found.append(
                (
                    distance,
                    f"the {name} of the scenes of the first {len(statistics)} steps goes from"
                    f" {float(first[0]):.3g} to {float(first[-1]):.3g}, and in the whole split from"
                    f" {float(whole[0]):.3g} to {float(whole[-1]):.3g}",
                    name,
                    True,
                )
            )
    return found


CHECKS = {"scenes come in no order of what they hold": order}
