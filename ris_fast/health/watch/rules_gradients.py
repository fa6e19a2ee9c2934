"""Rules of `watch` on gradients over many steps: those that never come, are changed on their way, or stay."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.describe import describe_tensors, share_of
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import EARLY, LoopRecord, OptimizerRecord, StepRecord, is_finite
from ris_fast.health.watch.rules_scale import is_square_of_scale

MANY, STILL = 100, 0.1  # steps, and the share of the weights that all of them move
FALL = 2e-3  # of a gradient, from one layer to the one before
LONG = 1000  # steps without a gradient after which a tensor is no longer waited for


def unused_head(optimizer: OptimizerRecord, frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Tensors that have had no gradient in any step, neither from backward nor put there by hand, and that no step has
    changed.

    Where some came after others, or by turns, more may come; and a later phase may be the first to use them.
    """
    histories = {tensor: each for tensor, each in optimizer.histories.items() if tensor.name in optimizer.weight_norms}
    free = {tensor: each for tensor, each in histories.items() if each.free and tensor.trainable}
    came = {name for record in optimizer.records for name in record.hooked if name not in record.none_grads}
    filled = _filled_with_zeros(optimizer)
    silent = [
        tensor
        for tensor, each in free.items()
        if (not each.with_grad or tensor.name in filled) and tensor not in optimizer.trained and tensor.name not in came
    ]
    unused = sorted((each for each in silent if not begins(each.name, frozen)), key=lambda each: -each.size)
    turns = any(0 < each.with_grad < each.steps for each in histories.values())
    peers = {_peer(tensor.name) for tensor, each in histories.items() if 0 < each.with_grad < each.steps}
    unused = [tensor for tensor in unused if _peer(tensor.name) not in peers and tensor.size]
    if not unused or optimizer.steps < EARLY:
        return
    sizes, whole = {each.name: each.size for each in unused}, sum(each.size for each in histories)
    all_of_it = " That is all that this optimizer trains." if sum(sizes.values()) == whole else ""
    yield finding(
        "unused_head",
        f"{describe_tensors(sizes, whole)}. No gradient came to them in any of {optimizer.steps} steps.{all_of_it}",
        optimizer.steps,
        "Others are trained in turn or came later: these may be to come."
        if turns
        else ""
        if optimizer.steps >= LONG
        else "A later phase may be the first to use them.",
        harm=share_of(sizes, whole),
    )


def _filled_with_zeros(optimizer: OptimizerRecord) -> set[str]:
    """Tensors to which no backward brings a gradient, and that have zeros at every look, as sums over ranks need."""
    looks = [each for each in optimizer.records if not each.closure]
    names = {name for each in looks for name in each.none_grads}
    for each in looks:
        names -= {name for name, norm in zip(each.names, each.grad_at_step.tolist()) if norm != 0}
    return names if len(looks) >= EARLY else set()


def _peer(name: str) -> str:
    """The same name for all experts of a list: those of them that a batch does not choose have no gradient."""
    return re.sub(r"\d+", "#", name)


def last_micro_batch_only(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Most backward passes of every step find the gradient of the pass before gone. Attacks on the inputs and ascents
    of the weights come from other lines, or move them."""
    between = optimizer.between
    steps = sum(between.intervals.values())
    thrown = {
        (passes, cleared): count
        for (passes, cleared, alike), count in between.intervals.items()
        if alike and cleared == passes - 1 and passes >= 3
    }
    if steps >= 4 and sum(thrown.values()) >= steps - 1 and not between.replaced:
        passes, cleared = max(thrown)
        yield finding(
            "last_micro_batch_only",
            f"each of {sum(thrown.values())} steps came after {passes} backward passes, {cleared} of which were thrown"
            " away: each found the gradient of the one before gone.",
            optimizer.steps,
            "A search that repeats a pass until it is good enough looks the same.",
            "Clear gradients after the step only, so that micro-batches add up.",
        )


def steps_stopped(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Backward passes go on, and no step has come for far longer than ever before."""
    usual = max((passes for passes, *_ in optimizer.between.intervals), default=0)
    alone = len(loop.optimizers) == 1 and not optimizer.rivals
    if alone and usual and optimizer.between.since > max(64, 16 * usual):
        yield finding(
            "step_never_called",
            f"{optimizer.between.since} backward passes since step {optimizer.steps} and no step; before, there were "
            "at most"
            f" {usual} for each.",
            optimizer.steps,
            "The loop may have come to a phase that only reads gradients.",
        )


def clip_too_small(records: list[StepRecord]) -> Iterator[Finding]:
    """A factor on all gradients may be a loss scale taken out again, and means nothing to Adam: it must be seen in the
    updates.

    Where updates do not show it, norms that are the same in every step betray a threshold.
    """
    steps = [
        (record, *record.gradient_norms())
        for record in records
        if is_finite(record.grad_after_backward) and not record.closure and max(record.rates) > 0
    ]
    small = [(record, at_step) for record, arrived, at_step in steps if 0 < at_step < 1e-4 * arrived]
    if not small or len(small) < len(steps):
        yield from _held_at_threshold(steps)
        return
    record, arrived, at_step = steps[0]
    norms = [norm for _, norm in small]
    fixed = len(small) > 1 and max(norms) < (1 + 1e-4) * min(norms)  # as a threshold makes it
    evidence = f"norm {arrived:.3g} arrives and {at_step:.3g} reaches the optimizer."
    if not fixed and all(is_square_of_scale(each) for each, _ in small):
        doubt = f"A scale of {(arrived / at_step):.3g} that is taken out once looks the same."
        evidence = f"{evidence} Its square root is a power of two, {(arrived / at_step) ** 0.5:g}, as loss scales are."
        yield finding("unscaled_twice", evidence, record.step + 1, doubt)
    elif all(_hardly_moves(each, norm) for each, norm in small):
        doubt = "" if fixed else "It may be a loss scale taken out, late in a run."
        yield finding("clip_too_small", evidence, record.step + 1, doubt)
    elif fixed and len(small) > 3 and max(norms) < 1e-3:
        evidence = f"{evidence} It is the same norm in {len(small)} steps."
        yield finding("clip_too_small", evidence, record.step + 1, "Adam hardly minds.")


def _held_at_threshold(steps: list[tuple[StepRecord, float, float]]) -> Iterator[Finding]:
    """The same norm reaches the optimizer at each look, and so small a one that all steps together hardly move the
    weights: none but plain descent steps in proportion to it."""
    if len(steps) < EARLY or any(at_step <= 0 or at_step > 0.1 * arrived for _, arrived, at_step in steps):
        return
    norms, last = [at_step for *_, at_step in steps], steps[-1][0]
    ratios = [float(each.update_ratio) for each, *_ in steps if each.update_ratio is not None]
    moved = max(ratios, default=1.0) * (last.step + 1)
    if max(norms) < (1 + 1e-4) * min(norms) and last.step >= MANY and moved < STILL:
        arrived = sorted(arrived for _, arrived, _ in steps)[len(steps) // 2]
        yield finding(
            "clip_too_small",
            f"norms of about {arrived:.3g} arrive, and {norms[0]:.3g} reaches the optimizer at each of {len(steps)}"
            f" looks: in {last.step + 1} steps the weights have moved by no more than {moved:.2g} of their size.",
            steps[0][0].step + 1,
            MAY_BE_MEANT,
        )


def _hardly_moves(record: StepRecord, at_step: float) -> bool:
    """Whether gradients and updates are next to nothing beside the weights."""
    return (
        at_step < 1e-5 * float(record.weights_before.norm())
        and record.update_ratio is not None
        and float(record.update_ratio) < 1e-5 * max(record.rates)
    )


def scaled_on_the_way(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """From one layer to the one before, gradients fall by orders of magnitude, at every look by about the same."""
    looks = [each for each in optimizer.records if not each.closure and len(each.none_grads) == 0 and each.hooked]
    looks = [each for each in looks if each.names == looks[-1].names and is_finite(each.grad_after_backward)]
    if len(looks) < 2 * EARLY or set(looks[-1].names) != set(looks[-1].hooked):
        return
    wide = [n for n, usual in enumerate(looks[-1].usual_norms) if usual > 1]
    rows = [[float(each.grad_after_backward[n]) for n in wide] for each in looks]  # type: ignore[index]
    for at in range(1, len(wide)):
        falls = [max(row[:at]) / min(row[at:]) if min(row[at:]) > 0 else 1.0 for row in rows]
        if 0 < max(falls) < FALL and max(falls) < 30 * min(falls):
            before, after = (looks[-1].names[wide[n]] for n in (at - 1, at))
            yield finding(
                "gradient_scale_differs",
                f"between {after} and {before} gradients fall to {sorted(falls)[len(falls) // 2]:.2g} of what they are,"
                f" at each of {len(looks)} looks.",
                looks[-1].step + 1,
                "A factor that is learned, and begins next to zero, does that at first; so do activations that"
                " saturate.",
                "Look between the two for a hook, a factor, a division or an own function that scales the gradient.",
            )
            return


def reversed_gradients(records: list[StepRecord], negated: bool) -> Iterator[Finding]:
    """Gradients that are turned round, or made one number, in all steps: what a threshold below zero does. Turned round
    by hand where the norm stays the same, which makes up for a distance that is `negated` in the loss."""
    finite = [each for each in records if is_finite(each.grad_after_backward) and is_finite(each.grad_at_step)]
    steps = [each for each in finite if each.grad_change is not None and float(each.grad_at_step.norm()) > 0]
    if len(steps) < 2:
        return
    changes, norms = [each.grad_change.tolist() for each in steps], [each.gradient_norms() for each in steps]
    (arrived, at_step), step = norms[0], steps[0].step + 1
    if all(each[2] > 1e-3 and each[3] < 1e-6 for each in changes):
        yield finding(
            "clip_too_small",
            "all entries of the gradient are the same number when they reach the optimizer: a threshold "
            "below zero in `clip_grad_value_` does that.",
            step,
        )
    elif len(changes) >= 4 and all(each[4] > 0.3 and each[5] < 0.1 and each[0] > 0 for each in changes):
        yield finding(
            "clip_too_small",
            f"nearly all entries of the gradient have one magnitude when they reach the optimizer, at norm"
            f" {at_step:.3g} where {arrived:.3g} arrives: a threshold of `clip_grad_value_` below them does that.",
            step,
            "Signs of gradients may be meant.",
        )
    elif any(cosine >= -0.999 for cosine, *_ in changes):
        yield from _reversed_at_times(steps)
    elif negated:
        return
    elif all(abs(after - before) <= 1e-3 * before for before, after in norms):
        yield finding(
            "loss_sign",
            f"gradients are turned round between backward and the step, at the same norm ({at_step:.3g}).",
            step,
            MAY_BE_MEANT,
        )
    elif any(abs(after - at_step) > 1e-3 * at_step for _, after in norms):  # a threshold makes them all the same
        yield finding(
            "loss_sign",
            f"gradients are turned round between backward and the step, and scaled (from norm {arrived:.3g} to"
            f" {at_step:.3g}).",
            step,
            MAY_BE_MEANT,
        )
    else:
        yield finding(
            "clip_too_small",
            f"gradients of norm {arrived:.3g} arrive and reach the optimizer turned round, at norm {at_step:.3g}: a "
            "threshold below zero in `clip_grad_norm_` does that.",
            step,
        )


def _reversed_at_times(steps: list[StepRecord]) -> Iterator[Finding]:
    """Some steps only, at the same norm."""
    turned = [each for each in steps if float(each.grad_change[0]) < -0.999]
    if len(turned) > 1:
        yield finding(
            "loss_sign",
            f"gradients are turned round between backward and the step in {len(turned)} of {len(steps)} steps that "
            "were "
            "looked at.",
            turned[0].step + 1,
            MAY_BE_MEANT,
        )


def gradients_never_cleared(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """A gradient is still there at the backward after a step, and added to, in all of the first steps."""
    records, doubt = optimizer.records, ""
    finite = [record for record in records if is_finite(record.grad_at_step)]  # a sum that grows may end in NaN
    uncleared = [bool(record.uncleared) for record in finite if record.uncleared is not None]
    if len(uncleared) > 1 and (all(uncleared) or sum(uncleared) >= max(3, len(uncleared) / 2)):
        if not all(uncleared):
            doubt = "They are cleared now and then, as once an epoch. " + MAY_BE_MEANT
        elif not optimizer.of_torch:
            doubt = "An optimizer of one's own may ask for the sum of all gradients, as dual averaging does."
        yield finding(
            "gradients_never_cleared",
            f"in {'all' if all(uncleared) else f'{sum(uncleared)} of'} {len(uncleared)} steps that were looked at, what"
            " came was added to the gradients of the step before.",
            records[-1].step + 1,
            doubt,
        )


def zeroed_gradients(records: list[StepRecord], frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Some tensors' gradients arrive and are zero at every step; those that are None there may be meant to stand
    still, unless they are those of a backward pass before the last."""
    seen = [
        (name, bool(at_step == 0), name in record.no_grad)
        for record in records
        if not record.closure and float(record.grad_at_step.norm()) > 0
        for name, before, at_step in zip(record.names, record.grad_after_backward, record.grad_at_step)
        if 0 < before < math.inf
    ]
    arrived, zero = Counter(name for name, *_ in seen), Counter(name for name, zero, _ in seen if zero)
    zeroed = [name for name, count in arrived.items() if count > 1 and zero[name] == count]
    names = [name for name in zeroed if not begins(name, frozen)]
    before = all(name in each.earlier for each in records for name in names if name in each.hooked)
    if names and before and len(records) >= 4:
        yield finding(
            "gradients_cleared_before_step",
            f"the gradients of {len(names)} of {len(arrived)} tensors arrive and reach no step: {', '.join(names[:3])}."
            " They come in a backward pass before the last one of each step, and are gone after that.",
            records[-1].step + 1,
            MAY_BE_MEANT,
            "Clear gradients once for each step, before the first of its backward passes.",
        )
    elif names:
        yield finding(
            "zeroed_gradients",
            f"{len(names)} of {len(arrived)} tensors' gradients arrive and are zero at every step: "
            f"{', '.join(names[:3])}.",
            records[-1].step + 1,
            MAY_BE_MEANT if {name for name, _, none in seen if none}.issuperset(names) else "",
        )
