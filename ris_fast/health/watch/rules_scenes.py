"""Rules of `watch` on batches: random numbers that repeat, buffers that are kept, scenes in the order of their labels,
rows that are empty or of an earlier batch.

None is certain: what is meant by data is not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

ROWS = 32  # that are looked at
STEPS = 32  # of one batch, which are no accident
BETWEEN = 9.0  # times the variance within a batch
ALIKE = 0.3  # correlation of a scene with itself, altered


def scene_findings(loop: LoopRecord) -> list[Finding]:
    """What inputs and targets show."""
    if loop.forward is None:
        return []
    known = [each for each in loop.forward.passes if each.input is not None]
    trained = [each for each in known if each.training and each.reached]
    pairs = told_pairs(loop, trained)
    return [
        *seed_set_again(trained),
        *kept_targets(pairs),
        *(told_one_batch(pairs) if pairs else one_input(trained)),
        *same_scenes_altered(trained, loop.forward.passes, pairs),
        *one_class_a_batch(loop.losses),
        *targets_in_order(loop.losses),
        *rows_of_before(trained),
        *empty_rows(trained),
    ]


Pair = tuple[PassRecord, LossRecord, Tensor, Tensor]  # rows (R, F) of inputs and (R, G) of their targets


def told_pairs(loop: LoopRecord, trained: list[PassRecord]) -> list[Pair]:
    """Passes with the targets that `seen.loss` was told, where a step has one of each and as many rows."""
    passes, losses = Counter(each.step for each in trained), Counter(each.step for each in loop.losses)
    by_step = {each.step: each for each in loop.losses if losses[each.step] == 1}
    found = []
    for each in trained:
        loss = by_step.get(each.step)
        if loss is None or passes[each.step] != 1 or loss.targets is None or loss.targets.few is None:
            continue
        asked, given = loss.targets.few, each.input
        if given is not None and loss.targets.shape[:1] == each.shape[:1] and len(given) == len(asked) > 1:
            found.append((each, loss, given, asked))
    return found


def _key(row: Tensor) -> bytes:
    return row.contiguous().numpy().tobytes()


def _is_rich(row: Tensor) -> bool:
    """Whether no two scenes are the same by chance."""
    return len(row) >= 4 and len(row.unique()) >= 4


# ---- batches -------------------------------------------------------------------------------------------------------


def seed_set_again(trained: list[PassRecord]) -> Iterator[Finding]:
    """The generator of random numbers stands again where it stood steps before, and stood elsewhere in between."""
    states = [(each.draws, each.step) for each in trained if each.draws is not None]
    last: dict[int, int] = {}
    again = []
    for number, (state, step) in enumerate(states):
        before = last.get(state)
        if before is not None and states[before][1] != step and states[number - 1][0] != state:
            again.append((before, number))
        last[state] = number
    period = {number - before for before, number in again}
    if len(again) < EARLY:
        return
    one, other = (trained[number] for number in again[0])
    same = sum(_same(trained[before], trained[number]) for before, number in again)
    yield finding(
        "repeated_batch",
        f"random numbers repeat: at {len(again)} of {len(states)} steps the generator stands where it stood"
        f" {f'{min(period)} steps' if len(period) == 1 else 'some steps'} before (step {one.step + 1} and"
        f" {other.step + 1}); {same} of these steps read the batch that they read then.",
        other.step + 1,
        "A seed that is set in each epoch does that: batches, masks of dropout and noise come again. " + MAY_BE_MEANT,
        "Set the seed once, before the first epoch; an evaluation that needs one draws from a generator of its own.",
        harm=1.0 if 2 * same > len(again) else 0.5,
    )


def _same(one: PassRecord, other: PassRecord) -> bool:
    return one.shape == other.shape and torch.equal(one.input, other.input)


def kept_targets(pairs: list[Pair]) -> Iterator[Finding]:
    """Inputs go on from batch to batch and the targets of the first stay, or the other way round. Labels may have a
    fixed order in each batch."""
    if len(pairs) < EARLY:
        return
    for kept, moving, names in ((3, 2, ("targets", "inputs")), (2, 3, ("inputs", "targets"))):
        rows = [pair[kept] for pair in pairs]
        others = [pair[moving] for pair in pairs]
        alike = all(torch.equal(rows[0], each) for each in rows)
        moves = all(a.shape == b.shape and not torch.equal(a, b) for a, b in pairwise(others))
        if (
            alike
            and moves
            and not _stay(others)
            and len(rows[0].unique(dim=0)) == len(rows[0])
            and not _is_regular(rows[0])
        ):
            yield finding(
                "stale_cache",
                f"the {names[0]} of all {len(pairs)} batches that were looked at are those of the first, row by row,"
                f" while the {names[1]} are others each time.",
                pairs[1][0].step + 1,
                f"A buffer that is not filled anew does that, and a seed that is set before {names[0]} are drawn; so do"
                " fixed points in space, on purpose.",
                f"Make the {names[0]} of a batch where its {names[1]} are made, from the same indices, as a copy.",
            )


def _is_regular(rows: Tensor) -> bool:
    """Numbers in order, as those of a grid or a count, or of one that begins in the middle, as places of partners do
    in a batch of two halves."""
    ways = [each.diff() for each in (rows[:, 0], rows.flatten())]
    return any(min(int((way < 0).sum()), int((way > 0).sum())) <= (1 if len(way) >= EARLY - 1 else 0) for way in ways)


def told_one_batch(pairs: list[Pair]) -> Iterator[Finding]:
    """All steps read the same batch and targets, which are made anew each time."""
    if len(pairs) < STEPS or any(each.given_again for each, *_ in pairs[1:]) or len(pairs[0][2]) < 2:
        return
    (_, _, given, asked), *rest = pairs
    if all(torch.equal(given, one) and torch.equal(asked, other) for _, _, one, other in rest):
        yield finding(
            "repeated_batch",
            f"all {len(pairs)} steps that were looked at read the same batch with the same targets, made anew each"
            " time.",
            pairs[1][0].step + 1,
            "An iterator that is made for each step, `next(iter(loader))`, does that; so do one batch on purpose, and"
            " data of one batch.",
            harm=0.5,
        )


def one_input(trained: list[PassRecord]) -> Iterator[Finding]:
    """All passes are given the same numbers without any order, made anew each time."""
    rows = [each.input for each in trained]
    alone = all(each.inputs == 1 and not each.given_again and each.source is None for each in trained[1:])
    if len(rows) < STEPS or not alone or len(rows[0]) < 4 or len(rows[0].unique()) < STEPS or _is_regular(rows[0]):
        return
    if all(each.shape == rows[0].shape and torch.equal(each, rows[0]) for each in rows):
        yield finding(
            "repeated_batch",
            f"all {len(rows)} passes that were looked at are given the same numbers, made anew each time.",
            trained[1].step + 1,
            "Data that are a single batch look the same, and so do fixed points in space.",
            "Draw noise, or take the next batch, within the loop.",
            harm=0.5,
        )


def same_scenes_altered(
    trained: list[PassRecord], passes: Sequence[PassRecord], pairs: list[Pair]
) -> Iterator[Finding]:
    """At each place of all batches there is the same scene, with other noise or in another view each time; and other
    scenes are evaluated, or the targets stay too."""
    rows = [each.input for each in trained if each.input is not None]
    alone = len({each.shape for each in trained}) == 1 and not any(each.given_again for each in trained)
    if not alone or len({each.step for each in trained}) < 2 * EARLY or not _stay(rows):
        return
    others: list[Tensor] = []
    for each in passes:
        if not each.grad and each.shape == trained[0].shape and each.input is not None:
            if not any(_place_apart(each.input, other) > ALIKE for other in (rows[0], *others)):
                others.append(each.input)
    kept = len(pairs) >= 2 * EARLY and all(torch.equal(asked, pairs[0][3]) for *_, asked in pairs)
    if len(others) >= 4 or kept:
        yield finding(
            "repeated_batch",
            f"at each place of a batch all {len(rows)} passes that were looked at have the same scene, altered each"
            f" time (a correlation of {_place_apart(rows[0], rows[-1]):.2g} from the first to the last)"
            f"{f'; {len(others)} batches of other scenes are evaluated' if len(others) >= 4 else ''}.",
            trained[1].step + 1,
            "An iterator that is made for each step, `next(iter(loader))`, does that; so do data of one batch.",
            "Make the iterator once an epoch: `for batch in loader`.",
            harm=1.0 if len(others) >= 4 else 0.5,
        )


def _stay(rows: list[Tensor]) -> bool:
    """Whether rows at one place are alike, early and late, and no two at the same place are the same."""
    if len(rows) < 2 * EARLY or len(rows[0]) < 4 or len(rows[0].unique()) < STEPS or _is_regular(rows[0]):
        return False
    if any(torch.equal(rows[0], each) for each in rows[1:]):
        return False
    return min(_place_apart(rows[0], each) for each in rows[1:]) > ALIKE


def _place_apart(one: Tensor, other: Tensor) -> float:
    """Mean correlation of scenes at the same place, without that of scenes at other places."""
    unit = [(each - one.mean(0)) / one.std(0).clamp_min(1e-12) for each in (one, other)]
    first, second = (each / each.norm(dim=1, keepdim=True).clamp_min(1e-12) for each in unit)
    both = first @ second.T
    count = len(both)
    same = float(both.diagonal().mean())
    return same - (float(both.sum()) - same * count) / (count * (count - 1))


def one_class_a_batch(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Each batch has labels of one class, and the next ones of another: data in the order of their labels."""
    few = [
        (each.step, each.targets.few)
        for each in losses
        if each.targets is not None and each.targets.few is not None and each.targets.whole
        if len(each.targets.shape) == 1 and len(each.targets.few) >= 4
    ]
    alone = [(step, int(rows[0, 0])) for step, rows in few if bool((rows == rows[0]).all())]
    kinds = {label for _, label in alone}
    if len(few) >= 2 * EARLY and 4 * len(alone) >= 3 * len(few) and len(kinds) > 1:
        yield finding(
            "distributions_differ",
            f"{len(alone)} of {len(few)} batches that were looked at have labels of a single class each, of"
            f" {len(kinds)} classes: scenes come in the order of their labels.",
            alone[0][0] + 1,
            "Tasks in turn look the same.",
            "Shuffle the scenes before each epoch: `DataLoader(..., shuffle=True)`.",
        )


def targets_in_order(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Of numbers that are asked for those of one batch are next to the same, and those of the next are others."""
    few = [each.targets.few for each in losses if each.targets is not None and each.targets.few is not None]
    few = [each for each in few if each.shape[1] == 1 and len(each) >= 4 and bool(each.isfinite().all())]
    if len(few) < 2 * EARLY or any(each.targets is not None and each.targets.whole for each in losses):
        return
    within = sum(float(each.var()) for each in few) / len(few)
    between = float(torch.stack([each.mean() for each in few]).var())
    if len(torch.cat(few).unique()) > 4 * EARLY and between > BETWEEN * within > 0:
        yield finding(
            "distributions_differ",
            f"targets of one batch spread by {within**0.5:.3g}, and their means from batch to batch by"
            f" {between**0.5:.3g}: scenes come in the order of their targets.",
            losses[0].step + 1,
            "Tasks in turn look the same, and so does a series that is read in its order.",
            "Shuffle the scenes before each epoch: `DataLoader(..., shuffle=True)`.",
        )


def rows_of_before(trained: list[PassRecord]) -> Iterator[Finding]:
    """A part of each batch is a part of the batch before: any rows, each at its own place, or rows that come to the
    same places from one batch to the next."""
    known = [each for each in trained if each.keys is not None and len(each.shape) > 1]
    pairs = [
        (one, other)
        for one, other in pairwise(known)
        if one.shape == other.shape and one.keys.shape == other.keys.shape and one.step != other.step
    ]
    if len(pairs) < EARLY:
        return
    found, shares = [], []
    for one, other in pairs:
        before = {_key(row): place for place, row in enumerate(one.keys) if _is_rich(row)}
        met = [(place, before[key]) for place, row in enumerate(other.keys) if (key := _key(row)) in before]
        rich = sum(map(_is_rich, other.keys))
        found.append(tuple(met) if len(met) < rich else ())
        shares.append(sum(place == earlier for place, earlier in met) / max(1, rich))
    usual, count = Counter(found).most_common(1)[0]
    moved = any(place != earlier for place, earlier in usual)
    in_place = all(0.05 <= share <= 0.95 for share in shares)
    if in_place or (usual and len(pairs) >= 2 * EARLY and 4 * count >= 3 * len(pairs)):
        share = sum(shares) / len(pairs) if in_place else len(usual) / len(pairs[0][1].keys)
        yield finding(
            "stale_cache",
            f"{share:.0%} of the scenes of each batch are, bit for bit, scenes of the batch before, at the same places"
            f" in {len(pairs) if in_place else count} of {len(pairs)} batches.",
            pairs[0][1].step + 1,
            "Windows that overlap and memories of samples look the same."
            if moved
            else "A buffer that is filled in part does that; so do queues of past scenes.",
        )


def empty_rows(trained: list[PassRecord]) -> Iterator[Finding]:
    """Rows of zeros among rows that have none."""
    rows = torch.cat([each.input for each in trained if each.input.shape[1] == trained[0].input.shape[1]] or [_NONE])
    if len(rows) < ROWS or rows.shape[1] < 4:
        return
    empty = (rows == 0).all(1)
    others = rows[~empty]
    share = float(empty.double().mean())
    if int(empty.sum()) >= 4 and 0.02 < share < 0.98 and float((others == 0).double().mean()) < 0.02:
        yield finding(
            "empty_cache_slot",
            f"{int(empty.sum())} of {len(rows)} scenes that were looked at are zeros only, and the others have next to"
            " none.",
            trained[0].step + 1,
            "Scenes that are masked on purpose look the same.",
            "Look where these scenes are written: a cache slot that is read before that, or a file that is missing.",
        )


_NONE = torch.zeros(0, 0)
