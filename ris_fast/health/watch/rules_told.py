"""Rules of `watch` on what a told loss is made of: which way it pulls the outputs, which operations it has, terms that
count for nothing, and targets that its operations or the outputs do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.inferred import told_losses
from ris_fast.health.watch.loss import WALKED
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

AWAY, APART = -0.3, 0.2  # mean pull of a loss that goes away from its targets, and of one that does not know them
LOSSES = {"nll_loss": "`nll_loss`", "kl_div": "`kl_div`"}
MANY, UNLEARNED = 100.0, 0.1  # times the outputs at first; share of the targets' variance at last
KEPT = 0.95  # share of outputs with a gradient
LEARNED = ((0.05, 0.6), (0.6, 0.8))  # of the first losses, and the least rank correlation then
TRAINED = 100  # steps after which outputs are boxes
CROSSED = 0.02  # share of boxes
FEW = 4.0  # targets, in units of their own deviation, between the means of outputs and targets that are far apart


def told_findings(loop: LoopRecord) -> list[Finding]:
    """What the graphs of told losses show, and the gradients at their outputs."""
    losses = [each for each in loop.losses if each.signs.looked]
    if not losses:
        return [*binary_below_zero(loop.met), *targets_out_of_scale(loop, told_losses(loop))]
    return [
        *logarithm_missing(losses),
        *targets_of_binary(losses),
        *targets_of_outputs(losses),
        *pulled_away(losses, loop.uphill, any(each.chain and not each.through for each in loop.met[:WALKED])),
        *one_label_without_gradient(loop.losses),
        *constant_labels(loop.losses),
        *targets_out_of_scale(loop, loop.losses),
        *corners_in_another_order(loop.losses),
        *easiest_kept(losses),
    ]


def logarithm_missing(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A loss that expects logarithms of probabilities and is given probabilities or raw outputs."""
    found = [each for each in losses if each.signs.unlogged and each.signs.most_logged is not None]
    found = [each for each in found if float(each.signs.most_logged) > 1e-3 and _alone(each)]
    if len(found) >= 2:
        loss, before = found[0].signs.unlogged
        made = {"Softmax": "a softmax", "Sigmoid": "a sigmoid"}.get(before, "a layer")
        yield finding(
            "target_scale_differs" if loss == "kl_div" else "wrong_units",
            f"{LOSSES[loss]} expects logarithms of probabilities, which are never above zero, and is given what"
            f" {made} makes, up to {max(float(each.signs.most_logged) for each in found):.3g}: the `log_softmax` before"
            " it is missing.",
            found[0].step + 1,
            advice="Put `log_softmax` before this loss, or use `cross_entropy`, which takes raw outputs.",
        )


def _alone(loss: LossRecord) -> bool:
    """Whether it is the loss itself: `nll_loss` also picks scores of a structured one. A divergence from probabilities
    to which it is given probabilities is always below zero."""
    if loss.signs.unlogged[0] == "kl_div":
        return loss.value is not None and float(loss.value) < 0
    before = next((n for n, name in enumerate(loss.chain) if name.startswith("NllLoss")), None)
    return before is not None and set(loss.chain[:before]) <= {"Mean", "Sum", "Div", "Mul"}


def targets_of_binary(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A binary cross-entropy whose targets are not from 0 to 1, so that it falls without end."""
    asked = [(each, each.signs.asked) for each in losses if each.signs.asked is not None]
    beyond = [(each, ends) for each, ends in asked if float(ends[0]) < -1e-3 or float(ends[1]) > 1 + 1e-3]
    if len(beyond) >= 2:
        low, high = min(float(ends[0]) for _, ends in asked), max(float(ends[1]) for _, ends in asked)
        yield finding(
            "target_scale_differs",
            f"a binary cross-entropy is given targets from {low:.3g} to {high:.3g}; it expects 0 to 1, and falls below"
            " zero without end where they lie beyond.",
            beyond[0][0].step + 1,
            "" if high > 1.5 or low < -0.5 else "Labels of a critic are sometimes drawn around one on purpose.",
            advice="Give it labels of 0 and 1: `(labels + 1) / 2` of -1 and 1, or images divided by their maximum.",
        )


def binary_below_zero(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A binary cross-entropy that nobody told of, and that is below zero: with targets from 0 to 1 it cannot be."""
    plain = [each for each in losses if each.chain and set(each.chain[: _binary_at(each)]) <= {"Mean", "Sum", "Div"}]
    below = [each for each in plain if each.value is not None and float(each.value) < 0]
    if len(plain) == len(losses) and len(below) >= 4:
        yield finding(
            "target_scale_differs",
            f"a binary cross-entropy is below zero in {len(below)} of {len(losses)} losses that were looked at, down to"
            f" {min(float(each.value) for each in below if each.value is not None):.3g}, which it is with targets"
            " outside of 0 to 1 only.",
            below[0].step + 1,
            "A weight below zero would do that too.",
            "Give it labels of 0 and 1: `(labels + 1) / 2` of -1 and 1, or images divided by their maximum.",
        )


def _binary_at(loss: LossRecord) -> int:
    """Where in the chain a binary cross-entropy is; behind its end, where there is none."""
    return next((n for n, name in enumerate(loss.chain) if name.startswith("BinaryCrossEntropy")), len(loss.chain) + 1)


def targets_of_outputs(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Targets that are what the outputs are, or what a softmax or sigmoid makes of them: the loss asks for nothing."""
    pairs = number_pairs(losses)
    if len(pairs) < EARLY:
        return
    for kind, made_of in (
        ("the outputs themselves", lambda x: x),
        ("a softmax of the outputs", lambda x: x.softmax(1)),
    ):
        same = [torch.allclose(made_of(made), asked, rtol=1e-4, atol=1e-6) for made, asked in pairs]
        wide = all(len(made) > 1 and float(made.std(0).mean()) > 1e-6 for made, _ in pairs)
        if all(same) and wide:
            yield finding(
                "dead_loss_term",
                f"targets are {kind}, in all {len(pairs)} losses that were looked at: nothing is left to be learned.",
                losses[0].step + 1,
                "A copy of the model that is still what the model is gives such targets.",
                "Let the teacher, the average or the data give the targets, not the network that is trained.",
            )
            return


def learned_order(losses: Sequence[LossRecord]) -> float:
    """How well outputs are in the order of the targets, from -1 to 1, where a loss that stays above zero has fallen
    far: it compares what is made of both. Distances of pairs that are alike or not come into the opposite order. Else
    0."""
    values = [float(each.value) for each in losses if each.value is not None]
    pairs = [
        (each.outputs.few, each.targets.few)
        for each in losses[-EARLY:]
        if each.outputs is not None and each.targets is not None and each.outputs.shape == each.targets.shape
        if each.outputs.few is not None and each.targets.few is not None
    ]
    if len(values) < 2 * EARLY or not pairs or min(values) < 0:
        return 0.0
    made, asked = (torch.cat([pair[side] for pair in pairs]).double() for side in (0, 1))
    distances = bool((made >= 0).all()) and {*asked.unique().tolist()} <= {0.0, 1.0}
    order, left = mean(map(_order, made.T, asked.T)), mean(values[-4:]) / max(mean(values[:4]), 1e-30)
    known = abs(order) if distances else order
    return order if any(left < gone and known > least for gone, least in LEARNED) else 0.0


def _order(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two rows of numbers, where equal ones share a rank; of two labels, by how much more often the
    larger one has the larger number than the smaller one has."""
    labels, ranks = other.unique(return_inverse=True)
    if len(labels) == 2:
        return float(torch.sign(one[ranks == 1][:, None] - one[ranks == 0]).mean())
    away = [each.double() - each.double().mean() for each in (one.unique(return_inverse=True)[1], ranks)]
    return float(away[0] @ away[1] / (away[0].norm() * away[1].norm()).clamp_min(1e-12))


def pulled_away(losses: Sequence[LossRecord], uphill: bool | None = False, several: bool = False) -> Iterator[Finding]:
    """The gradient at the outputs leads away from the targets, or has nothing to do with them. `uphill`: steps go along
    the gradient; None where only some do; `several`: terms of the loss depend on the outputs."""
    seen = [(each, float(each.signs.pull)) for each in losses if each.signs.pull is not None]
    seen = [(each, pull) for each, pull in seen if math.isfinite(pull)]
    if len(seen) < EARLY or learned_order(losses):
        return
    pulls, numbers = [-pull if uphill else pull for _, pull in seen], not seen[0][0].targets.whole
    labels = all({float(each.targets.least), float(each.targets.most)} <= {0.0, 1.0} for each, _ in seen)
    if uphill is not None and mean(pulls) < AWAY and 4 * sum(pull < 0 for pull in pulls) >= 3 * len(pulls):
        yield finding(
            "loss_sign",
            f"a step {'along the gradient, as maximize=True makes it,' if uphill else 'against the gradient'} takes the"
            f" outputs away from their targets, in"
            f" {sum(pull < 0 for pull in pulls)} of {len(pulls)} losses that were looked at: the sign of the loss is"
            " turned.",
            seen[0][0].step + 1,
            "Unlearning and adversaries do so on purpose. " + MAY_BE_MEANT,
            "Give `backward()` what is to become small: a minus too much, or one that is missing, turns it.",
        )
    elif any(each.chooses for each in losses[:WALKED]):
        return  # outputs are compared with other targets than those in their places
    elif (
        numbers and not labels and abs(mean(pulls)) < APART and 8 * sum(abs(each) > 0.5 for each in pulls) < len(pulls)
    ):
        why = "another of its terms outweighs" if several else "others train, and no gradient comes of"
        yield finding(
            "dominating_term" if several else "dead_loss_term",
            f"the gradient at the outputs has nothing to do with the difference from the targets (a cosine of"
            f" {mean(pulls):.2g} in the mean of {len(pulls)} losses that were looked at): {why} the term that compares"
            " them.",
            seen[0][0].step + 1,
            f"A {'`detach()` in' if several else 'term that outweighs'} that term does this too, and so do targets of"
            " other scenes; else these outputs are not what the loss compares.",
        )


def one_label_without_gradient(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Of targets that are one of two numbers, scenes with one of them never have a gradient, from the first step on."""
    counts: dict[float, list[int]] = {}
    for each in losses:
        made, asked = each.outputs, each.targets
        if each.rows is None or made is None or asked is None or asked.few is None or asked.few.shape[1] != 1:
            continue
        if made.shape == asked.shape and asked.shape[0] == len(each.rows):
            some = each.rows[:: math.ceil(len(each.rows) / len(asked.few))]
            for label, reached in zip(asked.few[:, 0].tolist(), some.tolist()):
                counts.setdefault(label, [0, 0])[reached] += 1
    if len(counts) != 2:
        return
    for label, (silent, reached) in counts.items():
        other = next(counts[each] for each in counts if each != label)
        if not reached and silent >= 2 * EARLY and 4 * other[1] > sum(other):
            yield finding(
                "scenes_left_out",
                f"none of {silent} scenes with target {label:g} has a gradient at the output, and those with the other"
                " target have one.",
                losses[0].step + 1,
                "A hinge loss of targets 0 and 1 does that, which expects -1 and 1; so does a weight of zero. "
                + MAY_BE_MEANT,
                "Give the loss the labels that it expects.",
            )


def constant_labels(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Of as many classes as a batch has scenes, all are asked for the same one."""
    found = [each for each in losses if each.targets is not None and each.outputs is not None]
    square = [
        each
        for each in found
        if each.targets.whole
        and each.targets.few is not None
        and len(each.outputs.shape) == 2
        and each.outputs.shape[0] == each.outputs.shape[1] > 3
        and each.targets.shape == each.outputs.shape[:1]
    ]
    labels = [each.targets.few for each in square]
    if len(square) >= 2 * EARLY and all(bool((rows == labels[0][0]).all()) for rows in labels):
        yield finding(
            "constant_targets",
            f"each batch has outputs of shape {square[0].outputs.shape}, a score of every scene with every other, and"
            f" the same label {int(labels[0][0, 0])} for all.",
            square[0].step + 1,
            "One class that all are meant to have looks like that.",
            "Of a score of every pair each scene's own is right: `torch.arange(len(scores))`.",
        )


def targets_out_of_scale(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Targets that are far from where the outputs are, to the end."""
    pairs = number_pairs(losses)
    if len(pairs) < EARLY or loop.steps < 50 or learned_order(losses):
        return
    made, asked = (torch.cat([pair[side] for pair in pairs[-EARLY:]]) for side in (0, 1))
    spread, away = asked.std(0).clamp_min(1e-12), (asked.mean(0) - made.mean(0)).abs()
    if not asked.any():
        return  # residuals that are to vanish: zero has no scale
    large = float(asked.abs().max()) > 30 or float(asked.abs().max()) < 1e-3
    sizes = float(made.square().mean().sqrt()), float(asked.square().mean().sqrt())
    unlike = not 0.1 < sizes[0] / max(sizes[1], 1e-30) < 10
    first = [torch.cat([pair[side] for pair in pairs[:4]]) for side in (0, 1)]
    begun = [float(each.square().mean().sqrt()) for each in first]
    left = float((made - asked).square().mean() / asked.var().clamp_min(1e-30))
    unlearned = begun[1] > MANY * max(begun[0], 1.0) and left > UNLEARNED
    if large and (unlike or unlearned or float((away / spread).median()) > FEW):
        yield finding(
            "target_scale_differs",
            f"after {loop.steps} steps outputs are {float(made.mean()):.3g} +- {float(made.std()):.2g}, and targets"
            f" {float(asked.mean()):.3g} +- {float(asked.std()):.2g}; the network began at {begun[0]:.2g}.",
            loop.steps,
            "A rate that is too small would need long for that way, too.",
            "Train on targets of mean 0 and deviation 1, and turn outputs back where they are used.",
        )


def easiest_kept(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Some outputs have a gradient, and none of them is further from its target than any of those without."""
    seen = [each.signs.easiest.tolist() for each in losses if each.signs.easiest is not None]
    kept = [(share, far, near) for share, far, near in seen if 0 < share < KEPT]
    if (
        len(kept) >= EARLY
        and learned_order(losses) >= 0
        and len(kept) == len(seen)
        and all(far <= near for _, far, near in kept)
    ):
        yield finding(
            "scenes_left_out",
            f"{mean(share for share, *_ in kept):.0%} of the outputs have a gradient, and in all {len(kept)} losses"
            " that were looked at they are those that are nearest to their targets: what is hard is left out.",
            losses[0].step + 1,
            "Where labels are wrong now and then, that may be meant.",
            "To learn from the hardest take the largest losses: `losses.topk(count)`, whose `largest` is true.",
        )


def corners_in_another_order(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Boxes, of which the loss takes the larger first two and the smaller last two numbers as they are, as of corners;
    and targets, or outputs to the end, whose last two are smaller than the first."""
    both = [each for each in losses if each.outputs is not None and each.targets is not None]
    boxes = [each for each in both if each.outputs.shape[-1:] == each.targets.shape[-1:] == (4,)]
    if len(boxes) < EARLY or len(boxes) < len(losses) or not all(each.extremes for each in losses[:WALKED]):
        return
    for what, few in (
        ("targets", [each.targets.few for each in boxes]),
        ("outputs", [each.outputs.few for each in (boxes[-EARLY:] if losses[-1].step > TRAINED else ())]),
    ):
        whole = [each.reshape(-1, 4) for each in few if each is not None and each.shape[1] % 4 == 0]
        if not whole:
            continue
        rows = torch.cat(whole)
        turned = int((rows[:, 2:] < rows[:, :2]).any(1).sum())
        if turned >= 4 and turned > CROSSED * len(rows):
            yield finding(
                "wrong_layout",
                f"the loss compares boxes by their corners, and of {turned} of {len(rows)} {what} that were looked at"
                " the second corner lies before the first: they are given in another way, as by corner or centre and"
                " size.",
                losses[0].step + 1,
                "Boxes that are wrong in the data look the same.",
                "Bring boxes to corners (x1, y1, x2, y2) before their overlap is taken: `torchvision.ops.box_convert`.",
            )
            return


def number_pairs(losses: Sequence[LossRecord]) -> list[tuple[Tensor, Tensor]]:
    """A few rows (R, F) of outputs and targets of one shape that are no labels."""
    return [
        (each.outputs.few, each.targets.few)
        for each in losses
        if each.outputs is not None and each.targets is not None and not each.targets.whole
        if each.outputs.shape == each.targets.shape
        if each.outputs.few is not None and each.targets.few is not None
        if bool(each.outputs.few.isfinite().all()) and bool(each.targets.few.isfinite().all())
    ]
