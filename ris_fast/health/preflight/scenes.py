"""Preflight of the scenes: repeated, stale, empty, mixed up or not the physics that they claim to be.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ris_fast.data.fingerprints import Overlap, find_overlap, scene_hashes
from ris_fast.data.shards import verify_manifest
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.pairing import DEVIATIONS, HALF, WHOLE, Belonging, belonging, with_factor
from ris_fast.health.preflight.probe import FEWEST, PreflightContext
from ris_fast.health.preflight.snr import labels_differ
from ris_fast.physics.real_complex import conj
from ris_fast.physics.scenes import Scenes
from ris_fast.training.telemetry.step_telemetry import row_hashes

COMPARED = 64  # scenes of the loop whose parts are compared
SPREAD, RUN = 256, 8  # scenes of files, in runs of consecutive ones
TRIED, PAIR_BUDGET = 8, 4e9  # scenes that are tried with the parts of others; numbers (y times factor) of all pairs
MATCH = 0.9  # of the belonging of a loud scene, from which its parts are of one scene
HASHED = 4096
FEW = 4  # of the first scenes, one in so many may be copies of others in the data; a batch that comes again is more
NO_SIGNAL = (
    "Look at how y is made: noise in place of signal, a channel that was drawn again, or rows of scenes far from each"
    " other. Each y must come from the H_full, the codes and the sources of its own row."
)
NO_SOURCES = (
    "Look at how R is made: the order of its elements, the array and the wavelength; then whether its rows are those"
    " of y."
)
PARTS = (("shuffled_labels", "factor"), ("mismatched_channel", "channel"), ("stale_cache", "snapshots"))


def _all(context: PreflightContext) -> Scenes:
    return Scenes.concatenate([scenes for group in context.groups for scenes in group])


def finite(context: PreflightContext) -> Iterator[Finding]:
    """No scene carries NaN or infinity."""
    for split, scenes in (("train", _all(context)), ("val", context.validation)):
        for name in ("snapshots", "channel", "factor", "covariance", "snr_db"):
            value = getattr(scenes, name)
            if value is None:
                continue
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
    yield from _filled("training", _all(context))
    yield from _filled("validation", context.validation)
    yield from _repeats(context, _all(context))


def _filled(what: str, scenes: Scenes) -> Iterator[Finding]:
    """No scene is empty, and not all have one target."""
    empty = (scenes.snapshots.flatten(1) == 0).all(1)
    if scenes.channel is not None:
        empty |= (scenes.channel.flatten(1) == 0).all(1)
    if bool(empty.any()) and not bool(empty.all()):
        yield Finding(
            "empty_cache_slot",
            f"{int(empty.sum())} of the first {scenes.batch} {what} scenes have snapshots or a channel "
            f"of zeros, first scene {int(scenes.index[empty][0])}.",
        )
    target = scenes.factor if scenes.factor is not None else scenes.covariance
    if scenes.batch > 2 and bool((target == target[:1]).all()):
        yield Finding("constant_targets", f"all of the first {scenes.batch} {what} scenes have the same target.")


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
    elif len(first) > 1 and all(
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
    else:
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
            yield Finding("split_overlap", f"{overlap}.", advice=_fresh_split(source))
            return


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

    def hashes(split: str, most: int) -> list[bytes]:
        index = torch.arange(min(most, source.size(split)))
        return [value for part in index.split(512) for value in scene_hashes(source.batch(split, part).snapshots)]

    return find_overlap("train", hashes("train", HASHED), "val", hashes("val", 256))


def manifest(context: PreflightContext) -> Iterator[Finding]:
    """What training reads of a data set has the statistics that its manifest promises; nothing to compare in a
    simulation."""
    wrong = verify_manifest(context.trainer.source, contents=False)
    if wrong:
        yield Finding(
            "manifest_differs", f"{wrong[0]}{f' ({len(wrong) - 1} more differences)' if len(wrong) > 1 else ''}."
        )


# ---- the physics ----------------------------------------------------------------------------------------------------


def physics(context: PreflightContext) -> Iterator[Finding]:
    """Snapshots, channel and target of one scene belong together, where the run trains and where it validates."""
    seen: dict[str, str] = {}  # what is said once of a kind of scenes, not of the files and of the loop
    for what, whole, of_files in _looked_at(context):
        scenes = with_factor(whole)
        if scenes.channel is None or scenes.factor is None:
            context.note = f"not checked: the scenes have no {'channel' if scenes.channel is None else 'target'}"
            return
        finding, said = _together(context, what, scenes)
        seen.setdefault(said.partition(" are ")[0], said)
        if finding is not None:
            # Rows of files are not left over from an earlier batch: there it is the order that is wrong.
            yield (
                replace(finding, cause="mismatched_channel", advice="")
                if of_files and finding.cause == "stale_cache"
                else finding
            )
            return
    context.note = "; ".join(filter(None, seen.values()))


def _looked_at(context: PreflightContext) -> Iterator[tuple[str, Scenes, bool]]:
    """Scenes of files from all over their splits, where the order of rows is still to be seen (True); then as the loop
    serves them."""
    source = context.trainer.source
    for split, what in (("train", "training"), ("val", "validation")):
        if not source.endless:
            yield what, source.batch(split, _spread(source.size(split))), True
    last = context.groups[-1][0]
    yield "training", last[:COMPARED] if last.batch >= FEWEST else _all(context)[:COMPARED], False
    yield "validation", context.validation[:COMPARED], False


def _spread(size: int) -> Tensor:
    """Runs of consecutive scene numbers at even distances."""
    if size <= SPREAD:
        return torch.arange(size)
    starts = torch.linspace(0, size - RUN, SPREAD // RUN).long()
    return (starts[:, None] + torch.arange(RUN)).flatten()


def _together(context: PreflightContext, what: str, scenes: Scenes) -> tuple[Finding | None, str]:
    """What is wrong with how the parts of the scenes are paired, None where nothing is; and a note where nothing can be
    said."""
    model = context.config.task.symbols
    found = belonging(scenes, model == "static")
    broken, decided = int(found.broken.sum()), int(found.decided.sum())
    partly = broken >= FEWEST and broken >= 0.01 * decided
    if not found.mixed_up and not partly:
        other = _other_symbols(context, what, scenes)
        labels, said = labels_differ(what, scenes, model == "static") if other is None else (other, "")
        return labels, (
            said if found.group()[1] * DEVIATIONS < 1 else f"not checked: too few {what} scenes are loud enough"
        )
    count = (
        f"in {broken} of {decided} {what} scenes that are loud enough to tell"
        if partly
        else f"in the {what} scenes taken together"
    )
    seen = (
        f"{count}, the sources do not explain what the SNR promises of the snapshots (all scenes:"
        f" {max(found.group()[0], 0):.0%} of it)"
    )
    rows = found.broken if partly else torch.ones_like(found.broken)
    for cause, how, other, static in _alternatives(scenes, model == "static"):
        share = _mean(belonging(other, static), rows)
        if share > max(WHOLE - 0.1, 1.5 * _mean(found, rows)):
            advice = "Give --set task.symbols=per_snapshot." if cause == "task_differs" else ""
            return Finding(cause, f"{seen}; {how} they explain {share:.0%}.", advice=advice), ""
    labels, _ = labels_differ(what, scenes, model == "static")
    if labels is not None:
        return labels, ""
    cause, how, advice = _unpaired(scenes, rows, found, model == "static")
    return Finding(cause, f"{seen}: {how}.", advice=advice), ""


def _mean(found: Belonging, rows: Tensor) -> float:
    """Mean of some of the scenes, weighted by how much each can tell."""
    return Belonging(*(each[rows] for each in found)).group()[0]


def _other_symbols(context: PreflightContext, what: str, scenes: Scenes) -> Finding | None:
    """Symbols that a task draws for each snapshot, and the scenes once."""
    if context.config.task.symbols == "static" or scenes.snapshots.shape[1] == 1:
        return None
    static = belonging(scenes, True)
    if static.group()[0] < 0.9 or static.group()[1] > 0.02:
        return None
    return Finding(
        "task_differs",
        f"the task has task.symbols = per_snapshot, and one symbol a source explains {static.group()[0]:.0%} of all"
        f" snapshots of the {what} scenes: they were made with static symbols.",
        advice="Give --set task.symbols=static.",
    )


def _alternatives(scenes: Scenes, static: bool) -> Iterator[tuple[str, str, Scenes, bool]]:
    """Mistakes that would explain the mismatch, each undone, and whether the symbols are static then."""

    def snapshots(change: Callable[[Tensor], Tensor]) -> Scenes:
        return replace(scenes, snapshots=change(scenes.snapshots))

    length, antennas = scenes.snapshots.shape[1:3]
    if static:
        yield "task_differs", "with task.symbols = per_snapshot instead of the task's static", scenes, False
    for cause, how, other in (
        ("conjugation_error", "with the conjugate of the target", replace(scenes, factor=conj(scenes.factor))),
        ("wrong_layout", "with the snapshots conjugated (or their real and imaginary parts swapped)", snapshots(conj)),
        (
            "wrong_layout",
            "with the channel conjugated (or its real and imaginary parts swapped)",
            replace(scenes, channel=conj(scenes.channel)),
        ),
        (
            "wrong_layout",
            "with the codes conjugated (or their real and imaginary parts swapped)",
            replace(scenes, codes=conj(scenes.codes)),
        ),
        ("wrong_layout", "with the code of the snapshot after", replace(scenes, codes=scenes.codes.roll(-1, -3))),
        ("wrong_layout", "with the code of the snapshot before", replace(scenes, codes=scenes.codes.roll(1, -3))),
        (
            "wrong_layout",
            "with snapshots and antennas read in the other order",
            snapshots(lambda y: y.reshape(-1, antennas, length, 2).transpose(1, 2)),
        ),
        (
            "wrong_layout",
            "with real and imaginary parts in planes",
            snapshots(lambda y: y.reshape(y.shape[0], 2, length, antennas).permute(0, 2, 3, 1).contiguous()),
        ),
    ):
        yield cause, how, other, static
    for step in (1, -1):
        for cause, name in PARTS:
            yield (
                cause,
                f"with the {name} of the scene {'after' if step == -1 else 'before'} it",
                replace(scenes, **{name: getattr(scenes, name).roll(step, 0)}),
                static,
            )


def _unpaired(scenes: Scenes, rows: Tensor, read: Belonging, static: bool) -> tuple[str, str, str]:
    """Which of the three is in the wrong order: the one of another scene with which a scene still fits. Its cause, in
    words, and advice."""
    wrong = rows.nonzero()[:, 0]
    few = wrong[read.together[wrong].argsort()[:TRIED]]  # the loudest, which least fits by chance
    # Less the same with conjugates, which are nobody's.
    found = {
        cause: (
            _fitting(scenes, few, getattr(scenes, name), name, static)
            - _fitting(scenes, few, conj(getattr(scenes, name)), name, static)
        )
        for cause, name in PARTS
    }
    best = max(found, key=found.__getitem__)
    if found[best] > 0.3:
        return best, f"{found[best]:.0%} of them fit with the {dict(PARTS)[best]} of another scene", ""
    others = (
        "; the others are in order" if not bool(rows.all()) and int(rows.sum()) < int(read.decided.sum()) // 2 else ""
    )
    whole = torch.eye(scenes.channel.shape[2])[None].expand(scenes.batch, -1, -1)
    alone = belonging(replace(scenes, factor=torch.stack((whole, 0 * whole), -1).to(scenes.channel)), static)
    mean, deviation = Belonging(*(each[rows] for each in alone)).group()
    if deviation * DEVIATIONS > HALF:
        return (
            "parts_unrelated",
            f"no conjugate, no order of axes and no part of the other scenes looked at fixes it{others}",
            "",
        )
    if mean < HALF:
        return (
            "parts_unrelated",
            (
                "y carries nothing of any sources through its own channel (any field on the surface explains"
                f" {max(mean, 0):.0%}), and no part of the other scenes looked at fixes it{others}"
            ),
            NO_SIGNAL,
        )
    return (
        "parts_unrelated",
        (
            f"snapshots and channel belong together (some field on the surface explains {mean:.0%}), and the target"
            f" belongs neither to them nor to any of the scenes looked at{others}"
        ),
        NO_SOURCES,
    )


def _fitting(scenes: Scenes, few: Tensor, parts: Tensor, name: str, static: bool) -> float:
    """Share of some scenes that fit with any of the others' `parts` as their own part `name`."""
    cost = scenes.snapshots[0].numel() * scenes.factor[0].numel()
    candidates = torch.arange(min(scenes.batch, max(32, int(PAIR_BUDGET // (cost * len(few))))))
    hits = 0
    for row in few.tolist():
        pairs = scenes[torch.full_like(candidates, row)]
        found = belonging(replace(pairs, **{name: parts[candidates]}), static)
        hits += bool((found.decided & (found.value > MATCH)).any())
    return hits / max(1, len(few))


CHECKS = {
    "scenes are finite": finite,
    "scenes differ": distinct,
    "validation shares no scene with training": splits,
    "scenes are those of their manifest": manifest,
    "snapshots, channel and target belong together": physics,
}
