"""Rules of `watch` on scenes that are known again: with another target, in another batch, in validation; and on the
size of inputs.

None is certain: scenes may be alike, and targets may change on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import EARLY, ForwardRecord, LoopRecord, LossRecord, PassRecord

AGAIN = 16  # scenes that are met again
LEAKED, SHARE = 8, 0.1  # scenes of validation that were trained on, and their share
RATIO, SHIFT = 6.0, 6.0  # of spreads, and of means over a spread, from which on two sets are apart
SMALL, LARGE, UNEQUAL = 3e-4, 3e3, 1e5  # spreads of inputs
RICH = 4  # different numbers of a scene, by which it is known


def data_findings(loop: LoopRecord) -> list[Finding]:
    """What the scenes show."""
    if loop.forward is None:
        return []
    trained = [each for each in loop.forward.passes if each.training and each.reached and each.keys is not None]
    evaluated = [each for each in loop.forward.passes if not each.training and not each.reached]
    evaluated = [each for each in evaluated if each.keys is not None]
    return [
        *other_targets(loop.losses, {each.number: each for each in loop.forward.passes}),
        *target_is_input(loop.losses, {each.number: each for each in loop.forward.passes}),
        *viewed_in_another_order(trained, loop.losses),
        *zero_batches(trained),
        *split_overlap(trained, evaluated),
        *distributions_differ(trained, evaluated),
        *input_scale(loop.forward, trained),
    ]


def _rows(keys: Tensor) -> list[bytes]:
    """Of scenes that have numbers enough to be known by; empty for others."""
    return [row.numpy().tobytes() if len(row.unique()) >= RICH else b"" for row in keys]


def other_targets(losses: Sequence[LossRecord], passes: dict[int, PassRecord]) -> Iterator[Finding]:
    """Scenes that come again with the target of another."""
    told = [each for each in losses if each.targets is not None and each.targets.keys is not None]
    # Of scores of all pairs the target is a place in the batch.
    told = [each for each in told if each.outputs is None or each.outputs.shape[1:] != each.targets.shape]
    both = [(passes[each.number], each.targets.keys) for each in told if each.number in passes]
    both = [(one, asked) for one, asked in both if one.keys is not None and len(one.keys) == len(asked)]
    known: dict[bytes, tuple[bytes, int]] = {}
    met: dict[bytes, set[bytes]] = defaultdict(set)
    again = other = in_a_row = 0
    swapped = 0
    for number, (one, asked) in enumerate(both):
        for scene, target in zip(_rows(one.keys), asked):
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


def viewed_in_another_order(trained: Sequence[PassRecord], losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Inputs or targets are views of tensors whose axes change places without a transpose."""
    asked = [each.targets.viewed for each in losses if each.targets is not None]
    for what, views in (("inputs", [each.viewed for each in trained]), ("targets", asked)):
        if len(views) >= 2 and all(views):
            yield finding(
                "wrong_layout",
                f"{what} are views of {views[0]}, in all {len(views)} batches that were looked at: neither parts nor"
                " joins axes, so numbers keep their old order and come under other places.",
                1,
                MAY_BE_MEANT,
                "Use `permute` or `transpose` where axes change places, as from channels last to channels first.",
            )


def zero_batches(trained: list[PassRecord]) -> Iterator[Finding]:
    """Some batches are all zeros, and others are not."""
    zero = [each for each in trained if not bool(each.keys.any())]
    if {each.shape for each in zero} - {each.shape for each in trained if bool(each.keys.any())}:
        return  # a point of its own
    if len(zero) >= 3 and 2 * len(zero) <= len(trained):
        yield finding(
            "empty_cache_slot",
            f"the inputs of {len(zero)} of {len(trained)} passes that were looked at are all zeros, first in step"
            f" {zero[0].step + 1}; those of the others are not.",
            zero[0].step + 1,
            "Inputs that are masked for whole batches look so: a condition that is left out now and then.",
        )


def split_overlap(trained: list[PassRecord], evaluated: list[PassRecord]) -> Iterator[Finding]:
    """Scenes of every evaluation are scenes of training."""
    batches = {each.keys.numpy().tobytes() for each in trained}
    evaluated = [each for each in evaluated if each.keys.numpy().tobytes() not in batches]
    rounds = {each.step for each in evaluated}
    seen = {row for each in trained for row in _rows(each.keys) if row}
    asked = {row for each in evaluated for row in _rows(each.keys) if row}
    found = len(asked & seen)
    if len(rounds) >= 3 and found >= LEAKED and found >= SHARE * len(asked):
        yield finding(
            "split_overlap",
            f"{found} of {len(asked)} different scenes that are evaluated, of those that were looked at, are scenes"
            " that training reads.",
            evaluated[0].step,
            "The loss on the training set may be measured on purpose.",
        )


def _pooled(passes: Sequence[PassRecord]) -> Tensor:
    return torch.cat([each.keys for each in passes if each.keys is not None]).double()


def distributions_differ(trained: list[PassRecord], evaluated: list[PassRecord]) -> Iterator[Finding]:
    """Inputs of evaluation are far from those of training."""
    shapes = {each.shape[1:] for each in trained} | {each.shape[1:] for each in evaluated}
    widths = {each.keys.shape[1] for each in (*trained, *evaluated) if each.keys is not None}
    if not trained or not evaluated or len(shapes) > 1 or len(widths) > 1:
        return
    one, other = _pooled(trained), _pooled(evaluated)
    if len(one) < 64 or len(other) < 16 or not bool(one.isfinite().all()) or not bool(other.isfinite().all()):
        return
    spread, spread_there = float(one.std()), float(other.std())
    shift = abs(float(other.mean()) - float(one.mean()))
    if spread > 0 and (spread_there > RATIO * spread or spread > RATIO * spread_there > 0 or shift > SHIFT * spread):
        yield finding(
            "distributions_differ",
            f"inputs of training are {one.mean():.3g} +- {spread:.3g}, those of evaluation {other.mean():.3g} +-"
            f" {spread_there:.3g}: one of both is not prepared as the other.",
            evaluated[0].step,
            "Data of another kind may be evaluated on purpose.",
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
    elif len(live) > 1 and float(live.max()) > UNEQUAL * float(live.min()):
        yield finding(
            "input_scale",
            f"columns of the inputs have spreads from {float(live.min()):.3g} to {float(live.max()):.3g}.",
            trained[0].step + 1,
            MAY_BE_MEANT,
        )
