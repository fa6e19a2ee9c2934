"""Rules of `watch` on schedulers of torch beside the steps that were made, and on how far weights have come."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, is_finite

STEPS = 100
SHORT = 1.5  # times its length, that a schedule has been advanced
LOW = 3  # a third of the steps
FAR = 1e-4  # of the weights' size, that they have moved in all
SHRUNK = 0.3
JUMPS, SHORT_CYCLE = 12, 64  # restarts, and steps between two
SOON, CUT = 0.15, 0.02  # share of the run, and of a rate
DECOUPLED = {"AdamW", "FusedAdamW"}
LARGE = 0.05
COUPLED, PULLS = 0.02, 0.4  # a decay that is added to the gradient, and how hard it pulls beside that
BESIDE = 1e-3  # of the largest rate of a group, below which another stands still
LONG_MEMORY = 0.995  # a momentum
CUTS = 3  # of a rate that follow one another as fast as a scheduler may


def schedule_findings(loop: LoopRecord) -> list[Finding]:
    found = [*stale_scheduler(loop)]
    for number, by in enumerate(loop.optimizers):
        if by.steps:
            found += [
                *off_plan(loop, by, number),
                *rate_cut_in_a_row(loop, by, number),
                *warmup_too_long(by),
                *rate_has_fallen(by),
                *rate_cut_early(by),
                *hardly_moved(by),
                *weight_decay_too_large(by),
                *decay_in_the_gradient(by),
                *momentum_too_large(by),
                *rates_far_apart(by),
            ]
    return found


def stale_scheduler(loop: LoopRecord) -> Iterator[Finding]:
    """A scheduler is advanced, and its optimizer is another than the one that steps on the same tensors."""
    stale = [each for each in loop.schedulers if each.optimizer is None and each.advanced >= 2]
    if stale and not any(by.rivals for by in loop.optimizers):
        yield finding(
            "learning_rate_off_plan",
            f"a {stale[0].kind} has been advanced {stale[0].advanced} times, and it sets the rates of another optimizer"
            " than the one that steps: the optimizer was built again after the scheduler.",
            loop.steps,
            "A watch that was given a wrapper of the scheduler's optimizer sees the same.",
            "Build the scheduler after the optimizer, of the optimizer that steps.",
        )


def off_plan(loop: LoopRecord, by: OptimizerRecord, number: int) -> Iterator[Finding]:
    """How often a scheduler was advanced, beside the steps and the length that it is planned for."""
    for each in loop.schedulers:
        if each.optimizer != number or by.steps < STEPS:
            continue
        runs_on = each.length and each.advanced > SHORT * each.length and each.kind == "CosineAnnealingLR"
        restarts = each.kind == "CosineAnnealingWarmRestarts" and by.plain.rates.get(0)
        jumps = by.steps / each.length if restarts and each.length and restarts.changes > 0.9 * by.steps else 0.0
        if each.advanced >= 2 * by.steps and each.advanced % by.steps <= 0.1 * by.steps:
            yield finding(
                "schedule_per_batch",
                f"a {each.kind} has been advanced {each.advanced} times in {by.steps} steps: once for each"
                " micro-batch, or twice for each step.",
                by.steps,
                MAY_BE_MEANT,
            )
        elif jumps > JUMPS and each.length < SHORT_CYCLE:
            yield finding(
                "schedule_per_batch",
                f"a {each.kind} that begins again every {each.length} advances is advanced at each of {by.steps} steps:"
                f" the rate has jumped up {jumps:.0f} times, as if its length were one in epochs.",
                by.steps,
                "Short cycles may be meant.",
                "Give `T_0` in steps where it is advanced in steps.",
            )
        elif runs_on and 2 * each.advanced >= by.steps:
            yield finding(
                "schedule_per_batch",
                f"a {each.kind} that is planned for {each.length} advances has been advanced {each.advanced} times in"
                f" {by.steps} steps, so that the rate goes up and down again: it is planned in epochs and advanced in"
                " steps.",
                by.steps,
                "A rate that swings on purpose looks so.",
                "Advance it once an epoch, or plan it in steps.",
            )
        elif each.length and 8 * each.advanced < by.steps and by.steps >= each.length / 2 and each.kind == "OneCycleLR":
            yield finding(
                "schedule_per_epoch",
                f"a {each.kind} that is planned for {each.length} steps has been advanced {each.advanced} times in"
                f" {by.steps} steps.",
                by.steps,
                MAY_BE_MEANT,
            )
        elif each.advanced == 0 and _read_again(loop):
            yield finding(
                "schedule_per_epoch",
                f"a {each.kind} has not been advanced in any of {by.steps} steps, although scenes have been read again:"
                " the rate stays what it was.",
                by.steps,
                MAY_BE_MEANT,
                "Call `scheduler.step()` after each epoch or step, as it is planned.",
            )
        else:
            continue
        return


def rate_cut_in_a_row(loop: LoopRecord, by: OptimizerRecord, number: int) -> Iterator[Finding]:
    """A scheduler that waits for a score has cut the rate as often as it can: no score since the first counts as
    better, although the loss falls. Another scheduler of the same rate leaves it elsewhere than these cuts would."""
    for each in loop.schedulers:
        history = next(iter(by.plain.rates.values()), None)
        if each.optimizer != number or each.patience is None or history is None or not history.largest > 0:
            continue
        cuts = history.falls
        left = max(history.largest * each.factor**cuts, each.least)
        if cuts * each.patience > each.advanced or abs(history.last - left) > 0.01 * left:
            continue
        losses = [float(one.value) for one in loop.met if one.value is not None]
        falls = len(losses) >= 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
        if cuts >= CUTS and cuts * each.patience >= each.advanced - each.patience - 1 and (falls or each.mode == "max"):
            yield finding(
                "learning_rate_off_plan",
                f"a {each.kind} with mode={each.mode!r} has cut the rate {cuts} times in {each.advanced} advances, as"
                f" often as it can: no score since the first counted as better. The rate is {history.last:.3g}, and was"
                f" {history.largest:.3g}.",
                by.steps,
                "A score that has been at its best since the beginning does that.",
                "Give a loss with mode='min' and an accuracy with mode='max'.",
            )
            return


def _read_again(loop: LoopRecord) -> bool:
    """Whether scenes were met in two epochs."""
    passes = loop.forward.passes if loop.forward is not None else []
    trained = [each for each in passes if each.training and each.reached and each.keys is not None]
    rows = [row.numpy().tobytes() for each in trained for row in each.keys]
    return len(rows) - len(set(rows)) > len(rows) / 4


def warmup_too_long(by: OptimizerRecord) -> Iterator[Finding]:
    """The rate has risen in every step so far, and is far from its base."""
    for number, history in by.plain.rates.items():
        base = by.groups[number].get("max_lr", by.groups[number].get("initial_lr"))
        rising = history.first < history.last == history.largest and history.changes >= 0.9 * (by.steps - 2)
        if isinstance(base, float) and by.steps >= STEPS and rising and 0 < history.last <= 0.25 * base:
            yield finding(
                "warmup_too_long",
                f"the rate of group {number} has risen in all {by.steps} steps and is {history.last:.3g},"
                f" {history.last / base:.2g} of its base.",
                by.steps,
                "A long run may be at its beginning.",
            )
            return


def rate_has_fallen(by: OptimizerRecord) -> Iterator[Finding]:
    """A rate at less than a thousandth of what it was, for a good part of the run. A state that is loaded puts back
    the rate that was there before a search for the largest."""
    if by.loads:
        return
    for number, history in by.plain.rates.items():
        since = history.low_since
        if since is None or history.still_since is not None or LOW * (by.steps - since) < by.steps or by.steps < STEPS:
            continue
        yield finding(
            "learning_rate_too_small",
            f"the rate of group {number} is {history.last:.3g}; it was {history.largest:.3g}, and has been below a"
            f" thousandth of that since step {since + 1}, for {by.steps - since} of {by.steps} steps.",
            since + 1,
            "A schedule that cuts the rate when a score stops rising does that where the score is a loss (mode='max');"
            " so does one that is advanced too often.",
        )
        return


def rate_cut_early(by: OptimizerRecord) -> Iterator[Finding]:
    """The last change of a rate came early in the run, and left a small part of it."""
    for number, history in by.plain.rates.items():
        early = history.changes > 0 and history.changed_at <= SOON * by.steps and by.steps >= STEPS
        if early and 0 < history.last < CUT * history.largest and history.still_since is None and not by.loads:
            yield finding(
                "learning_rate_too_small",
                f"the rate of group {number} was {history.largest:.3g} and is {history.last:.3g} since step"
                f" {history.changed_at + 1}, for {by.steps - history.changed_at} of {by.steps} steps: its schedule was"
                " over soon.",
                history.changed_at + 1,
                MAY_BE_MEANT,
                "Give milestones in the unit in which the scheduler is advanced: in epochs, or in steps.",
            )
            return


def hardly_moved(by: OptimizerRecord) -> Iterator[Finding]:
    """All steps together have moved the weights by next to nothing of their size."""
    steps = [
        (max(each.rates), float(each.update_ratio))
        for each in by.records
        if each.update_ratio is not None and each.rates and not bool(each.update_ratio.isnan())
    ]
    if len(steps) < 16 or by.steps < STEPS or by.steps > 100 * STEPS or min(rate for rate, _ in steps) <= 0:
        return
    largest, rates = max(ratio for _, ratio in steps), [rate for rate, _ in steps]
    if max(rates) <= 1.01 * min(rates) and largest * by.steps < 10 * FAR and max(rates) < 1e-5:
        yield finding(
            "learning_rate_too_small",
            f"a step at a rate of {rates[-1]:.3g} moves the weights by no more than {largest:.2g} of their size: in"
            f" {by.steps} steps by no more than {largest * by.steps:.2g}.",
            by.steps,
            "Weights that are to be tuned a little move little.",
        )


def weight_decay_too_large(by: OptimizerRecord) -> Iterator[Finding]:
    """Matrices shrink to a part of what they were, under a decay that is large beside the gradient."""
    decay = max((float(each.get("weight_decay") or 0.0) for each in by.groups), default=0.0)
    looks = [each for each in by.records if each.weights_after is not None and is_finite(each.weights_after)]
    if decay < 0.05 or len(looks) < 16 or looks[0].names != looks[-1].names:
        return
    first, last = looks[0], looks[-1]
    wide = torch.tensor([size > 1.0 for size in first.usual_norms]) & (first.weights_before > 0)
    if not wide.any():
        return
    kept = float(last.weights_after[wide].norm()) / float(first.weights_before[wide].norm())
    early = looks[:16]
    pulls = [float((decay * each.weights_before[wide]).norm()) for each in early]
    pushes = [float(each.grad_at_step[wide].norm()) for each in early]
    decoupled = by.kinds & {"AdamW", "FusedAdamW"} or all(each.get("decoupled_weight_decay") for each in by.groups)
    dominated = all(pull > 2 * push for pull, push in zip(pulls[:4], pushes[:4])) or bool(decoupled)
    if kept < SHRUNK and dominated:
        yield finding(
            "weight_decay_too_large",
            f"a decay of {decay:.3g} has taken the matrices to {kept:.2g} of their first norm in {by.steps} steps"
            + (
                "." if decoupled else f"; at first it pulls with {pulls[0]:.3g}, and the gradient with {pushes[0]:.3g}."
            ),
            by.steps,
            MAY_BE_MEANT,
        )


def decay_in_the_gradient(by: OptimizerRecord) -> Iterator[Finding]:
    """A decay that is added to the gradient, as large as one that is taken off the weights: in the end it pulls as
    hard as the loss does."""
    coupled = [each for each in by.groups if not by.kinds & DECOUPLED and not each.get("decoupled_weight_decay")]
    decay = min((float(each.get("weight_decay") or 0.0) for each in coupled), default=0.0)
    looks = [each for each in by.records if not each.closure and is_finite(each.grad_at_step)]
    late = [each for each in looks[len(looks) // 2 :] if len(each.usual_norms) == len(each.weights_before)]
    if decay < COUPLED or len(looks) < 16 or by.steps < STEPS:
        return
    wide = [torch.tensor([size > 1.0 for size in each.usual_norms]) for each in late]
    shares = [
        decay * float(each.weights_before[some].norm()) / max(float(each.grad_at_step[some].norm()), 1e-30)
        for each, some in zip(late, wide)
        if some.any()
    ]
    if shares and median(shares) > (PULLS if decay < LARGE else PULLS / 2):
        yield finding(
            "weight_decay_too_large",
            f"a decay of {decay:.3g} is added to the gradient, and pulls {median(shares):.2g} times as hard as the loss"
            f" does at {len(shares)} looks.",
            by.steps,
            MAY_BE_MEANT,
            "A decay for AdamW, which takes it off the weights, is far too large for Adam, which divides it by the"
            " gradient's size as well: use AdamW, or 1e-4 and less.",
        )


def momentum_too_large(by: OptimizerRecord) -> Iterator[Finding]:
    """A momentum that forgets nothing, or that remembers hundreds of steps; betas that have changed places."""
    momentum = max((float(each.get("momentum") or 0.0) for each in by.groups if not each.get("dampening")), default=0.0)
    pairs = [each["betas"] for each in by.groups if isinstance(each.get("betas"), tuple) and len(each["betas"]) == 2]
    pairs = [each for each in pairs if all(isinstance(beta, float) for beta in each)]
    first = max([momentum, *(beta for beta, _ in pairs)])
    swapped = [each for each in pairs if each[0] >= LONG_MEMORY > each[1]]
    if first >= LONG_MEMORY:
        yield finding(
            "learning_rate_too_large",
            f"the momentum is {first:g}: "
            + (
                f"betas are {swapped[0]}, which are usual in the other order, so that a step is the mean of"
                f" {1 / (1 - first):.0f} gradients over the size of the last ones."
                if swapped
                else "past gradients are never forgotten, and steps grow."
                if first >= 1.0
                else f"a step adds up the gradients of {1 / (1 - first):.0f} steps, and is that many times larger than"
                " its rate says."
            ),
            by.steps,
            MAY_BE_MEANT,
            "Use a momentum below one, such as 0.9.",
        )


def rates_far_apart(by: OptimizerRecord) -> Iterator[Finding]:
    """Groups with a good part of the weights have a rate of next to nothing beside that of others."""
    largest = {n: each.largest for n, each in by.plain.rates.items() if each.largest > 0 and n < len(by.groups)}
    if len(largest) < 3 or by.steps < STEPS:
        return
    sizes = {n: sum(tensor.size for tensor in by.groups[n]["params"] if tensor.trainable) for n in largest}
    low = [n for n, rate in largest.items() if rate < BESIDE * max(largest.values())]
    share = sum(sizes[n] for n in low) / max(1, sum(sizes.values()))
    if low and share > 0.25:
        yield finding(
            "learning_rate_too_small",
            f"{len(low)} of {len(largest)} groups, with {share:.0%} of the weights, have a rate of at most"
            f" {max(largest[n] for n in low):.3g}, where others have {max(largest.values()):.3g}.",
            by.steps,
            "A rate that falls from layer to layer may be meant to fall so far.",
            "Let it fall once for each layer, not for each tensor or group.",
        )
