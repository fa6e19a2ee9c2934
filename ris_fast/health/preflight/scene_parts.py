"""Preflight of the physics of the scenes: snapshots, channel and target of a scene belong together, or why not.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.dependent import REMOVED
from ris_fast.health.preflight.labels import element_orders
from ris_fast.health.preflight.pairing import (
    CLEAR,
    DEVIATIONS,
    HALF,
    WHOLE,
    Belonging,
    belonging,
    measure_snr,
    with_factor,
)
from ris_fast.health.preflight.probe import AFTERWARDS, FEWEST, PreflightContext
from ris_fast.health.preflight.refit import explains
from ris_fast.health.preflight.rereads import REDRAWN
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.health.preflight.snr import as_measured, labels_differ, shifted_by
from ris_fast.physics.array import RISArray
from ris_fast.physics.real_complex import conj
from ris_fast.physics.scenes import Scenes

COMPARED = 64  # scenes of the loop whose parts are compared
SPREAD, RUN = 256, 8  # scenes of files, in runs of consecutive ones
TRIED, PAIR_BUDGET = 8, 4e9  # scenes that are tried with the parts of others; numbers (y times factor) of all pairs
UNDONE = 0.88  # of the belonging, from which a mistake that was undone explains it: small arrays fit much by chance
CLOSE_DB = 2.0  # of an SNR at the median
MISSING_DB, SOME = 3.0, 0.08  # of an SNR label above the measured one; share of the scenes
MATCH = 0.9  # of the belonging of a loud scene, from which its parts are of one scene
NO_SIGNAL = (
    "Look at how y is made: noise in place of signal, a channel that was drawn again, or rows of scenes far from each"
    " other. Each y must come from the H_full, the codes and the sources of its own row."
)
NO_SOURCES = (
    "Look at how R is made: the order of its elements, the array and the wavelength; then whether its rows are those"
    " of y."
)
NO_CODES = (
    "Compare codes, channel and snapshots with what made the data, number by number: rounding to whole numbers or to"
    " too few phases, another code book, and for antennas their order, gains and any transform of one of the two."
)
PARTS = (("shuffled_labels", "factor"), ("mismatched_channel", "channel"), ("stale_cache", "snapshots"))


def physics(context: PreflightContext) -> Iterator[Finding]:
    """Snapshots, channel and target of one scene belong together, where the run trains and where it validates."""
    if context.known.get(REMOVED):
        context.note = "not checked: something was taken out of the scenes, which explains what does not fit"
        return
    seen: dict[str, str] = {}  # what is said once of a kind of scenes, not of the files and of the loop
    for what, whole, of_files in _looked_at(context):
        scenes = as_measured(what, with_factor(whole), context.config.task)
        if scenes.channel is None or scenes.factor is None:
            context.note = f"not checked: the scenes have no {'channel' if scenes.channel is None else 'target'}"
            return
        finding, said = _together(context, what, scenes)
        kind = what.partition(" (")[0]
        if kind == what:
            seen.setdefault(said.partition(" are ")[0], said)
        context.known["parts apart"] = finding is not None and finding.cause != "snr_labels_differ"
        if finding is not None:
            if context.known.get((REDRAWN, kind)):  # as of an augmentation, which may change what belongs together
                finding = replace(finding, certain=False)
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
    yield "training", last[:COMPARED] if last.batch >= FEWEST else all_scenes(context)[:COMPARED], False
    yield "validation", context.validation[:COMPARED], False
    if context.later is not None and context.later.batch >= FEWEST:
        yield AFTERWARDS, context.later[:COMPARED], False


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
    broken, decided, partly = int(found.broken.sum()), int(found.decided.sum()), _partly(found)
    if not found.mixed_up and not partly:
        other = _other_symbols(context, what, scenes)
        labels, said = labels_differ(what, scenes, model == "static") if other is None else (other, "")
        if other is None:
            target = labels and _inexact_target(what, scenes, model == "static")
            target = target or _sources_missing(what, scenes, model == "static")
            if target is not None:
                labels = target
            elif labels is not None and (fitted := explains(scenes, model == "static")):
                labels = Finding("parts_unrelated", f"{labels.evidence.partition(';')[0]}; {fitted}.", advice=NO_CODES)
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
    for cause, how, other, static in _alternatives(scenes, model == "static", RISArray.of(context.config.task)):
        if cause == "task_differs" and partly and broken < MATCH * decided:
            continue  # a task is that of all scenes
        share = _mean(belonging(other, static), rows)
        if share > max(UNDONE, 1.5 * _mean(found, rows)):
            advice = "Give --set task.symbols=per_snapshot." if cause == "task_differs" else ""
            return Finding(cause, f"{seen}; {how} they explain {share:.0%}.", advice=advice), ""
    if fitted := explains(scenes, model == "static"):
        return Finding("parts_unrelated", f"{seen}; {fitted}.", advice=NO_CODES), ""
    labels, _ = labels_differ(what, scenes, model == "static")
    if labels is not None and labels.advice:  # one shift or unit; it may be all that the scenes lack
        shifted = replace(scenes, snr_db=scenes.snr_db - shifted_by(scenes, model == "static"))
        then = belonging(shifted, model == "static")
        if not then.mixed_up and not _partly(then):
            return labels, ""
    if not _of_some_field(scenes, rows, model == "static"):
        if labels is not None:
            return labels, ""
    cause, how, advice = _unpaired(scenes, rows, found, model == "static")
    return Finding(cause, f"{seen}: {how}.", advice=advice), ""


def _partly(found: Belonging) -> bool:
    """Whether more scenes than a few do not belong together, one by one."""
    broken = int(found.broken.sum())
    return broken >= FEWEST and broken >= 0.01 * int(found.decided.sum())


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


def _any_field(scenes: Scenes, rows: Tensor, static: bool) -> tuple[float, float]:
    """How much of what the SNR promises any field on the surface explains, and its standard deviation."""
    whole = torch.eye(scenes.channel.shape[2])[None].expand(scenes.batch, -1, -1)
    alone = belonging(replace(scenes, factor=torch.stack((whole, 0 * whole), -1).to(scenes.channel)), static)
    return Belonging(*(each[rows] for each in alone)).group()


def _of_some_field(scenes: Scenes, rows: Tensor, static: bool) -> bool:
    """Whether snapshots are, through their channel, of some field at the SNR of their label: then it is the target that
    is not theirs, and the label is right."""
    mean, deviation = _any_field(scenes, rows, static)
    return deviation * DEVIATIONS < HALF and mean > WHOLE


def _inexact_target(what: str, scenes: Scenes, static: bool, *, least: int = 2 * FEWEST) -> Finding | None:
    """A target that leaves more of the snapshots unexplained than noise is, where some field on the surface does not:
    it is not exactly what they were made of, and the SNR labels are right."""
    whole = torch.eye(scenes.channel.shape[2])[None].expand(scenes.batch, -1, -1)
    anything = replace(scenes, factor=torch.stack((whole, 0 * whole), -1).to(scenes.channel))
    if labels_differ(what, anything, static)[0] is not None:
        return None
    own, free = measure_snr(scenes, static), measure_snr(anything, static)
    if min(len(own.labels_db), len(free.labels_db)) < least or not float(free.deviation_db.median()) < CLOSE_DB:
        return None
    if not float(free.away_db.median().abs()) < CLOSE_DB < float(own.away_db.median()):
        return None
    return Finding(
        "parts_unrelated",
        f"the targets of {what} scenes explain their snapshots no better than to"
        f" {float(own.measured_db.median()):.3g} dB at the median, and some field on the surface to"
        f" {float(free.measured_db.median()):.3g} dB, as their SNR labels say ({float(own.labels_db.median()):.3g} dB):"
        " something was added to the targets, a source is missing in them, or they are in another order or sign.",
        advice=NO_SOURCES,
        certain=False,
    )


def _sources_missing(what: str, scenes: Scenes, static: bool) -> Finding | None:
    """Some scenes whose target leaves much of the snapshots unexplained that some field on the surface explains."""
    found = measure_snr(scenes, static)
    few = found.rows[found.away_db > MISSING_DB + CLEAR * found.deviation_db]
    if len(few) < max(FEWEST + 1, SOME * len(found.rows)):
        return None
    target = _inexact_target(what, scenes[few], static, least=FEWEST)
    return target and replace(target, evidence=f"in {len(few)} of {len(found.rows)} scenes {target.evidence}")


def _alternatives(scenes: Scenes, static: bool, array: RISArray) -> Iterator[tuple[str, str, Scenes, bool]]:
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
    yield (
        "wrong_layout",
        "with the antennas in reversed order",
        snapshots(lambda y: y.flip(2)),
        static,
    )
    yield "wrong_layout", "with the codes in reversed order", replace(scenes, codes=scenes.codes.flip(-3)), static
    if array.elements == scenes.channel.shape[2]:
        for order, rows in element_orders(array):
            moved = rows.to(scenes.channel.device)
            yield (
                "wrong_layout",
                f"with the target's elements {order}",
                replace(scenes, factor=scenes.factor[:, moved]),
                static,
            )
            yield (
                "wrong_layout",
                f"with the channel's elements {order}",
                replace(scenes, channel=scenes.channel[:, :, moved]),
                static,
            )
            yield (
                "wrong_layout",
                f"with the codes' elements {order}",
                replace(scenes, codes=scenes.codes[..., moved, :]),
                static,
            )
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
    mean, deviation = _any_field(scenes, rows, static)
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


CHECKS = {"snapshots, channel and target belong together": physics}
