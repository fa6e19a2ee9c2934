"""Preflight of the scenes as they are served: broken, empty, repeated, or in two splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ris_fast.data.fingerprints import Overlap, find_overlap, scene_hashes
from ris_fast.data.shards import verify_manifest
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.rereads import MASKED
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.telemetry.step_telemetry import row_hashes

PLACES = ("azimuth", "elevation", "range_m")
HASHED, VALIDATED = 4096, 256  # scenes of training and of validation
BITS, ENOUGH = 256, 4096  # values of a byte; numbers that would have more
COMPARED = 2048  # scenes of training, with each of validation
LARGE = 32  # numbers of a channel or of snapshots, below which many are alike by chance
BY_CHANCE = 3.0  # times as many pairs of two splits are nearly alike as are alike
ALIKE, NEAR = 0.9, 0.7  # of two that are copies up to noise; of two that are alike
# share of pairs within training that are copies, at most; share that are alike, from which copies are held to those
# that are no copies: of a small array many are more or less alike; share of validation scenes
SPARSE, FEW_PAIRS, BETWEEN, FEW_ALIKE = 0.1, 0.02, 0.4, 0.1
DRAWN = "drawn again"  # what is seen of scenes whose numbers come again in one epoch: in `known` of the context
FEW = 4  # of the first scenes, one in so many may be copies of others in the data; a batch that comes again is more


def all_scenes(context: PreflightContext) -> Scenes:
    """The training scenes of the first steps, together."""
    return Scenes.concatenate([scenes for group in context.groups for scenes in group])


def finite(context: PreflightContext) -> Iterator[Finding]:
    """No scene carries NaN or infinity."""
    for split, scenes in (("train", all_scenes(context)), ("val", context.validation)):
        for name in ("snapshots", "channel", "factor", "covariance", "snr_db", *PLACES):
            value = getattr(scenes, name)
            if value is None:
                continue
            if (
                name in PLACES and scenes.power is not None and scenes.power.shape == value.shape
            ):  # what stands where no source is, is another matter
                value = torch.where(scenes.power > 0, value, 0.0)
            bad = (~value.flatten(1).isfinite()).any(1) if value.dim() > 1 else ~value.isfinite()
            if bool(bad.any()):
                first = int(scenes.index[bad][0])
                yield Finding(
                    "nonfinite_data",
                    f"{int(bad.sum())} of {scenes.batch} {split} scenes have a {name} that is not "
                    f"finite, first scene {first}.",
                )
                return


def distinct(context: PreflightContext) -> Iterator[Finding]:
    """No scene of the first steps is there twice, none is empty, and inputs and targets differ between scenes."""
    for what, scenes in (("training", all_scenes(context)), ("validation", context.validation)):
        if not context.known.get((MASKED, what)):  # a mask may take out all of a scene
            yield from _filled(what, scenes)
    yield from _repeats(context, all_scenes(context))


def _filled(what: str, scenes: Scenes) -> Iterator[Finding]:
    """No scene is empty, and not all have one target."""
    empty = (scenes.snapshots.flatten(1) == 0).all(1)
    if scenes.channel is not None:
        empty |= (scenes.channel.flatten(1) == 0).all(1)
    target = scenes.factor if scenes.factor is not None else scenes.covariance
    empty |= (target.flatten(1) == 0).all(1) & (scenes.count > 0)
    distinct = _few_values(scenes.snapshots)
    if bool(empty.any()) and not bool(empty.all()) and distinct:
        yield Finding(
            "inputs_withhold_answer",
            f"the snapshots of {scenes.batch} {what} scenes, {scenes.snapshots.numel()} numbers, have {distinct}"
            f" different values, and {int(empty.sum())} scenes are zeros, first scene {int(scenes.index[empty][0])}:"
            " they are rounded to steps that are larger than the signal.",
            advice="Round each scene in steps of its own size, or store snapshots in float32.",
        )
    elif bool(empty.any()) and not bool(empty.all()):
        yield Finding(
            "empty_cache_slot",
            f"{int(empty.sum())} of the first {scenes.batch} {what} scenes have snapshots, a channel or"
            f" a target of zeros, first scene {int(scenes.index[empty][0])}.",
        )
    if scenes.batch > 2 and bool((target == target[:1]).all()):
        yield Finding("constant_targets", f"all of the first {scenes.batch} {what} scenes have the same target.")


def _few_values(values: Tensor) -> int:
    """How many different numbers there are, where they are as few as a handful of bits has; else 0."""
    if values.numel() < ENOUGH or not bool(values.isfinite().all()):
        return 0
    count = len(values[: max(1, ENOUGH // max(1, values[0].numel()))].unique())
    return len(values.unique()) if 1 < count <= BITS else 0


def _repeats(context: PreflightContext, scenes: Scenes) -> Iterator[Finding]:
    hashes = row_hashes(scenes.snapshots)[~(scenes.snapshots.flatten(1) == 0).all(1)]
    different = len(hashes.unique())
    first = context.groups[0]
    batch = [row_hashes(each.snapshots) for each in first]
    again = len(hashes) - different
    if 0 < again <= len(hashes) // FEW and _copies(scenes) and not _other_labels(scenes):
        context.note = (
            f"{again} of the first {len(hashes)} scenes are copies of others in the data, under numbers of their own"
        )
        return
    if again < max(1, len(hashes) // 100):
        return
    seen = f"the first {len(context.groups)} steps serve {len(hashes)} scenes, of which {different} are different"
    if _other_labels(scenes):
        yield Finding(
            "stale_cache",
            f"{seen}, and the targets of equal snapshots differ: snapshots are left from an earlier batch.",
        )
        return
    if len(batch[0]) > 1 and all(len(each.unique()) == 1 for each in batch if len(each) > 1):
        yield Finding("constant_input", f"{seen}: every scene of a batch shows the same snapshots.")
        return
    if len(first) > 1 and all(
        torch.equal(each.sort()[0], batch[0].sort()[0]) for each in batch if len(each) == len(batch[0])
    ):
        yield Finding(
            (
                "rank_sees_other_data"
                if len(torch.cat([row_hashes(g[0].snapshots) for g in context.groups]).unique()) > len(batch[0])
                else "repeated_batch"
            ),
            f"{seen}: all {len(first)} parts of a step have the same scenes.",
        )
        return
    whole = {
        tuple(sorted(torch.cat([row_hashes(each.snapshots) for each in group]).tolist())) for group in context.groups
    }
    # Numbers come again, and not scenes under numbers of their own, and no step is like another.
    if len(scenes.index.unique()) <= different and len(whole) == len(context.groups):
        context.known[DRAWN] = seen
        return
    yield Finding("repeated_batch", f"{seen}: batches come again.")


def _copies(scenes: Scenes) -> bool:
    """Whether equal scenes have numbers of their own: the data hold them twice, and each number is served once."""
    return len(scenes.index.unique()) == scenes.batch


def _other_labels(scenes: Scenes) -> bool:
    """Whether some scenes with the same snapshots have other targets."""
    target = row_hashes(scenes.factor if scenes.factor is not None else scenes.covariance)
    pairs = torch.stack([row_hashes(scenes.snapshots), target], 1)
    full = len(pairs.unique(dim=0)) - len(pairs[:, 0].unique())
    return full > len(pairs) // 50 and len(target.unique()) > len(pairs[:, 0].unique())


def splits(context: PreflightContext) -> Iterator[Finding]:
    """No validation scene is a training scene, by the bytes of its snapshots."""
    source = context.trainer.source
    # Of files, the reader compared every scene; what is served may differ.
    read = [each for each in getattr(source, "overlaps", ()) if (each.first, each.second) == ("train", "val")]
    for overlap in (*read, _overlap(source)):
        if overlap.count:
            if (other := _other_targets(source)) is not None:
                yield other
                return
            yield Finding("split_overlap", f"{overlap}.", advice=_fresh_split(source))
            return
    yield from _same_places(source)


def _same_places(source: Any) -> Iterator[Finding]:
    """No validation scene is a training scene by its snapshots, up to noise, a phase and a scale, nor by its channel
    and its target."""
    validation = source.batch("val", _first(source, "val", VALIDATED)[0])
    within: dict[str, Tensor] = {}
    parts, numbers = [], []
    for index in _first(source, "train", COMPARED):
        training = source.batch("train", index)
        within = within or _likeness_by_part(training, training)
        parts.append(_likeness_by_part(validation, training))
        numbers.append(training.index)
    for name, values in within.items():
        likeness = torch.cat([part[name] for part in parts], 1)
        found = likeness > ALIKE
        many = found.any(1)
        # Scenes that are alike more or less, as through a channel that is fixed or of low rank, say nothing.
        copies, near = (float((values.fill_diagonal_(0.0) > least).float().mean()) for least in (ALIKE, NEAR))
        usual = near > FEW_PAIRS and near - copies > BETWEEN * copies
        by_chance = int((likeness > NEAR).sum()) > (1 + BY_CHANCE) * int(found.sum())
        if copies > SPARSE or usual or by_chance or int(many.sum()) <= FEW_ALIKE * len(many):
            continue
        first = int(many.nonzero()[0, 0])
        whose = int(torch.cat(numbers)[int(found[first].nonzero()[0, 0])])
        yield Finding(
            "split_overlap",
            f"{int(many.sum())} of {validation.batch} validation scenes have the {name} of a training scene, and other"
            f" bytes: first scene {int(validation.index[first])}, which is like training scene {whose}. Windows of one"
            " recording, or augmented copies of one scene, are in both splits, or one set of places is meant to be"
            " known.",
            advice="Split by recording, or by place, before scenes are cut or augmented. To test it: validate on"
            " recordings that training has nothing of, and compare.",
            certain=False,
        )
        return


def _likeness_by_part(some: Scenes, others: Scenes) -> dict[str, Tensor]:
    """How much some scenes are like others, by what: (A, B) in [0, 1] each."""
    found = {}
    if some.snapshots[0].numel() >= LARGE:
        found["snapshots, up to noise, a phase and a scale,"] = _likeness(some.snapshots, others.snapshots)
    if some.channel is not None and some.channel[0].numel() >= LARGE:
        targets = [scenes.covariance if scenes.factor is None else scenes.factor for scenes in (some, others)]
        same = row_hashes(targets[0])[:, None] == row_hashes(targets[1])
        found["channel and the target"] = same * _likeness(some.channel, others.channel)
    return found


def _first(source: Any, split: str, most: int) -> Sequence[Tensor]:
    """The numbers of the first scenes."""
    return torch.arange(min(most, source.size(split))).to(source.index_device).split(256)


def _likeness(one: Tensor, other: Tensor) -> Tensor:
    """Of each of some with each of others, the size of the cosine between their complex numbers, (A, B) in [0, 1]."""
    a, b = (to_complex(each).flatten(1) for each in (one, other))
    a, b = (each / each.abs().square().sum(1, keepdim=True).sqrt().clamp_min(1e-30) for each in (a, b))
    return (a @ b.mH).abs()


def _other_targets(source: Any) -> Finding | None:
    """Scenes of two splits with the same snapshots and different targets: they are not the same scenes, and inputs are
    served that are another's."""
    known = {shown: (target, index) for shown, target, index in _hashed(source, "train", HASHED)}
    validated = _hashed(source, "val", VALIDATED)
    pairs = [(target, index, *known[shown]) for shown, target, index in validated if shown in known]
    differ = [(index, other) for target, index, wanted, other in pairs if target != wanted]
    if not 2 * len(differ) > len(pairs):
        return None
    return Finding(
        "stale_cache",
        f"{len(differ)} of {len(validated)} validation scenes have the snapshots of a training scene, by their bytes,"
        " and"
        f" another target, first scene {differ[0][0]} those of training scene {differ[0][1]}: something keeps inputs"
        " by a"
        " key that scenes of both splits share, such as their number.",
        advice="Key what is kept by the split and the number, or keep the whole scene with its target.",
    )


def _hashed(source: Any, split: str, most: int) -> list[tuple[int, int, int]]:
    """Of the first scenes of a split: hash of the snapshots, hash of the target, number."""
    found = []
    for part in torch.arange(min(most, source.size(split))).split(512):
        scenes = source.batch(split, part)
        target = scenes.factor if scenes.factor is not None else scenes.covariance
        columns = (row_hashes(scenes.snapshots), row_hashes(target), scenes.index)
        found += zip(*(column.tolist() for column in columns))
    return found


def _fresh_split(source: Any) -> str:
    """What someone who has the files can do: a folder without train/ is split by number."""
    if source.name != "npz":
        return ""
    train = source.path / "train"
    if not train.is_dir():
        return "Remove the scenes that are in the files twice: all splits are taken from them, by number."
    return (
        f"Give --data {train}: all of its scenes are then split by number, so that no scene is in two splits. Or"
        " generate val/ and test/ again, from random streams of their own."
    )


def _overlap(source: Any) -> Overlap:
    """The first validation scenes among the first training scenes."""

    def hashes(split: str, most: int) -> list[int]:
        index = torch.arange(min(most, source.size(split)))
        return [value for part in index.split(512) for value in scene_hashes(source.batch(split, part).snapshots)]

    return find_overlap("train", hashes("train", HASHED), "val", hashes("val", VALIDATED))


def manifest(context: PreflightContext) -> Iterator[Finding]:
    """What training reads of a data set has the statistics that its manifest promises; nothing to compare in a
    simulation."""
    wrong = verify_manifest(context.trainer.source, contents=False)
    if wrong:
        yield Finding(
            "manifest_differs", f"{wrong[0]}{f' ({len(wrong) - 1} more differences)' if len(wrong) > 1 else ''}."
        )


CHECKS = {
    "scenes are finite": finite,
    "scenes differ": distinct,
    "validation shares no scene with training": splits,
    "scenes are those of their manifest": manifest,
}
