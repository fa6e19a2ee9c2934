"""Rules of `watch` on scenes that are known again: with another target, in another batch, in validation; and on the
size of inputs.

None is certain: scenes may be alike, and targets may change on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.inferred import told_losses
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.pass_records import ForwardRecord, PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord
from ris_fast.health.watch.rules_windows import (
    overlap_within,
    series_of,
    target_among_inputs,
    windows_overlap,
    windows_without_order,
)
from ris_fast.health.watch.scenes import RICH, rows_of

AGAIN = 16  # scenes that are met again
LEAKED, SHARE = 8, 0.1  # scenes of validation that were trained on, and their share
WHOLE = 0.9  # share of a set that is the training set
RATIO, SHIFT = 6.0, 6.0  # of spreads, and of means over a spread, from which on two sets are apart
MANY_RATIO, MANY_SHIFT, BOTH_RATIO, BOTH_SHIFT = 2.5, 3.0, 1.6, 0.5  # of many scenes; each alone, and both
SMALL, LARGE, UNEQUAL = 3e-4, 3e3, 1e5  # spreads of inputs
LEAST_UNEQUAL = 30.0  # of the largest of unequal ones: beside smaller ones others are what rounding leaves
GROUPS, GROWN = 6, 1.3  # parts of a run, from one to the next of which inputs spread further; factor on it in all
TOGETHER, UNLIKE = 0.02, 0.5  # mean square of correlations within a scene; share of it that two sets have in common
SERIES = 0.3  # mean correlation of neighbours, which another order would not leave
DRAWS, BEYOND = 40, 1.2  # divisions of both sets by chance; factor by which their own is further apart than by any


def data_findings(loop: LoopRecord) -> list[Finding]:
    """What the scenes show."""
    if loop.forward is None:
        return []
    trained = [each for each in loop.forward.passes if each.training and each.reached and each.keys is not None]
    # A model whose parts do the same in both modes is often evaluated in training mode.
    evaluated = [each for each in loop.forward.passes if not each.grad and not (each.training and each.parts)]
    evaluated = [each for each in evaluated if not each.reached and each.keys is not None]
    return [
        *other_targets(loop.losses, {each.number: each for each in loop.forward.passes}),
        *target_is_input(loop.losses, {each.number: each for each in loop.forward.passes}),
        *target_among_inputs(told_losses(loop), {each.number: each for each in loop.forward.passes}, trained),
        *zero_batches(trained),
        *split_overlap(trained, [each for each in evaluated if not each.training]),
        *few_scenes(trained),
        *windows_overlap(trained, evaluated),
        *windows_without_order(trained),
        *(prepared_apart(loop, trained, evaluated) if not loop.forward.in_parts else ()),  # else one part feeds another
    ]


def prepared_apart(loop: LoopRecord, trained: list[PassRecord], evaluated: list[PassRecord]) -> Iterator[Finding]:
    """What the sizes of inputs show, and how they go together."""
    yield from distributions_differ(trained, evaluated)
    if loop.ranks is None:  # else each has a part of the data
        yield from inner_order_differs(trained, evaluated)
    yield from scenes_drift(trained)
    if loop.forward is not None:
        yield from input_scale(loop.forward, trained)


def other_targets(losses: Sequence[LossRecord], passes: dict[int, PassRecord]) -> Iterator[Finding]:
    """Scenes that come again with the target of another."""
    told = [each for each in losses if each.targets is not None and each.targets.keys is not None]
    # Of scores of all pairs the target is a place in the batch.
    told = [each for each in told if each.outputs is None or each.outputs.shape[1:] != each.targets.shape]
    numbers = {each.number for each in losses}
    if any(_is_of_several(passes, each.number, numbers) for each in told):
        return  # a target may belong to a pair of scenes
    both = [(passes[each.number], each.targets.keys) for each in told if each.number in passes]
    both = [(one, asked) for one, asked in both if one.keys is not None and len(one.keys) == len(asked)]
    known: dict[bytes, tuple[bytes, int]] = {}
    met: dict[bytes, set[bytes]] = defaultdict(set)
    again = other = in_a_row = 0
    swapped = 0
    for number, (one, asked) in enumerate(both):
        for scene, target in zip(rows_of(one.keys), asked):
            value = target.numpy().tobytes()
            if scene and scene in known:
                again += 1
                before, when = known[scene]
                other += before != value
                in_a_row += before != value and number - when == 1 and both[number - 1][0].step < one.step
                swapped += before != value and bool(met[value] - {scene})
            if scene:
                known[scene] = value, number
                met[value].add(scene)
    late = 2 * in_a_row > other
    if again >= AGAIN and 4 * other > again and (2 * swapped > other or late):
        yield finding(
            "stale_cache" if late else "shuffled_labels",
            f"{other} of {again} scenes that came again had another target"
            f"{', most in the very next batch, as from a buffer that is filled early' if late else ''}"
            f"{'' if late else ', which other scenes had had before'}.",
            both[0][0].step + 1,
            "Targets that are drawn anew on purpose look like that; so do inputs and targets that are shuffled apart.",
            "Keep inputs and targets of a batch together: one permutation for both, and a copy of what a buffer gives.",
        )


def _is_of_several(passes: dict[int, PassRecord], number: int, told: set[int]) -> bool:
    """Whether the loss told of after this pass had another pass before it that no loss was told of."""
    now, before = passes.get(number), passes.get(number - 1)
    alike = now is not None and before is not None and before.training and before.step == now.step
    return alike and number - 1 not in told


def target_is_input(losses: Sequence[LossRecord], passes: dict[int, PassRecord]) -> Iterator[Finding]:
    """Symbols that a model is given and asked for, at the same places."""
    told = [each for each in losses if each.targets is not None and each.targets.whole and each.number in passes]
    pairs = [(passes[each.number], each) for each in told]
    same = [
        one.keys is not None
        and len(one.shape) == 2
        and each.targets is not None
        and each.targets.shape == one.shape
        and each.targets.keys is not None
        and torch.equal(one.keys, each.targets.keys)
        and len(one.keys.unique()) > 2
        for one, each in pairs
    ]
    if len(same) >= EARLY and all(same) and not any("Slice" in each.chain for each in told):
        yield finding(
            "shuffled_labels",
            f"targets are the symbols that the model is given, place by place, in all {len(same)} batches that were"
            " looked at: it can copy them.",
            pairs[0][0].step + 1,
            "Where the loss shifts them by itself, or some inputs are masked, that is right.",
            "Shift targets by one place: inputs `tokens[:, :-1]`, targets `tokens[:, 1:]`.",
        )


def zero_batches(trained: list[PassRecord]) -> Iterator[Finding]:
    """Some batches are all zeros, and others are not, more often than batches of scenes come out empty by chance of
    which some are."""
    zero = [each for each in trained if not bool(each.keys.any())]
    if {each.shape for each in zero} - {each.shape for each in trained if bool(each.keys.any())}:
        return  # a point of its own
    if all(each.keys.shape[1] == 1 and bool((each.keys == each.keys.trunc()).all()) for each in trained):
        return  # one whole number a scene: zero is one as any other
    by_chance = _empty_by_chance(trained)
    often = len(zero) > by_chance + 3 * max(1.0, by_chance) ** 0.5
    if len(zero) >= 3 and 2 * len(zero) <= len(trained) and often:
        yield finding(
            "empty_cache_slot",
            f"the inputs of {len(zero)} of {len(trained)} passes that were looked at are all zeros, first in step"
            f" {zero[0].step + 1}; those of the others are not.",
            zero[0].step + 1,
            "Inputs that are masked for whole batches look so: a condition that is left out now and then.",
        )


def _empty_by_chance(trained: list[PassRecord]) -> float:
    """How many batches would be, if each scene were empty as often as all are together; each number, where a batch is
    one scene."""
    filled = [(each.keys != 0).any(1) if len(each.keys) > 1 else (each.keys != 0)[0] for each in trained]
    empty = 1 - float(torch.cat(filled).double().mean())
    return sum(empty ** len(each) for each in filled)


def split_overlap(trained: list[PassRecord], evaluated: list[PassRecord]) -> Iterator[Finding]:
    """Scenes of every evaluation are scenes of training; where one place evaluates none of them and the others
    nothing else, the training set is evaluated beside another."""
    batches = {each.keys.numpy().tobytes() for each in trained}
    evaluated = [each for each in evaluated if each.keys.numpy().tobytes() not in batches]
    rounds = {each.step for each in evaluated}
    seen = {row for each in trained for row in rows_of(each.keys) if row}
    asked = {row for each in evaluated for row in rows_of(each.keys) if row}
    found = len(asked & seen)
    by_site: dict[int, set[bytes]] = defaultdict(set)
    for each in evaluated:
        by_site[each.site].update(filter(None, rows_of(each.keys)))
    shares = [len(scenes & seen) / len(scenes) for scenes in by_site.values() if len(scenes) >= LEAKED]
    apart = 0.0 in shares and all(share == 0.0 or share > WHOLE for share in shares)
    if len(rounds) >= 3 and not apart and found >= LEAKED and found >= SHARE * len(asked):
        yield finding(
            "split_overlap",
            f"{found} of {len(asked)} different scenes that are evaluated, of those that were looked at, are scenes"
            " that training reads.",
            evaluated[0].step,
            "The loss on the training set may be measured on purpose, beside that on others.",
            "Split by scene before anything else is done, and look that no index is in both parts.",
        )


def _pooled(passes: Sequence[PassRecord]) -> Tensor:
    """Of as many numbers of each scene as are known of the first."""
    known = [each.keys for each in passes if each.keys is not None]
    return torch.cat([each for each in known if each.shape[1] == known[0].shape[1]]).double()


def _both_pooled(trained: list[PassRecord], evaluated: list[PassRecord], least: int) -> tuple[Tensor, Tensor] | None:
    """(N, F), (M, F) numbers of scenes of one shape, `least` of evaluation at least; None where outputs of one pass
    lead to inputs of the next, as in sampling."""
    shapes = {each.shape[1:] for each in trained} | {each.shape[1:] for each in evaluated}
    widths = {each.keys.shape[1] for each in (*trained, *evaluated) if each.keys is not None}
    if not trained or not evaluated or len(shapes) > 1 or len(widths) > 1 or _is_sampling(evaluated):
        return None
    one, other = _pooled(trained), _pooled(evaluated)
    if len(one) < 64 or len(other) < least or not bool(one.isfinite().all()) or not bool(other.isfinite().all()):
        return None
    return one, other


def _is_sampling(evaluated: Sequence[PassRecord]) -> bool:
    """Whether scenes at one place of two passes, at the same step, are alike and not the same."""
    pairs = [
        (one.keys, other.keys)
        for one, other in pairwise(evaluated)
        if one.step == other.step and one.shape == other.shape and not torch.equal(one.keys, other.keys)
    ]
    near = [float((a - b).norm()) < 0.7 * float((a - b.roll(1, 0)).norm()) for a, b in pairs if len(a) > 1]
    return 2 * sum(near) > len(near) > 0


def distributions_differ(trained: list[PassRecord], evaluated: list[PassRecord]) -> list[Finding]:
    """Inputs of evaluation are far from those of training."""
    if (both := _both_pooled(trained, evaluated, 16)) is None:
        return []
    one, other = both
    spread, spread_there = float(one.std()), float(other.std())
    shift, many = abs(float(other.mean()) - float(one.mean())), len(other) >= 48
    least, most = sorted((spread, spread_there))
    apart = most > (MANY_RATIO if many else RATIO) * least or shift > (MANY_SHIFT if many else SHIFT) * spread
    both = most > BOTH_RATIO * least and shift > BOTH_SHIFT * most  # as one scaling does
    if not least or not (apart or (many and both and not overlap_within(series_of(evaluated)))):
        return []
    return [
        finding(
            "distributions_differ",
            f"inputs of training are {one.mean():.3g} +- {spread:.3g}, those of evaluation {other.mean():.3g} +-"
            f" {spread_there:.3g}: one of both is not prepared as the other.",
            evaluated[0].step,
            "Data of another kind may be evaluated on purpose.",
        )
    ]


def inner_order_differs(trained: list[PassRecord], evaluated: list[PassRecord]) -> list[Finding]:
    """Numbers of a scene that go together in evaluation do not in training, or the other way round: they come in
    another order there."""
    if (both := _both_pooled(trained, evaluated, 48)) is None or both[0].shape[1] < RICH:
        return []
    one, other = (each.unique(dim=0) for each in both)
    if min(len(one), len(other)) < 48:
        return []
    one, other = (each[:, (one.std(0) > 0) & (other.std(0) > 0)] for each in (one, other))
    width = one.shape[1]
    if width < RICH:
        return []
    one, other = _of_one_norm(one, other)
    of_one, of_other = _correlations(one), _correlations(other)
    pairs = width * (width - 1)
    sizes = [
        float(each.square().sum()) / pairs - 1 / len(rows) for each, rows in ((of_one, one), (of_other, other))
    ]  # without what is by chance
    alike = float((of_one * of_other).sum()) / pairs
    if max(sizes) < TOGETHER or alike > UNLIKE * max(sizes) or not _are_unlike(one, other):
        return []
    if min(float(each.diagonal(1).mean()) for each in (of_one, of_other)) > SERIES:
        return []  # windows of a series, in the same order in both: it is another part of the series
    return [
        finding(
            "distributions_differ",
            f"of a scene's numbers two have a correlation of {max(0.0, sizes[0]) ** 0.5:.2g} in training and of"
            f" {max(0.0, sizes[1]) ** 0.5:.2g} in evaluation, in the mean of squares, and between other numbers: in one"
            " of both they come in another order, or are not of the same kind.",
            evaluated[0].step,
            "Data of another kind may be evaluated on purpose.",
            "Prepare both with one function: the same order of columns, channels and times. A series is split by time,"
            " and never shuffled before windows are cut from it.",
        )
    ]


def _of_one_norm(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(N, F), (M, F) with columns about zero with a spread of one, and then rows of one norm: else a few loud scenes
    make all correlations."""
    both = torch.cat([one, other])
    both = F.normalize((both - both.mean(0)) / both.std(0), dim=1)
    return both[: len(one)], both[len(one) :]


def _correlations(rows: Tensor) -> Tensor:
    """(F, F), zero with itself and where a column is all the same."""
    found = torch.corrcoef(rows.T).nan_to_num(0.0)
    return found.fill_diagonal_(0.0)


def _are_unlike(one: Tensor, other: Tensor) -> bool:
    """Whether correlations of two sets of scenes are further apart than those of sets of as many scenes drawn from both
    together: scenes that are few, uneven or sparse differ by chance."""
    both, generator = torch.cat([one, other]), torch.Generator().manual_seed(0)
    apart = float((_correlations(one) - _correlations(other)).square().sum())
    for _ in range(DRAWS):
        order = torch.randperm(len(both), generator=generator)
        drawn, others = both[order[: len(one)]], both[order[len(one) :]]
        if float((_correlations(drawn) - _correlations(others)).square().sum()) * BEYOND > apart:
            return False
    return True


def scenes_drift(trained: list[PassRecord]) -> Iterator[Finding]:
    """Inputs spread further from one part of the run to the next, as what noise is added to again and again."""
    alike = [each for each in trained if each.keys.shape[1] == trained[0].keys.shape[1]]
    dense = [each for each in alike if each.of_kind <= EARLY] + [each for each in alike if each.of_kind > 4 * EARLY]
    if len(dense) < 4 * GROUPS or any(not bool(each.keys.isfinite().all()) for each in dense):
        return
    size = len(dense) // GROUPS
    parts = [torch.cat([each.keys for each in dense[n * size : (n + 1) * size]]).double() for n in range(GROUPS)]
    spreads = [float((each - each.mean(0)).square().mean().sqrt()) for each in parts]
    if all(one < other for one, other in pairwise(spreads)) and spreads[-1] > GROWN * spreads[0] > 0:
        yield finding(
            "scenes_change",
            f"the spread of the inputs grows all the time, from {spreads[0]:.3g} in the first part of the run to"
            f" {spreads[-1]:.3g} in the last of {GROUPS}: as noise does that is added in place to what is kept.",
            dense[0].step + 1,
            "Tasks that get harder, and inputs that another network makes, do that too.",
            "Augment a copy: `x = x + noise`, not `x += noise`, of what the data set keeps in memory.",
        )


def few_scenes(trained: list[PassRecord]) -> Iterator[Finding]:
    """Batches are made of a few scenes only, each of which is in them several times."""
    rows = [rows_of(each.keys) for each in trained]
    rows = [each for each in rows if len(each) >= 2 * EARLY and all(each)]
    if len(rows) < 2 * EARLY or len(rows) < len(trained):
        return
    scenes = {each for batch in rows for each in batch}
    if 2 < len(scenes) and 2 * len(scenes) <= min(map(len, rows)):
        yield finding(
            "repeated_batch",
            f"the {len(rows)} batches that were looked at are made of {len(scenes)} different scenes, each of which is"
            f" in a batch of {len(rows[0])} several times.",
            trained[0].step + 1,
            "Data that are so few look the same.",
            "Look at the indices that the sampler draws: a `WeightedRandomSampler` takes one weight a scene, not one a"
            " class.",
        )


def input_scale(forward: ForwardRecord, trained: list[PassRecord]) -> Iterator[Finding]:
    """Inputs of a size that no initialisation is made for, unless a normalisation comes first."""
    first = next(iter(forward.layers.kinds.values()), None)
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.EmbeddingBag)
    calls = next(iter(forward.layers.calls.values()), [])
    if (
        len(trained) < EARLY
        or first is None
        or isinstance(first, norms)
        or calls[0].whole
        or "Norm" in str(type(first))
    ):
        return
    numbers = _pooled([each for each in trained if each.shape == trained[0].shape])
    spread = float(numbers.std())
    columns = numbers.std(0) if len(trained[0].shape) == 2 else numbers[0, :0]
    live = columns[columns > 0]
    if not bool(numbers.isfinite().all()) or spread == 0:
        return
    if not SMALL <= spread <= LARGE:
        yield finding(
            "input_scale",
            f"inputs have a spread of {spread:.3g}, in {len(trained)} batches that were looked at.",
            trained[0].step + 1,
            f"Initial weights are made for inputs near one. {MAY_BE_MEANT}",
        )
    elif len(live) > 1 and float(live.max()) > max(UNEQUAL * float(live.min()), LEAST_UNEQUAL):
        yield finding(
            "input_scale",
            f"columns of the inputs have spreads from {float(live.min()):.3g} to {float(live.max()):.3g}.",
            trained[0].step + 1,
            MAY_BE_MEANT,
        )
