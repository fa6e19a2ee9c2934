"""Preflight of which scenes are served and in which order: each step has scenes of all kinds, as the whole split does,
and all of the split has its turn.

Statistics are one number a scene. Between steps lies a share of their variance that is (G - 1) / (N - 1) by chance,
for N scenes in G steps.
Legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

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
from ris_fast.health.preflight.scenes import DRAWN
from ris_fast.physics.scenes import Scenes

SCENES = 1024  # of the split, at even distances
STEPS, EACH = 3, 4  # at least; scenes of each
ALIKE = 0.4  # share of the variance that lies between steps
SIZE = "number of sources"  # by which batches may be made on purpose, so that nothing is padded
MONOTONE = 0.9  # of the order of the steps, by the mean of their scenes
AWAY = 0.3  # of D between the first steps and the split
WHOLE = 0.9  # of the split: what was served of it is all of it
LIKE_CHANCE = 0.8  # of the different scenes that drawing with replacement finds


class Apart(NamedTuple):
    """A quantity in which steps differ from each other or from the split: by how much, in words, its name, and whether
    it goes one way from step to step."""

    share: float
    words: str
    name: str
    one_way: bool


def order(context: PreflightContext) -> Iterator[Finding]:
    """The scenes of a step are no more alike than those of the split, and the first steps have scenes of all kinds."""
    steps = [Scenes.concatenate(list(group)) for group in context.groups]
    statistics = [labels_and_sizes(scenes) for scenes in steps]
    within = [_alike(name, [each[name] for each in statistics]) for name in statistics[0]]
    if len(steps) < STEPS or min(scenes.batch for scenes in steps) < EACH:
        within = []
    if any(each is not None and each.name == SIZE and not each.one_way for each in within):
        context.note = "batches are made of scenes with as many sources, and come in any order"
        return
    if (found := max(filter(None, within), default=None)) is not None:
        yield Finding(
            "distributions_differ",
            f"{found.words}: scenes come in an order of what they hold, as of the time or the class in which they were"
            " recorded, and each step pulls the weights towards its own kind. Where a curriculum is meant, that is"
            " meant.",
            advice="Draw the order of the scenes anew for each epoch (shuffle=True, or a permutation of all numbers).",
            certain=False,
        )
    elif (found := max(_unlike_the_split(context, steps, statistics), default=None)) is not None:
        if _changes(context, found.name, statistics):
            context.note = "a later epoch serves scenes of other kinds, as in a curriculum"
            return
        yield Finding(
            "distributions_differ",
            f"{found.words}: scenes are served in an order of what they hold, or those of one kind alone. Which of the"
            " two: whether later steps of an epoch have the others. Where a curriculum is meant, that is meant.",
            advice="Draw the order of the scenes anew for each epoch (shuffle=True), from the numbers of all scenes:"
            " look for a filter, a limit or weights of a sampler that are left from a test.",
            certain=False,
        )
    elif seen := context.known.get(DRAWN):
        yield from _drawn_again(context, steps, seen)


def _changes(context: PreflightContext, name: str, statistics: list[dict[str, Tensor]]) -> bool:
    """Whether a quantity has another distribution in a later epoch."""
    if context.later is None or context.later.batch < FEWEST:
        return False
    sets = torch.cat([each[name] for each in statistics]), labels_and_sizes(context.later)[name]
    first, later = (each.double().cpu().sort()[0] for each in sets)
    count = len(first) * len(later) / (len(first) + len(later))
    distance = two_sample_distance(first, later)
    return distance > AWAY / 2 and chance(distance, count) < SIGNIFICANCE


def _drawn_again(context: PreflightContext, steps: list[Scenes], seen: str) -> Iterator[Finding]:
    """Numbers of scenes that come again are no more of them than drawing with replacement finds."""
    size, numbers = context.trainer.source.size("train"), torch.cat([scenes.index for scenes in steps])
    if len(numbers.unique()) > LIKE_CHANCE * size * (1 - (1 - 1 / size) ** len(numbers)):
        context.note = f"scenes are drawn with replacement: {seen}"
        return
    yield Finding(
        "repeated_batch",
        f"{seen}, and no step is like another: numbers of scenes are drawn again and again from a part of the {size}"
        " that there are, as of a subset that is left from a test, or with weights of a sampler that favour few. Which"
        " of the two: how often each number comes in an epoch.",
        certain=False,
    )


def _alike(name: str, parts: list[Tensor]) -> Apart | None:
    """A quantity that is alike within steps."""
    sizes = [len(each) for each in parts]
    values = torch.cat(parts).double().cpu()
    if not bool(values.isfinite().all()) or not float(values.std()) > 0:
        return None
    values = ranks(values)  # no outlier decides
    means = torch.stack([each.mean() for each in values.split(sizes)])
    count, steps = len(values), len(parts)
    between = float((torch.tensor(sizes) * (means - values.mean()).square()).sum())
    share = between / float((values - values.mean()).square().sum())
    if share < ALIKE or _by_chance(share, count, steps) > SIGNIFICANCE:
        return None
    along = float(torch.corrcoef(torch.stack((ranks(means), torch.arange(steps).double())))[0, 1])
    way = "changes" if abs(along) < MONOTONE else "goes up" if along > 0 else "goes down"
    return Apart(
        share,
        f"within the first {steps} steps the {name} {way} from step to step, and {share:.0%} of its variance lies"
        f" between the steps, where {(steps - 1) / (count - 1):.0%} would by chance",
        name,
        abs(along) >= MONOTONE,
    )


def _by_chance(share: float, count: int, steps: int) -> float:
    """A bound of the probability of so large a share: it has the distribution Beta((G - 1) / 2, (N - G) / 2)."""
    size, mean, x = (count - 1) / 2, (steps - 1) / (count - 1), min(share, 1 - 1e-9)
    if x <= mean:
        return 1.0
    return math.exp(-size * (mean * math.log(mean / x) + (1 - mean) * math.log((1 - mean) / (1 - x))))


def _unlike_the_split(
    context: PreflightContext, steps: list[Scenes], statistics: list[dict[str, Tensor]]
) -> Iterator[Apart]:
    """Quantities whose distribution in the first steps is not that of the split, of which these are a part."""
    source, numbers = context.trainer.source, torch.cat([scenes.index for scenes in steps]).cpu()
    size, different = source.size("train"), len(numbers.unique())
    if different < FEWEST or different > WHOLE * size:
        return
    once = torch.zeros(len(numbers), dtype=torch.bool)  # of a number that comes again the last one
    once[torch.stack([(numbers == each).nonzero()[-1, 0] for each in numbers.unique()])] = True
    index = torch.linspace(0, size - 1, min(SCENES, size), dtype=torch.float64).long().to(source.index_device)
    parts = [labels_and_sizes(source.batch("train", part)) for part in index.split(256)]
    for name in statistics[0]:
        first = torch.cat([each[name] for each in statistics]).double().cpu()[once].sort()[0]
        whole = torch.cat([each[name] for each in parts]).double().cpu().sort()[0]
        if not bool(whole.isfinite().all()) or not bool(first.isfinite().all()):
            continue
        distance, count = two_sample_distance(first, whole), len(first) * len(whole) / (len(first) + len(whole))
        if distance > AWAY and chance(distance, count) * len(statistics[0]) < SIGNIFICANCE:
            ends = [f"{float(each[0]):.3g} to {float(each[-1]):.3g}" for each in (first, whole)]
            yield Apart(
                distance,
                f"the {name} of the {different} different scenes of the first {len(statistics)} steps goes from"
                f" {ends[0]}, and in the whole split from {ends[1]} (distance {distance:.2f} of at most 1)",
                name,
                True,
            )


CHECKS = {"scenes come in no order of what they hold": order}
