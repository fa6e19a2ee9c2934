"""Rules of `watch` on what came of a loop: outputs that have become one, targets that they do not follow although
nothing else is wrong, and what is most likely behind that. None is certain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.dependence import by_chance, distinct, explained_share, scenes_with_targets
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.inferred import told_losses
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.records import EARLY, LoopRecord
from ris_fast.health.watch.rules_told import learned_order, number_pairs
from ris_fast.health.watch.suspects import Suspect, odd_inputs, odd_weights, shrunk_weights, suspect

STEPS, UNTOLD = 120, 240  # that are enough to learn something, as was told, and as follows from gradients
FLAT = 0.02  # of the spread between scenes at first
CLOSE, ENTROPY = 0.1, 0.93  # share of the variance, and of the entropy of labels, that are as good as nothing
CHANCE = 16.0  # squares of a correlation, times the numbers it is of, that are no accident
FAR = 10.0  # times the variance of targets, that outputs are from them
FALLEN = 0.5  # of the first losses
ENDS = {"saturated_output", "dead_units"}  # of activations, where large inputs or weights lead to
BEHIND_ENDS = {"ignored_input", "vanishing_gradient", "zeroed_gradients", "scenes_left_out"}
BENT = {"Sigmoid", "Softmax", "LogSoftmax", "BinaryCrossEntropyWithLogits"}  # numbers that are no answers yet
CHOOSING = {"Index", "IndexSelect", "Gather", "Select", "MaskedSelect", "Topk", "Slice"}
PICKING = {"Index", "Gather"}  # another number of each scene
ABOVE = 1.1  # times the entropy of labels
UNSAID = {"stalled_at_baseline"}  # findings that leave the cause open
PAIRS = Suspect(
    "shuffled_labels",
    "neither gradients, steps, modes nor batches show a mistake: what is left first is that targets do not belong to"
    " their inputs",
    "A task that cannot be solved from these inputs, a rate that does not fit and noise look the same: let the model"
    " learn a single batch by heart, then print ten inputs with their targets.",
    "Index inputs and targets with one and the same order, and look at some pairs by eye.",
)
TELLING = 0.15  # share of the targets' variance that follows from the inputs of other scenes
ENOUGH, AGAIN = 128, 48  # scenes; times that one is met again
BY_HEART = (
    "Targets of other scenes look like that, and so do targets that are noise: the loss of scenes that were never"
    " trained on decides."
)
TERMS = Suspect(
    "dominating_term",
    "the loss is a sum of terms, and others than the one that compares them train",
    "Targets that do not belong to their inputs look the same: train once with that term alone.",
    "Print each term and its gradient at the outputs, and bring them to a like size: a sum beside a mean is as many"
    " times larger as it has numbers.",
)


def outcome_findings(loop: LoopRecord, found: Sequence[Finding]) -> Iterator[Finding]:
    """What came of it; `found`: what was found else."""
    causes = {each.cause for each in found}
    if (
        causes & (ENDS | {"ignored_input"})
        and causes <= ENDS | UNSAID | BEHIND_ENDS
        and (why := odd_inputs(loop) or odd_weights(loop)) is not None
    ):
        yield finding(why.cause, f"{why.evidence}.", 1, why.doubt, why.advice)
    if causes - UNSAID:
        return
    stalled = next((each.evidence.partition(". ")[0] for each in found), "")
    losses = told_losses(loop)
    if (
        loop.steps < (STEPS if loop.losses or stalled else UNTOLD)
        or len(losses) < 2 * EARLY
        or len(loop.optimizers) > 1
    ):
        return
    odd = suspect(loop)
    if not loop.losses and (_chooses(loop) or (loop.forward is not None and loop.forward.in_parts)):
        return
    both = scenes_with_targets(loop, losses)
    known = _of_numbers(losses) or _of_labels(losses, ABOVE if odd is None else math.inf) or stalled
    if known:
        added = all(each.chain and each.chain[-1] in ("Add", "Sub") and each.chain_shapes[-1] == () for each in losses)
        why = odd or (TERMS if added else None) or (None if stalled == known else _unrelated(both))
        if why is not None:
            yield finding(
                why.cause, f"after {loop.steps} steps {known}; {why.evidence}.", loop.steps, why.doubt, why.advice
            )
            return
    if (why := shrunk_weights(loop)) is not None:
        yield finding(why.cause, f"{why.evidence}.", loop.steps, why.doubt, why.advice)
    elif both is not None and (heart := list(known_by_heart(loop, both, losses))):
        yield from heart
    elif not known:
        yield from outputs_become_one(losses)


def _unrelated(both: tuple[Tensor, Tensor] | None) -> Suspect:
    """What is left where nothing shows a mistake, after a look at whether targets follow from inputs at all."""
    share = None if both is None else explained_share(*both)
    silent = 0.0 if both is None else by_chance(len(distinct(both[0])[0]))
    if share is None or silent <= share < TELLING:
        return PAIRS
    if share < silent:
        what = "nor does a kernel regression predict any of the targets from the inputs of other scenes"
        return replace(PAIRS, evidence=f"{PAIRS.evidence}; {what}")
    return Suspect(
        "stalled_above_inputs",
        f"a kernel regression that sees the same inputs predicts {share:.0%} of the targets' variance, of scenes that"
        " it was not fitted to, so that inputs and targets belong together",
        "What is left is between them: the rate, weights that begin badly, an activation or a loss that stops the"
        " gradient. A network that is meant to be weak, as one of a boosted sum, looks the same.",
        "Let the model learn a single batch by heart, with ten times and a tenth of the rate; where neither does it,"
        " print the gradient's norm of every tensor.",
    )


def known_by_heart(loop: LoopRecord, both: tuple[Tensor, Tensor], losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Scenes come again and again, and of others nothing can be predicted: what is learned of them is no rule."""
    scenes = len(distinct(both[0])[0])
    if scenes < ENOUGH or len(both[0]) - scenes < AGAIN or _asks_by_choice(loop, losses):
        return
    share = explained_share(*both)
    if share is None or share >= by_chance(scenes):
        return
    values = [float(each.value) for each in losses if each.value is not None][-EARLY:]
    evidence = (
        f"the {scenes} scenes that were looked at come again and again (with a loss of"
        f" {sum(values) / max(1, len(values)):.3g} in the end), and a kernel regression predicts nothing of a target"
        f" from other scenes ({max(0.0, share):.1%} of the variance)"
    )
    asked = both[1]
    circle = asked.shape[1] == 2 and bool(((asked.square().sum(1) - 1).abs() < 1e-3).all())
    if circle and not bool((asked.frac() == 0).all()):
        yield finding(
            "wrong_units",
            f"{evidence}. Targets are the sine and cosine of an angle: one in degrees that is taken for radians goes"
            " round many times, and looks like an accident.",
            loop.steps,
            BY_HEART,
            "Turn angles to radians before their sine is taken, `torch.deg2rad`; then look at some pairs by eye.",
        )
    else:
        yield finding("shuffled_labels", f"{evidence}.", loop.steps, BY_HEART, PAIRS.advice)


def _asks_by_choice(loop: LoopRecord, losses: Sequence[LossRecord]) -> bool:
    """Whether of each scene's outputs some are chosen by an index, as by an action that was taken: targets depend on
    that, which is no input."""
    passes = {each.number: each for each in loop.forward.passes} if loop.forward is not None else {}
    some = [each for each in losses if each.number in passes and each.outputs is not None]
    return any(
        PICKING.intersection(each.behind)
        and math.prod(each.outputs.shape[1:]) < math.prod(passes[each.number].output_shape[1:])
        for each in some
    )


def _chooses(loop: LoopRecord) -> bool:
    """Whether passes without gradients, in training mode, see more scenes than those that train in the same steps: the
    hardest are chosen, of which the loss says little."""
    passes = loop.forward.passes if loop.forward is not None else []
    rows = {each.step: each.shape[0] for each in passes if each.reached and each.shape}
    quiet = [each for each in passes if each.training and not each.grad and each.shape and each.step in rows]
    return sum(each.shape[0] > rows[each.step] for each in quiet) >= EARLY


def outputs_become_one(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Outputs of different scenes were different, and are next to the same."""
    rows = [each.outputs.few for each in losses if each.outputs is not None and each.outputs.few is not None]
    rows = [each for each in rows if len(each) >= 4 and bool(each.isfinite().all())]
    if len(rows) < 2 * EARLY or any(each.shape[1] != rows[0].shape[1] for each in rows):
        return
    spreads = [float(each.std(0).mean()) for each in rows]
    first, last = sum(spreads[:4]) / 4, sum(spreads[-4:]) / 4
    asked = [each.targets.few for each in losses[-4:] if each.targets is not None and each.targets.few is not None]
    same = asked and not any(float(each.std(0).mean()) > 0 for each in asked if len(each) > 1)
    if last < FLAT * first and not same:
        yield finding(
            "collapsed",
            f"outputs of the scenes of a batch differed by {first:.3g} at first and differ by {last:.3g} after"
            f" {losses[-1].step} steps: the same answer for all lowers this loss as well.",
            losses[-1].step,
            "Weights that decay too fast, and a term that outweighs the others, do that too.",
            "Metric losses need negatives, a stop of the gradient on one side or a term that keeps outputs apart; with"
            " several terms print each and its gradient at the outputs.",
        )


def _of_numbers(losses: Sequence[LossRecord]) -> str:
    pairs = number_pairs(losses)[-2 * EARLY :]
    if len(pairs) < EARLY or len({each.shape[1] for pair in pairs for each in pair}) > 1:
        return ""
    made, asked = (torch.cat([pair[side] for pair in pairs]).double() for side in (0, 1))
    centred = [each - each.mean(0) for each in (made, asked)]
    variance = float(centred[1].square().sum())
    sizes = float(centred[0].norm() * centred[1].norm())
    labels = {*asked.unique().tolist()} <= {0.0, 1.0} and any(BENT.intersection(each.chain) for each in losses)
    if len(made) < 4 * EARLY or not variance or labels or learned_order(losses) or _of_other_pairs(losses):
        return ""
    squared = any({"MseLoss", "SmoothL1Loss", "HuberLoss", "Pow", "Abs"}.intersection(each.chain) for each in losses)
    followed = float((centred[0] * centred[1]).sum()) / sizes if sizes else 0.0
    left = float((made - asked).square().sum()) / variance
    return (
        f"outputs and targets have a correlation of {followed:.2g}, and the difference is {left:.2g} of the targets'"
        " variance"
        if (followed**2 < min(CLOSE, CHANCE / made.numel()) and left > 1 - CLOSE) or (left > FAR and squared)
        else ""
    )


def _of_other_pairs(losses: Sequence[LossRecord]) -> bool:
    """Whether the loss compares outputs with other targets than those in their places, the nearest, or complex ones
    whatever their phase is and has fallen far."""
    values = [float(each.value) for each in losses if each.value is not None]
    turned = all(each.outputs is not None and each.outputs.complex for each in losses)
    fallen = len(values) >= 2 * EARLY and 0 <= sum(values[-4:]) < FALLEN * sum(values[:4])
    return any(each.chooses for each in losses) or (turned and fallen)


def _of_labels(losses: Sequence[LossRecord], above: float) -> str:
    """Where the loss is a cross-entropy alone, of classes or of zeros and ones, and no more than `above` times that
    of a guess: of scenes that are chosen as the hardest it is more."""
    entropies = ("NllLoss", "BinaryCrossEntropy")
    losses = [each for each in losses if each.targets is not None]
    if not losses or any(not each.chain or not each.chain[0].startswith(entropies) for each in losses):
        return ""
    labels = [each.targets.few for each in losses if each.targets is not None and each.targets.few is not None]
    counts = Counter(int(label) for few in labels for label in few.flatten())
    if min(counts) < 0 or any(CHOOSING.intersection(each.chain) for each in losses):
        return ""  # a loss of some scenes, such as the hardest
    if losses[0].chain[0] != "NllLoss" and not counts.keys() <= {0, 1}:
        return ""
    entropy = -sum(count / counts.total() * math.log(count / counts.total()) for count in counts.values())
    values = [float(each.value) for each in losses if each.value is not None][-EARLY:]
    mean = sum(values) / max(1, len(values))
    return (
        f"the loss is {mean:.3g}, and a guess by the frequency of the labels alone has {entropy:.3g}"
        if len(values) == EARLY and entropy > 0.1 and ENTROPY * entropy < mean < above * entropy
        else ""
    )
