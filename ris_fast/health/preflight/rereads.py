"""Preflight of what is read twice: a scene, and the features that are made of it, are the same whenever they are asked
for.

Legend: B batch.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.measures import CLOSE, listed
from ris_fast.health.preflight.pairing import belonging, with_factor
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.snr import as_measured, labels_differ
from ris_fast.physics.scenes import Scenes
from ris_fast.training.compiled_model import Network
from ris_fast.training.step import network_inputs
from ris_fast.training.telemetry.step_telemetry import row_hashes

SCENES = 48
FEW_APART = 0.05  # of scenes, that noise may take for another's
ROUNDING = 1e-4  # relative, of a scene that is made in another batch
# of what kind of scenes, in `known` of the context: masked anew in each reading; these parts change in each reading
MASKED, REDRAWN = "masked", "redrawn"
MASKED_ANEW = "numbers of the training scenes are zero in one reading and not in another: a mask is drawn anew"
AUGMENTED = "training scenes have other snapshots in each reading, and theirs by their channel and targets each time"
SNAPSHOTS = frozenset(("snapshots", "snr_db", "channel", "codes", "effective_channel"))  # and nothing of the answer
LABELS = ("factor", "covariance", "azimuth", "elevation", "range_m", "power", "count")
KEPT = frozenset(("count", "power"))  # what of an answer augmentation leaves: a scene turned is no other scene
# which parts may be another scene's, and what that is
OF_OTHERS = (
    ("shuffled_labels", LABELS),
    ("mismatched_channel", ("channel", "effective_channel", "codes")),
    ("stale_cache", ("snapshots", "snr_db")),
)
MEANT = " Where training scenes are augmented anew each time, that is meant."


def scenes_again(context: PreflightContext) -> Iterator[Finding]:
    """Scenes of the same numbers are the same: read again, in another order and with fewer beside them, and as the loop
    had them."""
    source = context.trainer.source
    for split, what in (("val", "validation"), ("train", "training")):
        index = torch.arange(min(SCENES, source.size(split)), device=source.index_device)
        _reseed(1)
        first = source.batch(split, index)
        kept = first.apply(torch.clone, codes=True)
        _reseed(2)
        source.batch(split, (index + len(index)) % source.size(split))  # others in between, as many
        changed = _differ(kept, first, 0.0)
        again = source.batch(split, index)
        names_again = _differ(kept, again, 0.0)
        masked = _by_a_mask(kept, again)
        context.known[MASKED, what] = masked
        _reseed(3)
        rows = torch.arange(len(index), device=kept.index.device).flip(0)[: max(1, len(index) // 2)]
        turned = source.batch(split, index[rows.to(index.device)])
        for how, names in (
            ("they are others once others have been read", changed),
            ("read again, they are others", names_again),
            ("in another order, with fewer beside them, they are others", _differ(kept[rows], turned, ROUNDING)),
        ):
            if masked and split == "train":
                context.note = MASKED_ANEW
                continue
            if names and (
                moved := _of_others(names, kept, rows if how.startswith("in another") else None, again, turned)
            ):
                yield _change(what, len(index), f"{how}: {moved[1]}", certain=split == "val", cause=moved[0])
                return
            if names:
                context.known[REDRAWN, what] = names
                allowed = SNAPSHOTS.union(LABELS) - KEPT if split == "train" else SNAPSHOTS
                drawn = names is not changed and allowed.issuperset(names) and not set(names) <= set(LABELS)
                theirs, unfit = _still_theirs(context, kept, again, turned) if drawn else (False, "")
                if unfit and not SNAPSHOTS.issuperset(names):
                    yield _drawn_twice(len(index), f"{how}: their {listed(names)} change", unfit)
                    return
                if split == "train" and theirs:
                    context.note = AUGMENTED
                    return
                # What stands beside them decides, which is the same in each epoch.
                alone = not changed and not names_again
                if theirs and alone:
                    break
                how += f": their {listed(names)}{', by zeros in other places,' if masked else ''}"
                yield _change(what, len(index), how, certain=split == "val" and not theirs and not alone)
                return
    if not context.known[MASKED, "training"]:
        yield from _as_served(context)


def _still_theirs(context: PreflightContext, *readings: Scenes) -> tuple[bool, str]:
    """Whether what is drawn anew belongs to the rest in each reading at the SNR that is said, as noise, a phase or a
    turn of the whole scene that augments training leaves it; and how many scenes do not, '' where it is not that."""
    task = context.config.task
    for scenes in readings:
        scenes = as_measured("training", with_factor(scenes), task)
        if scenes.channel is None or scenes.factor is None:
            return False, ""
        found = belonging(scenes, task.symbols == "static")
        broken, decided = int(found.broken.sum()), int(found.decided.sum())
        if found.mixed_up or broken > FEW_APART * decided:
            return False, f"in {broken} of {decided} that are loud enough to tell"
        if labels_differ("training", scenes, task.symbols == "static")[0] is not None:
            return False, ""
    return True, ""


def _drawn_twice(scenes: int, seen: str, unfit: str) -> Finding:
    return Finding(
        "parts_unrelated",
        f"{scenes} training scenes are read by their numbers; {seen}, and {unfit} the sources do not explain the"
        " snapshots: what the network is shown and what it is compared with are changed by different draws.",
        advice="Draw once for each scene, and change snapshots, channel, codes and labels by that draw. If the draw is"
        " one, the change of the labels is not that of the snapshots: apply each to a noiseless scene and compare.",
        certain=False,
    )


def _by_a_mask(one: Scenes, other: Scenes) -> bool:
    """Whether two readings differ in numbers of the snapshots that are exactly zero in one of them, and in no other:
    they were taken out by a mask, which is drawn anew."""
    if one.snapshots.shape != other.snapshots.shape or _differ(replace(one, snapshots=other.snapshots), other, 0.0):
        return False
    off = one.snapshots != other.snapshots
    return bool(off.any()) and not bool((off & (one.snapshots != 0) & (other.snapshots != 0)).any())


def _of_others(
    names: list[str], kept: Scenes, rows: Tensor | None, again: Scenes, turned: Scenes
) -> tuple[str, str] | None:
    """What of a scene is another scene's in the second reading, bit for bit: cause, and in words; None if nothing.
    Args: rows: of the first reading, that the second one has."""
    first, second = (kept, again) if rows is None else (kept[rows], turned)
    for cause, parts in OF_OTHERS:
        if any(part in names for part in parts) and set(names) <= set(parts):
            name = next(part for part in parts if part in names)
            before, then = getattr(first, name), getattr(second, name)
            if before is None or then is None or before.shape != then.shape or before.dim() < 2:
                continue  # one number a scene, as an SNR or a count, is soon another one's
            before, then = row_hashes(before), row_hashes(then)
            if bool(torch.isin(then[then != before], row_hashes(getattr(kept, name))).any()):
                return cause, f"some of them have the {listed(names)} of another one of them, bit for bit: these"
    return None


def _change(what: str, scenes: int, seen: str, *, certain: bool, cause: str = "scenes_change") -> Finding:
    return Finding(
        cause,
        f"{scenes} {what} scenes are read by their numbers; {seen} change{'.' if certain else f'.{MEANT}'}",
        certain=certain,
    )


def _as_served(context: PreflightContext) -> Iterator[Finding]:
    """What the loop held of the first steps, beside the same numbers asked for by themselves."""
    source = context.trainer.source
    for scenes in (context.groups[0][0], context.groups[-1][-1]):
        few = scenes[:SCENES]
        names = _differ(few, source.batch("train", few.index.to(source.index_device)), ROUNDING)
        if names:
            yield _change(
                "training",
                few.batch,
                f"beside what the loop was served under these numbers, their {listed(names)}",
                certain=False,
            )
            return


def _reseed(seed: int) -> None:
    """Other random numbers for whatever draws from the common generators; they are put back behind the check."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _differ(one: Scenes, other: Scenes, allowed: float) -> list[str]:
    """Fields that are not the same, for rounding below `allowed`; scenes that are not finite have a name of their
    own."""
    found = []
    for item in fields(one):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if a is None or b is None:
            found += [item.name] if (a is None) != (b is None) else []
        elif a.shape != b.shape or not _same(a, b, allowed):
            found.append(item.name)
    return found


def _same(a: Tensor, b: Tensor, allowed: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    if allowed == 0.0:
        return torch.allclose(a, b, 0.0, 0.0, equal_nan=True)
    return torch.allclose(
        a, b, allowed, allowed * float(a.nan_to_num(0.0, 0.0, 0.0).abs().amax() if a.numel() else 0.0), equal_nan=True
    )


# ---- features
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features_again(context: PreflightContext) -> Iterator[Finding]:
    """Scenes that are shown again have the features that they had, whatever was shown in between, and where they are
    kept for validation. Random numbers are the same each time: noise in training mode is no mistake."""
    network = context.step.network
    if not isinstance(network, Network):
        return
    groups = [group[0][:SCENES] for group in context.groups[:3]]
    groups.append(context.validation[: groups[0].batch])
    first = [_asked(network, scenes) for scenes in groups]
    for one, other in combinations(range(len(groups)), 2):
        if _left_over(groups[one], groups[other], first[one], first[other]):
            yield _stale(groups[other], groups[other].batch, "are those of another batch, bit for bit")
            return
    kept = dict(network.known)
    try:
        for scenes in groups:
            torch.manual_seed(1)
            network.remember(*network_inputs(scenes))
        for turn, copy in (("when they are shown again behind others", True), ("when they are remembered", False)):
            for scenes, right in zip(groups, first):
                rows = _other_rows(right, _asked(network, scenes, copy=copy))
                if bool(rows.any()):
                    yield _stale(scenes, int(rows.sum()), f"are others {turn}")
                    return
    finally:
        network.known.clear()
        network.known.update(kept)


def _stale(scenes: Scenes, rows: int, what: str) -> Finding:
    return Finding(
        "scenes_change",
        f"the features that the network is given for {rows} of {scenes.batch} scenes {what}: something keeps features"
        " from one call to the next, by a key that other scenes share.",
    )


def _asked(network: Network, scenes: Scenes, *, copy: bool = True) -> list[Tensor]:
    """What the network takes for the features of these scenes, or of a copy that is gone behind the call."""
    torch.manual_seed(1)
    given = [value.clone() if copy else value for value in network_inputs(scenes)]
    return [value.clone() for value in _tensors(network.inputs(*given), scenes.batch)]


def _left_over(one: Scenes, other: Scenes, first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether different scenes have equal features, which differ within a batch."""
    if one.batch != other.batch or one.batch < 2 or torch.equal(one.snapshots, other.snapshots):
        return False
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second)]
    differ = [bool((a != a[:1]).any()) for a in first]
    return any(each and inside for each, inside in zip(same, differ))


def _tensors(made: object, batch: int) -> list[Tensor]:
    return [
        value
        for value in (made if isinstance(made, (tuple, list)) else [made])
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and value.shape[0] == batch
    ]


def _other_rows(right: list[Tensor], found: list[Tensor]) -> Tensor:
    """Scenes whose features differ by more than rounding, (B,)."""
    parts = [
        ((a - b).reshape(len(a), -1).norm(dim=1) > CLOSE * a.reshape(len(a), -1).norm(dim=1).clamp_min(1e-30))
        & a.reshape(len(a), -1).isfinite().all(1)
        for a, b in zip(right, found)
        if a.shape == b.shape
    ]
    return torch.stack(parts).any(0) if parts else torch.zeros(0, dtype=torch.bool)


CHECKS = {
    "scenes are the same when they are read again": scenes_again,
    "features are those of the scenes shown": features_again,
}
