"""Rules of `watch` on the losses that `seen.loss` was given: where they come from, shapes, ranges, scenes left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.graph import MOVING
from ris_fast.health.watch.inferred import told_losses
from ris_fast.health.watch.loss import RAW, REDUCING
from ris_fast.health.watch.loss_records import LossRecord, Numbers
from ris_fast.health.watch.operations import CUTTING
from ris_fast.health.watch.records import EARLY, LoopRecord
from ris_fast.health.watch.rules_objective import distance_falls

LOOKS = 2  # as many losses show it
ENDS = {"Relu": (0.0, math.inf), "Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
_SPOKEN = {
    "LogSoftmax": "a cross-entropy",
    "BinaryCrossEntropyWithLogits": "a binary cross-entropy with logits",
    "Logsumexp": "a distribution that is given `logits`",
}
IGNORED, LEFT_OUT = -100, 0.05  # label that a cross-entropy leaves out; share of sequences
SCENES = 8  # of a batch, from which on a single one with a gradient is no small share


def loss_findings(loop: LoopRecord) -> list[Finding]:
    """What the losses show."""
    losses = loop.losses
    if not losses:
        known = told_losses(loop)
        return [
            *softmax_twice(loop.met),
            *nan_loss(loop.met),
            *scores_cut_off(loop.met),
            *limited_output(known),
            *constant_targets(known, len(loop.optimizers) == 1),
        ]
    return [
        *scores_cut_off(losses),
        *without_history(loop, losses),
        *shapes_broadcast(losses),
        *one_row_for_all(loop, losses),
        *softmax_twice(losses),
        *nan_loss(losses),
        *limited_output(losses),
        *scenes_left_out(losses),
        *labels_cut_off(losses),
        *class_left_out(loop, losses),
        *constant_targets(losses, len(loop.optimizers) == 1),
        *ignored_input(losses),
        *(negated_loss(losses) if loop.uphill is False and not distance_falls(loop, losses) else ()),
    ]


def without_history(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Losses that do not depend on the model, where no backward pass reaches an output of it."""
    if _set_by_hand(loop) or (loop.forward is not None and any(each.reached for each in loop.forward.passes)):
        return
    step, count = losses[0].step + 1, len(losses)
    if all(each.made_anew for each in losses):
        yield finding(
            "loss_rebuilt",
            f"all {count} losses are new tensors without a history, made from numbers: no gradient reaches the model.",
            step,
        )
    elif not any(each.requires_grad for each in losses) and any(each.outputs_require_grad for each in losses):
        what = "tensors without a gradient" if losses[0].tensor else "plain numbers"
        yield finding("detached_loss", f"all {count} losses are {what}, though the outputs have one.", step)
    elif {each.of_model for each in losses} <= {False, None} and losses[0].of_model is False:
        yield finding(
            "detached_loss",
            f"{count} losses have a history, and no parameter of the model is in it.",
            step,
            advice="Look for `detach()`, `.data`, `.item()` or numpy between the outputs and the loss.",
        )


def _set_by_hand(loop: LoopRecord) -> bool:
    """Whether gradients above zero are in every step, and no backward brought them: those of a copy of the model, or of
    a formula."""
    steps = [each for by in loop.optimizers for each in by.records]
    return bool(steps) and all(
        bool(each.hooked) and len(each.none_grads) == len(each.hooked) and float(each.grad_at_step.norm()) > 0
        for each in steps
    )


def shapes_broadcast(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Outputs and targets of different shapes, and between outputs and loss a tensor that has both.

    A matrix of all pairs may be meant where the loss is no plain mean of a difference.
    """
    found = [(each, made) for each in losses if (made := _broadcast(each)) is not None]
    if len(found) >= min(LOOKS, len(losses)) and found:
        each, made = found[0]
        plain = all(one.direct and set(one.chain[:-1]) <= REDUCING | MOVING | {"Sub"} for one, _ in found)
        yield finding(
            "shapes_broadcast",
            f"outputs of shape {each.outputs.shape} and targets of shape {each.targets.shape} make a difference of"
            f" shape {made}: every output is compared with every target.",
            each.step + 1,
            "" if plain else "A loss over all pairs looks like that.",
        )


def _broadcast(loss: LossRecord) -> tuple[int, ...] | None:
    """The shape, if the loss has it on its way and it is larger than both."""
    if loss.outputs is None or loss.targets is None or loss.targets.whole:
        return None
    shapes = loss.outputs.shape, loss.targets.shape
    try:
        made = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None
    larger = math.prod(made) > max(map(math.prod, shapes))
    return made if larger and made in loss.chain_shapes else None


def one_row_for_all(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """The model is given a batch and gives one row, which the loss spreads over the targets of all scenes."""
    pairs = [(each, each.outputs.shape, each.targets.shape) for each in losses if each.outputs and each.targets]
    found = [
        (each, made, asked)
        for each, made, asked in pairs
        if len(made) == len(asked) > 1 and made[:1] == (1,) and asked[0] > 1 and asked in each.chain_shapes
    ]
    if len(found) < LOOKS or len(found) < len(pairs):
        return
    loss, made, asked = found[0]
    batches = loop.forward is not None and any(each.shape[:1] == asked[:1] for each in loop.forward.passes)
    if batches:
        yield finding(
            "batch_shrinks",
            f"the model is given {asked[0]} scenes and gives outputs of shape {made}, which are compared with targets"
            f" of shape {asked}: one row for all of them.",
            loss.step + 1,
            "An answer that is meant to be the same for all scenes looks like that.",
        )


def softmax_twice(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A softmax or sigmoid whose numbers go into another one within the loss."""
    if found := [each for each in losses if each.twice]:
        within, before = found[0].twice
        yield finding(
            "softmax_twice",
            f"a {before.lower()} comes before {_SPOKEN[within]}, which applies its own, in the graph of the loss.",
            found[0].step + 1,
        )


def nan_loss(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Losses that are NaN to the end, and where the NaN is first."""
    values = [float("nan") if each.value is None else float(each.value) for each in losses]
    bad = [number for number, each in enumerate(losses) if each.value is not None and math.isnan(values[number])]
    if len(bad) < LOOKS or bad != [*range(bad[0], len(losses))]:
        return
    first = losses[bad[0]]
    if first.step and _has_nan(first.outputs) and not _has_nan(first.targets):
        return  # it follows from what the steps before have done, or from the inputs
    if _has_nan(first.targets):
        yield finding(
            "nonfinite_data", "there are NaN among the targets of the first loss that is NaN.", first.step + 1
        )
        return
    where = (
        "the outputs that it is made of have NaN too"
        if _has_nan(first.outputs)
        else "the outputs and targets that it is made of are finite: a root, division or logarithm in the loss makes it"
        if first.outputs is not None
        else "what it is made of was not given"
    )
    evidence = f"the loss is NaN since step {first.step + 1}; {where}."
    yield finding("nonfinite_gradients", evidence, first.step + 1, harm=len(bad) / len(losses))


def _has_nan(numbers: Numbers | None) -> bool:
    return numbers is not None and numbers.nonfinite is not None and bool(numbers.nonfinite[0])


def limited_output(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Targets that the last operation of the outputs cannot give; an imaginary part that is zero and should not be.

    The loss may change either before it compares them."""
    pairs = [(each, each.outputs, each.targets) for each in losses if each.outputs and each.targets]
    pairs = [(each, made, asked) for each, made, asked in pairs if not asked.whole and made.shape == asked.shape]
    if len(pairs) < LOOKS:
        return
    doubt = "Unless the loss compares something else than these outputs and targets, it cannot get to zero."
    first, step = pairs[0][0], pairs[0][0].step + 1
    low, high = (min(float(asked.least) for *_, asked in pairs), max(float(asked.most) for *_, asked in pairs))
    last = next((name for name in first.behind if name not in MOVING), "")
    least, most = ENDS.get(last, (-math.inf, math.inf)) if last not in CUTTING else _cut([made for _, made, _ in pairs])
    edge = 0.05 * (high - low)
    if low < least - edge or high > most + edge:
        yield finding(
            "limited_output",
            f"outputs end in a {last.lower()}, which gives {_range(least, most)}, and targets lie in [{low:.3g},"
            f" {high:.3g}].",
            step,
            doubt,
        )
    elif all(made.complex and asked.complex for _, made, asked in pairs):
        real = all(float(made.imaginary) == 0 for _, made, _ in pairs)
        if real and all(float(asked.imaginary) > 0 for *_, asked in pairs):
            evidence = "the imaginary part of all outputs is exactly zero, and that of the targets is not."
            yield finding("limited_output", evidence, step, doubt)


def scores_cut_off(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Scores that end in a ReLU, right before a loss that makes probabilities of them."""
    chains = [[name for name in each.chain if name not in MOVING] for each in losses if each.direct]
    cut = [chain[-2] for chain in chains if chain[-1:] == ["Relu"] and chain[-2:-1] and chain[-2] in RAW]
    if len(cut) == len(losses) >= LOOKS:
        lost = "no class can get less than another's zero" if cut[0] == "LogSoftmax" else "none is below one half"
        yield finding(
            "limited_output",
            f"outputs end in a ReLU, and {_SPOKEN[cut[0]]} makes probabilities of them, in all {len(cut)} losses:"
            f" {lost}, and scores below zero have no gradient.",
            losses[0].step + 1,
            MAY_BE_MEANT,
            "Leave out the activation behind the last layer: these losses take scores of any sign.",
        )


def _cut(outputs: Sequence[Numbers]) -> tuple[float, float]:
    """Where a clamp cuts: numbers that several outputs have at an end, bit for bit."""
    rows = torch.cat([each.few.flatten() for each in outputs if each.few is not None])
    ends = [(each, int((rows == each).sum())) for each in rows.aminmax()]
    (low, lows), (high, highs) = [(float(end), count) for end, count in ends]
    return low if lows >= 2 * EARLY else -math.inf, high if highs >= 2 * EARLY else math.inf


def _range(least: float, most: float) -> str:
    if least == -math.inf:
        return f"nothing above {most:g}"
    return f"nothing below {least:g}" if most == math.inf else f"numbers from {least:g} to {most:g}"


def scenes_left_out(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """One and the same scene of each batch has a gradient at the output, or the same half or fewer of them.

    Targets that are given have a row for each scene; masks of nodes and of unknown labels leave rows out for good.
    """
    found = [each for each in losses if each.rows is not None and len(each.rows) >= SCENES and bool(each.rows.any())]
    alike = [each for each in found if torch.equal(each.rows, found[0].rows)]
    if len(found) < 4 or len(alike) < len(found):
        return
    count, rows = int(found[0].rows.sum()), len(found[0].rows)
    per_scene = all(each.targets is not None and each.targets.shape[:1] == (rows,) for each in found)
    if 2 * count <= rows:
        yield finding(
            "scenes_left_out",
            f"{count} of {rows} scenes of a batch have a gradient at the output, the same places in all {len(found)}"
            " batches that were looked at.",
            found[0].step + 1,
            "" if per_scene and count == 1 else "A mask of scenes, or of time steps, looks like that.",
        )


def labels_cut_off(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Sequences of which no label counts, while in all others those that count follow each other, as in an answer.
    Labels that are drawn, as of masked tokens, lie apart."""
    both = [
        (each.rows, each.targets)
        for each in losses
        if each.rows is not None and each.targets is not None and each.targets.whole and each.targets.keys is not None
        if len(each.targets.shape) == 2 and each.targets.shape[0] == len(each.rows) and bool(each.rows.any())
    ]
    counts = [row != IGNORED for _, asked in both for row in asked.keys]
    counts = [each for each in counts if bool(each.any())]
    answers = [each.nonzero()[:, 0].tolist() for each in counts if not bool(each.all())]
    in_a_row = bool(answers) and all(places[-1] - places[0] == len(places) - 1 for places in answers)
    silent, scenes = sum(int((~rows).sum()) for rows, _ in both), sum(len(rows) for rows, _ in both)
    several = any(len(places) > 1 for places in answers)
    if len(both) >= EARLY and in_a_row and several and 2 * len(answers) > len(counts) and silent >= LEFT_OUT * scenes:
        yield finding(
            "scenes_left_out",
            f"{silent} of {scenes} sequences have no gradient at the output: none of their labels counts, and those of"
            " the others' answers do.",
            losses[0].step + 1,
            "Sequences without an answer may be among the data on purpose.",
            "Truncate questions, not answers, and count the labels that are left of each sequence.",
        )


def class_left_out(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """One of the classes that the outputs have never has a gradient, and all others have: with one label a scene, so
    that it is no padding of sequences."""
    scenes = {each.shape[0] for each in loop.forward.passes if each.shape} if loop.forward else set()
    counts: dict[int, list[int]] = {}
    for each in losses:
        made, asked = each.outputs, each.targets
        if each.rows is None or made is None or asked is None or not asked.whole or asked.few is None:
            continue
        rows = len(each.rows)
        if len(made.shape) == 2 and asked.shape == (rows,) and rows in scenes and float(asked.most) < made.shape[1]:
            some = each.rows[:: math.ceil(rows / len(asked.few))] if rows > len(asked.few) else each.rows
            for label, reached in zip(asked.few[:, 0].int().tolist(), some.tolist()):
                counts.setdefault(label, [0, 0])[reached] += 1
    silent = [label for label, (without, reached) in counts.items() if label >= 0 and not reached and without >= SCENES]
    others = [reached > 9 * without for label, (without, reached) in counts.items() if label not in silent]
    if len(silent) == 1 and others and all(others):
        yield finding(
            "scenes_left_out",
            f"none of {counts[silent[0]][0]} scenes with label {silent[0]} has a gradient at the output, and scenes"
            f" with {len(others)} other labels have one: `ignore_index={silent[0]}` does that, or a weight of zero.",
            losses[0].step + 1,
            MAY_BE_MEANT,
        )


def constant_targets(losses: Sequence[LossRecord], alone: bool) -> Iterator[Finding]:
    """The same target for all scenes of all batches. Zeros and ones are labels of a critic, or a residual's, unless
    there is one optimizer and a binary cross-entropy."""
    few = [each.targets.few for each in losses if each.targets is not None and each.targets.few is not None]
    if len(few) < EARLY or len(few[0]) < 2 or any(each.shape[1] != few[0].shape[1] for each in few):
        return
    rows = torch.cat(few)
    labels = len(few) >= 2 * EARLY and alone and all("BinaryCrossEntropy" in " ".join(each.chain) for each in losses)
    if bool((rows == rows[0]).all()) and (labels or not set(rows[0].tolist()) <= {0.0, 1.0}):
        yield finding(
            "constant_targets",
            f"all scenes of {len(few)} batches have the same target.",
            losses[0].step + 1,
            "A loss against a constant looks like that.",
        )


def ignored_input(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Outputs that are the same for all scenes of each batch, while targets are not."""
    both = [(each.outputs.few, each.targets.few) for each in losses if each.outputs and each.targets]
    both = [(made, asked) for made, asked in both if made is not None and asked is not None and len(made) > 1]
    same = [bool((made == made[0]).all()) and bool((asked != asked[0]).any()) for made, asked in both]
    if len(same) >= EARLY and all(same):
        yield finding(
            "ignored_input",
            f"all scenes of a batch get the same output, bit for bit, in {len(same)} batches, and targets differ.",
            losses[0].step + 1,
            "Dead units before the last layer do that too: look whether the layers before it are zero.",
        )


def negated_loss(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A distance with its sign turned, which the step makes larger; unlearning and adversaries do so on purpose."""
    turned = [each for each in losses if _is_negated(each.chain)]
    if len(turned) == len(losses) >= LOOKS:
        yield finding(
            "loss_sign",
            f"all {len(turned)} losses are the negative of a {_spaced(turned[0].chain)}, which training makes larger.",
            turned[0].step + 1,
            MAY_BE_MEANT,
        )


def _is_negated(chain: Sequence[str]) -> bool:
    distance = next((name for name in chain if name.endswith(("Loss", "Nd")) or name.startswith(("Nll", "Binary"))), "")
    return bool(distance) and chain[: chain.index(distance)].count("Neg") % 2 == 1


def _spaced(chain: Sequence[str]) -> str:
    return next(name for name in chain if name.endswith(("Loss", "Nd")) or name.startswith(("Nll", "Binary")))
