"""Rules of `watch` on the order in which numbers lie: axes that change places without a transpose, pictures that are
turned, views that lie in another order than the loss takes them, and transposes without a conjugate.

None is certain: what is meant by an axis is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.loss import WALKED
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.pass_records import PassRecord
from ris_fast.health.watch.records import EARLY, LoopRecord
from ris_fast.health.watch.tensors import GRID

SYMMETRIC, NOT = 1e-4, 1e-2  # relative distances of a matrix from its transpose
PAIRED = 0.2  # that scenes of a pair are more alike than others
TURNED = 0.15  # correlation of pictures
MOST_ALIKE = 0.5  # of that of all numbers, a correlation of those of one channel
ALIKE, PEAK = 0.1, 0.02  # that one correlation is above others


def layout_findings(loop: LoopRecord) -> list[Finding]:
    """What the order of numbers shows."""
    if loop.forward is None:
        return []
    trained = [each for each in loop.forward.passes if each.training and each.reached and each.keys is not None]
    return [
        *turned_pictures(loop.losses, {each.number: each for each in loop.forward.passes}),
        *pairs_apart(trained, loop.losses or loop.met),
        *(viewed_in_another_order(trained, loop.losses) or channels_last(trained)),
        *not_hermitian(loop, trained),
    ]


def viewed_in_another_order(trained: Sequence[PassRecord], losses: Sequence[LossRecord]) -> list[Finding]:
    """Inputs or targets are views of tensors whose axes change places without a transpose."""
    asked = [each.targets.viewed for each in losses if each.targets is not None]
    for what, views in (("inputs", [each.viewed for each in trained]), ("targets", asked)):
        if len(views) >= 2 and all(views):
            return [
                finding(
                    "wrong_layout",
                    f"{what} are views of {views[0]}, in all {len(views)} batches that were looked at: that neither"
                    " parts nor joins axes, so numbers keep their old order and come under other places.",
                    1,
                    MAY_BE_MEANT,
                    "Use `permute` or `transpose` where axes change places, as from channels last to channels first.",
                )
            ]
    return []


def channels_last(trained: Sequence[PassRecord]) -> list[Finding]:
    """Numbers of a scene (C, ...) are most alike C places apart, and not side by side: channels come last in them. So
    are those of most of the C, while a comb of pilots is one of them."""
    known = [each.likeness for each in trained if each.likeness is not None]
    known = [each for each in known if len(each) == len(known[0])]
    if len(known) < EARLY:
        return []
    beside, before, apart, behind, below, *channels = torch.stack(known).double().mean(0).tolist()
    if max(below, ALIKE) > apart:  # neighbours as the shape is are more alike, as those of a Toeplitz matrix
        return []
    if apart - max(beside, before, behind) < PEAK or sorted(channels)[(len(channels) - 1) // 2] < MOST_ALIKE * apart:
        return []
    shape = trained[0].shape
    return [
        finding(
            "wrong_layout",
            f"inputs have shape {shape}, and numbers of a scene are most alike {shape[1]} places apart (a correlation"
            f" of {apart:.2g}; {beside:.2g} side by side, {before:.2g} and {behind:.2g} one place nearer or further):"
            f" the {shape[1]} channels lie last in memory, and were reshaped to come first.",
            1,
            f"A pattern that comes again every {shape[1]} places looks like that.",
            "Use `permute` or `transpose` where axes change places, as from channels last to channels first.",
        )
    ]


def turned_pictures(losses: Sequence[LossRecord], passes: dict[int, PassRecord]) -> Iterator[Finding]:
    """Pictures that are asked for go with those that are given once they are turned, and not as they are."""
    both = [
        (one.plane, each.targets.plane, one.shape)
        for each in losses
        if (one := passes.get(each.number)) is not None and each.targets is not None
        if one.plane is not None and each.targets.plane is not None and len(one.plane) == len(each.targets.plane)
        if one.shape[-2:] == each.targets.shape[-2:]
    ]
    if len(both) < EARLY:
        return
    given, asked = (torch.cat([pair[side] for pair in both]).double().unflatten(1, (GRID, GRID)) for side in (0, 1))
    shape = both[0][2]
    ways = {
        "as they are": asked,
        "left and right exchanged": asked.flip(2),
        "top and bottom exchanged": asked.flip(1),
        "turned upside down": asked.flip(1, 2),
    }
    if shape[-1] == shape[-2]:
        ways |= {"rows and columns exchanged": asked.mT, "turned by a quarter": asked.rot90(1, (1, 2))}
        ways |= {"turned by a quarter the other way": asked.rot90(-1, (1, 2))}
    centred = given - given.mean(0)
    alike = {name: max(_correlation(centred, way), _correlation(centred.abs(), way)) for name, way in ways.items()}
    best = max(alike, key=lambda name: alike[name])
    own = alike["as they are"]
    if alike[best] > TURNED and own < 0.3 * alike[best] and bool(asked.std(0).any()):
        yield finding(
            "wrong_layout",
            f"pictures that are given and asked for have a correlation of {own:.2g} place by place, and of"
            f" {alike[best]:.2g} with {best}: one of both is laid out in another way.",
            1,
            "A network that is to turn pictures is asked for that.",
            "Load and augment both in the same way, and look at some pairs, one laid over the other; sizes of libraries"
            " for pictures are (width, height), those of arrays (rows, columns).",
        )


def _correlation(one: Tensor, other: Tensor) -> float:
    """Its magnitude, of numbers less their mean at each place."""
    a, b = one - one.mean(0), other - other.mean(0)
    return abs(float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)))


def pairs_apart(trained: Sequence[PassRecord], losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Scenes are alike in pairs that lie in one order in the batch, and the loss parts the batch in the other."""
    known = [each.pairs for each in trained if each.pairs is not None]
    parted = {each.pairing for each in losses[:WALKED]}
    if len(known) < EARLY or len(parted) != 1:
        return
    next_to, behind, halves = torch.stack(known).double().mean(0).tolist()
    lie = "neighbours" if next_to - max(behind, halves) > PAIRED else "halves" if halves - next_to > PAIRED else ""
    if lie and {lie, *parted} == {"neighbours", "halves"}:
        apart = {"neighbours": "one after the other", "halves": "in the two halves of the batch"}
        yield finding(
            "wrong_layout",
            f"pairs of scenes that are alike lie {apart[lie]} (a correlation of {max(next_to, halves):.2g}, and of"
            f" {min(next_to, halves):.2g} {apart[parted.pop()]}), and the loss takes them from where they do not.",
            1,
            MAY_BE_MEANT,
            "Stack both views along an axis of their own, and look at the shape where the loss parts them:"
            " `(scenes, 2, ...)` and `(2, scenes, ...)` are not the same order.",
        )


def not_hermitian(loop: LoopRecord, trained: list[PassRecord]) -> Iterator[Finding]:
    """Complex matrices that are equal to their transpose, where others, or covariances, are equal to its conjugate."""
    told = [each for each in loop.losses if each.outputs is not None and each.targets is not None]
    pairs = [(each.outputs.matrices, each.targets.matrices) for each in told]
    both = [(made.tolist(), asked.tolist()) for made, asked in pairs if made is not None and asked is not None]
    advice = "Use `.mH`, the conjugate transpose, where the second factor is `.mT` or `.transpose(-1, -2)`."
    for one, other, what in ((0, 1, ("outputs", "targets")), (1, 0, ("targets", "outputs"))):
        wrong = [pair for pair in both if _is_symmetric(*pair[one]) and _is_symmetric(*reversed(pair[other]))]
        if len(wrong) == len(both) >= EARLY:
            yield finding(
                "conjugation_error",
                f"{what[0]} are complex matrices that are equal to their transpose, and {what[1]} are equal to their"
                f" conjugate transpose, in all {len(both)} losses that were looked at.",
                1,
                MAY_BE_MEANT,
                advice,
            )
    given = [each.matrices.tolist() for each in trained if each.matrices is not None]
    if len(given) >= EARLY and all(_is_symmetric(*each) for each in given):
        yield finding(
            "conjugation_error",
            "inputs are complex matrices that are equal to their transpose and not to its conjugate, in all"
            f" {len(given)} batches that were looked at: products of snapshots with their transpose are, in which their"
            " phases remain.",
            trained[0].step + 1,
            "Matrices of a reciprocal network are symmetric, too.",
            advice,
        )


def _is_symmetric(from_transpose: float, from_conjugate: float) -> bool:
    return from_transpose < SYMMETRIC and from_conjugate > NOT
