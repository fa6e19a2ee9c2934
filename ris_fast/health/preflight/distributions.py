"""Preflight of the distribution of the scenes: training beside validation, and both beside the task's settings.

Statistics are one number a scene. Two samples are compared by the largest distance D of their distribution functions
(Kolmogorov, Smirnov), whose significance is divided by the number of tests.
Legend: B batch, K sources (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import listed
from ris_fast.health.preflight.pairing import as_believed, measure_snr, with_factor
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import network_inputs

SCENES, FEWEST = 256, 24
SIGNIFICANCE = 1e-7  # of all tests together, were the two the same
APART = 0.2  # of D, below which a difference is small however many scenes show it
BEYOND_DB, BEYOND = 3.0, 0.02  # beyond a label's own error; share of the scenes that lie there
FEWEST_GROUPS, Z_OF_GROUPS = 5, 8.0  # scenes with one channel; standard deviations between the means of two samples
SHIFTED = 0.1  # of a logarithm or of a mean over the rms, that some few channels do not differ by
NEARER = 0.8  # times D, in a later epoch
WIDE = 0.5  # of the span that the task says, between the outer tenths of the values
UNITS = (  # in which a place may be written: times what gives radians, and metres
    {
        "degrees": math.pi / 180,
        "turns": 2 * math.pi,
        "parts of pi": math.pi,
        "parts of the task's limit": 1.0,
        "milliradians": 1e-3,
    },
    {"kilometres": 1e3, "centimetres": 1e-2, "millimetres": 1e-3, "feet": 0.3048},
)
CAP_DB = 30.0  # of a measured SNR: above it rounding and a slightly different array decide


def distributions(context: PreflightContext) -> Iterator[Finding]:
    """Scenes have the SNR, the number of sources and the places that the task says, and both splits have the same."""
    sets = {"training": _training(context), "validation": context.validation}
    sure, doubtful = [], []
    for what, scenes in sets.items():
        sure += _beyond(context, what, scenes)
        if not sure and context.trainer.source.endless:  # files may be described loosely
            later = context.later if what == "training" else None  # where a curriculum may have the rest
            if later is None or later.batch < FEWEST or _unlike_settings(context, what, later):
                doubtful += _unlike_settings(context, what, scenes)
    for what, scenes in sets.items():
        if other := _other_unit(context, scenes):
            yield Finding("wrong_units", f"of {what} scenes {other}.", certain=False)
            return
    apart = _unlike_each_other(context, *sets.values())
    if apart and context.later is not None and context.later.batch >= FEWEST:
        apart = _unlike_each_other(context, *sets.values(), later=context.later)
        if not apart:
            context.note = "training comes nearer to validation in a later epoch, as in a curriculum"
    files = not context.trainer.source.endless
    if files and sure and not apart:  # a task that describes its files loosely
        context.note = sure[0]
        return
    if sure or apart or doubtful:
        seen = [*sure, *apart, *doubtful]
        yield Finding(
            "distributions_differ",
            f"{'; '.join(seen[:3])}{f'; and {len(seen) - 3} more' if len(seen) > 3 else ''}."
            + ("" if sure and not files else " Where one of the two is shifted on purpose, that is meant."),
            certain=bool(sure) and not files,
        )


def _training(context: PreflightContext) -> Scenes:
    """As the loop serves them; of files from all over the split."""
    source = context.trainer.source
    served = all_scenes(context)
    if source.endless and served.batch >= SCENES // 2:
        return served[:SCENES]
    size = source.size("train")
    return source.batch("train", torch.linspace(0, size - 1, min(SCENES, size)).long().to(source.index_device))


def _beyond(context: PreflightContext, what: str, scenes: Scenes) -> list[str]:
    """Settings that scenes violate by more than any error of measurement."""
    task, found = context.config.task, []
    off = (scenes.snr_db > task.snr_max_db + BEYOND_DB) | (scenes.snr_db < task.snr_min_db - BEYOND_DB)
    if int(off.sum()) > BEYOND * scenes.batch:
        low, high = torch.aminmax(scenes.snr_db)
        found.append(
            f"the SNR of {what} scenes goes from {float(low):.3g} to {float(high):.3g} dB, and the task says"
            f" {task.snr_min_db:g} to {task.snr_max_db:g} ({float(off.float().mean()):.0%} of the scenes lie beyond)"
        )
    most = int(scenes.count.max())
    if most > task.max_sources:
        found.append(f"{what} scenes have up to {most} sources, and the task says {task.max_sources}")
    return found


def _unlike_settings(context: PreflightContext, what: str, scenes: Scenes) -> list[str]:
    """Statistics of simulated scenes that are not the uniform distributions which the task asks for."""
    task, found = context.config.task, []
    if scenes.batch < FEWEST:
        return []
    steps = torch.arange(task.max_sources + 1) / task.max_sources
    wanted = {"number of sources": (scenes.count.float(), None)}
    for name, values, low, high in (
        ("SNR in dB", scenes.snr_db, task.snr_min_db, task.snr_max_db),
        ("azimuth in rad", _first(scenes.azimuth), -math.radians(task.azimuth_deg), math.radians(task.azimuth_deg)),
        ("elevation in rad", _first(scenes.elevation), *_ends(task.elevation_deg)),
        ("range in m", _first(scenes.range_m), task.range_min_m, task.range_max_m),
    ):
        if values is not None and high > low:
            wanted[name] = (values, (low, high))
    for name, (values, ends) in wanted.items():
        values = values.double().cpu().sort()[0]
        if ends is None:
            own = torch.stack([(values <= k).double().mean() for k in range(task.max_sources + 1)])
            distance = float((own - steps).abs().max())
        else:
            expected = ((values - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)
            at = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
            distance = float(torch.maximum(at[1:] - expected, expected - at[:-1]).max())
        if distance > APART and chance(distance, len(values)) * len(wanted) * 2 < SIGNIFICANCE:
            found.append(f"the {name} of {what} scenes is not spread as the task says: {_shown(values)}")
    return found


def _other_unit(context: PreflightContext, scenes: Scenes) -> str:
    """A place of the first source that is as the task says in another unit, and not in its own; '' where none is."""
    task = context.config.task
    for name, values, low, high in (
        ("azimuth", scenes.azimuth, *_ends(task.azimuth_deg)),
        ("elevation", scenes.elevation, *_ends(task.elevation_deg)),
        ("range", scenes.range_m, task.range_min_m, task.range_max_m),
    ):
        values = _first(values)
        if values is None or scenes.batch < FEWEST or not high > low:
            continue
        slack = 0.01 * (high - low)
        for unit, factor in UNITS[name == "range"].items():
            fits = [
                float(((each > low - slack) & (each < high + slack)).float().mean())
                for each in (values, factor * values)
            ]
            spread = [float((factor * values).quantile(q)) for q in (0.1, 0.9)]
            if spread[1] - spread[0] < WIDE * (high - low) or fits[1] < 1 - BEYOND:
                continue
            inside = float((values.quantile(0.9) - values.quantile(0.1)).abs()) / (high - low)
            if fits[0] < BEYOND or factor > 1 and inside < WIDE / 4:
                return (
                    f"the {name} goes from {float(values.min()):.3g} to {float(values.max()):.3g} where the task says"
                    f" {low:.3g} to {high:.3g} {'m' if name == 'range' else 'rad'}; in {unit} it would fit"
                )
    return ""


def _ends(degrees: float) -> tuple[float, float]:
    return -math.radians(degrees), math.radians(degrees)


def _first(values: Tensor | None) -> Tensor | None:
    """Of the first source, which every scene has."""
    return None if values is None else values[:, 0]


def _unlike_each_other(
    context: PreflightContext, training: Scenes, validation: Scenes, later: Scenes | None = None
) -> list[str]:
    """Statistics in which training and validation scenes differ by more than chance, the largest difference first.
    Args: later: scenes of training that count as well: what differs less in them is left out."""
    if min(training.batch, validation.batch) < FEWEST:
        return []
    one, other = (_statistics(context, scenes) for scenes in (training, validation))
    then = {} if later is None else _statistics(context, later)
    if _masked(training) and not _masked(validation):  # an augmentation, which is seen in all that is made of them
        kept = [name for name in one if not any(each in name for each in ("snapshots", "feature", "measured"))]
        one = {name: one[name] for name in kept}
    found: dict[str, tuple[float, str]] = {}
    tests = len(one.keys() & other.keys())
    groups = [_same_channels(scenes) for scenes in (training, validation)]
    for name in one.keys() & other.keys():
        finite = [each[name].isfinite() for each in (one, other)]
        sizes = [  # what is measured in some scenes alone has no number of a channel for each
            _independent(each[name][kept].double().cpu(), group[kept.cpu()])
            if len(kept) == len(group)
            else float(kept.sum())
            for each, kept, group in zip((one, other), finite, groups)
        ]
        a, b = (each[name][kept].double().cpu().sort()[0] for each, kept in zip((one, other), finite))
        if min(len(a), len(b)) < FEWEST:
            continue
        distance = two_sample_distance(a, b)
        if name in then and two_sample_distance(then[name].double().cpu().sort()[0], b) < NEARER * distance:
            continue
        if distance > APART and _beyond_chance(a, b, distance, sizes, SIGNIFICANCE / tests):
            found[name] = (distance, f"{name}: training {_shown(a)}, validation {_shown(b)}")
    names = sorted(found, key=lambda name: -found[name][0])
    if not names:
        return []
    return [
        f"training and validation scenes differ in {listed(names)} (by more than chance, distance"
        f" {found[names[0]][0]:.2f} of at most 1); {'; '.join(found[name][1] for name in names[:2])}"
    ]


def _same_channels(scenes: Scenes) -> Tensor:
    """The number of each scene's channel among the different ones, (B,), as where a few were measured and many scenes
    were made with each; a number for each scene where there are no channels."""
    if scenes.channel is None:
        return torch.arange(scenes.batch)
    return scenes.channel.flatten(1).cpu().unique(dim=0, return_inverse=True)[1]


def _independent(values: Tensor, group: Tensor) -> float:
    """As how many independent scenes these count, (B,), where those of one group are alike in part or in full.

    Model: of groups of m with the correlation r within a group, B / (1 + (m - 1) r).
    """
    counts = group.bincount()
    groups = int((counts > 0).sum())
    if groups == len(values) or len(values) < 2 or not float(values.var()) > 0:
        return float(len(values))
    means = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, group, values) / counts.clamp_min(1)
    within = float((values - means[group]).square().sum()) / max(1, len(values) - groups)
    alike = min(1.0, max(0.0, 1.0 - within / float(values.var())))
    return len(values) / (1.0 + (float(counts.square().sum()) / len(values) - 1.0) * alike)


def _beyond_chance(a: Tensor, b: Tensor, distance: float, sizes: list[float], significance: float) -> bool:
    """Whether two samples differ, sorted, that count as so many independent scenes."""
    as_if = [float(len(a)), float(len(b))]
    if chance(distance, as_if[0] * as_if[1] / sum(as_if)) >= significance:
        return False
    if sizes == as_if or chance(distance, sizes[0] * sizes[1] / sum(sizes)) < significance:
        return True
    # A distance of distribution functions says little of a few groups; how far their means are apart says more.
    shift = abs(float(a.mean() - b.mean()))
    if min(sizes) < FEWEST_GROUPS:  # too few to say how much groups differ by chance
        return shift > SHIFTED
    return shift > Z_OF_GROUPS * math.sqrt(sum(float(each.var()) / size for each, size in zip((a, b), sizes)))


def _masked(scenes: Scenes) -> bool:
    """Whether zeros stand among the snapshots of some scenes, in other places of each."""
    zero = (scenes.snapshots == 0).all(-1)
    mixed = zero[(zero.flatten(1).any(1)) & ~zero.flatten(1).all(1)]
    return len(mixed) > 1 and bool((mixed != mixed[:1]).any())


def two_sample_distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two empirical distribution functions. Args: a, b: sorted, float64, (A,) and (B,)."""
    at = torch.cat((a, b))
    share = [torch.searchsorted(each, at, right=True).double() / len(each) for each in (a, b)]
    return float((share[0] - share[1]).abs().max())


def chance(distance: float, scenes: float) -> float:
    """The probability of so large a distance by chance, for so many scenes (of two samples n m / (n + m))."""
    root = math.sqrt(scenes)
    size = (root + 0.12 + 0.11 / root) * distance
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * size) ** 2) for k in range(1, 20))))


def ranks(values: Tensor) -> Tensor:
    """The rank of each number; equal ones share theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts / 2)[group].double()


def _shown(values: Tensor) -> str:
    """Median and ends."""
    low, middle, high = (float(each) for each in (values.min(), values.median(), values.max()))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def labels_and_sizes(scenes: Scenes) -> dict[str, Tensor]:
    """Name -> (B,); of what is there: what scenes are labelled with, and how large their parts are."""
    found = {"labelled SNR in dB": scenes.snr_db, "number of sources": scenes.count.float()}
    for name, values in (
        ("azimuth", scenes.azimuth),
        ("elevation", scenes.elevation),
        ("range", scenes.range_m),
        ("power", None if scenes.power is None else scenes.power.clamp_min(1e-30).log10()),
    ):
        if values is not None:
            found[f"{name} of the first source"] = values[:, 0]
    for name, values in (
        ("snapshots", scenes.snapshots),
        ("channel", scenes.channel),
        ("target", scenes.factor if scenes.factor is not None else scenes.covariance),
    ):
        if values is not None:
            flat = values.flatten(1)
            found[f"mean square of the {name} (log10)"] = flat.square().mean(1).clamp_min(1e-30).log10()
            found[f"mean of the {name} over its rms"] = flat.mean(1) / flat.square().mean(1).sqrt().clamp_min(1e-30)
    return found


@torch.no_grad()
def _statistics(context: PreflightContext, scenes: Scenes) -> dict[str, Tensor]:
    """Name -> (B,). The SNR that snapshots have is measured in the scenes that allow it alone."""
    found = labels_and_sizes(scenes)
    believed = as_believed(with_factor(scenes), context.config.task)
    if believed.channel is not None and believed.factor is not None:
        measured = measure_snr(believed, context.config.task.symbols == "static")
        found["measured SNR in dB"] = measured.measured_db.clamp_max(CAP_DB)
    for number, values in enumerate(_features(context, scenes)):
        flat = values.detach().float().reshape(scenes.batch, -1)
        found[f"mean square of feature tensor {number} (log10)"] = flat.square().mean(1).clamp_min(1e-30).log10()
        found[f"mean of feature tensor {number}"] = flat.mean(1)
    return found


def _features(context: PreflightContext, scenes: Scenes) -> list[Tensor]:
    """What the network is shown of the scenes, as training asks for it: (B, ...) each."""
    made = context.model.features(*network_inputs(scenes))
    return [
        value
        for value in (made if isinstance(made, (tuple, list)) else [made])
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and value.shape[0] == scenes.batch
    ]


CHECKS = {"training, validation and task agree in distribution": distributions}
