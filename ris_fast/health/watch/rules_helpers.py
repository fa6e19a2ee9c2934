"""Rules of `watch` on modules beside the model: copies that never follow it, or always are the same; teachers that draw
random numbers.

None is certain: what a copy is for is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import median

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.records import EARLY, HelperRecord, LoopRecord

LONG = 96  # steps that a copy may wait for its first update
HELD, CAST = 0.5, 0.5  # shares of numbers: that change in a step, and that are a plain cast of the part's
COLD = 0.2  # of the way from the first weights, within which an average is cold
NEXT = 0.05  # steps that a copy lies behind, below which it keeps nothing
SNAPSHOT = re.compile(r"best|backup|snapshot|previous|shadow|ema|average", re.IGNORECASE)  # what is to stay
ALL = 0.9  # share of the steps
COPIED = 1e-3  # below which weights in a dict are those of a step, kept for a comparison
NAMED = re.compile(r"ema|average|avg|shadow|swa|polyak|slow|target", re.IGNORECASE)  # what is to follow the model


def helper_findings(loop: LoopRecord) -> Iterator[Finding]:
    """What the helpers show."""
    yield from copy_that_is_none(loop)
    for each in loop.helpers:
        if each.looks >= EARLY:
            yield from copy_that_stays(loop, each)
            yield from copy_without_delay(each)
            yield from copy_left_behind(each)
            yield from average_of_all(each)
            yield from copy_held_by_rounding(each)
            yield from statistics_left_behind(each)
            yield from teacher_draws(loop, each)


def copy_that_is_none(loop: LoopRecord) -> Iterator[Finding]:
    """Weights that are kept as the best, or as those of before, are the model's own."""
    kept = [name for name, searches in loop.aliases.items() if searches > 1 and SNAPSHOT.search(name)]
    if kept:
        yield finding(
            "ema_equals_raw",
            f"`{kept[0]}` has the model's own numbers, no copies of them, and follows every step: what it is to keep is"
            " gone.",
            loop.steps,
            "Where it is read before the next step, that is right.",
            "Keep a copy: `copy.deepcopy(model.state_dict())`.",
        )


def _whole(each: HelperRecord) -> str:
    return f"`{each.of}`" if each.of else "the model"


def copy_that_stays(loop: LoopRecord, each: HelperRecord) -> Iterator[Finding]:
    """A copy of what the model began with, which is the same after many steps."""
    declared = begins(each.name, loop.frozen)
    waits = each.moved and each.still == each.looks and each.steps >= LONG
    used = each.called or (each.kept and bool(NAMED.search(each.name)))
    if used and each.as_begun and waits and not declared:
        yield finding(
            "ema_frozen",
            f"`{each.name}` has, about, the weights that {_whole(each)} began with, and has not changed in {each.steps}"
            " steps: an average or a target network that nothing updates.",
            each.steps,
            "A reference that is meant to stay, as of a penalty on the distance from it, looks the same; so does a copy"
            " whose first update is still to come.",
            "Update it after each step, in place: `for a, b in zip(average.parameters(), model.parameters()):"
            " a.lerp_(b, 1 - decay)` under `torch.no_grad()`.",
        )


def copy_without_delay(each: HelperRecord) -> Iterator[Finding]:
    """A copy that is, after each step, what the model is."""
    copied = each.kept and bool(each.distances) and median(each.distances) < COPIED
    near = len(each.distances) >= EARLY and median(each.distances) < NEXT and not copied
    if near and each.moved and not each.trained:
        yield finding(
            "ema_equals_raw",
            f"`{each.name}` is what {_whole(each)} was one step before, at {len(each.distances)} looks over"
            f" {each.steps} steps: it follows without delay, as a decay near zero makes it, or a copy in every step.",
            each.steps,
            "A copy for another device or for reading looks the same.",
            "Keep most of it: a decay of 0.99 or more of the old average, or a copy every few hundred steps.",
        )


def copy_left_behind(each: HelperRecord) -> Iterator[Finding]:
    """A copy that is written to in every step, and still is, for the most part, what the model began with."""
    follows = each.as_begun and each.moved and 2 * each.still < each.looks and not each.trained
    if (each.called or each.kept) and follows and each.steps >= LONG and each.way is not None and each.way < COLD:
        yield finding(
            "ema_cold",
            f"`{each.name}` has come {each.way:.0%} of the way that {_whole(each)} has gone since the beginning, in"
            f" {each.steps} steps: an average that is this slow is, for the most part, the first weights.",
            each.steps,
            "In a run that goes on for long it gets there.",
            "Take a decay that forgets within a tenth of the run, or let it rise: `min(decay, (1 + n) / (10 + n))`.",
        )


def average_of_all(each: HelperRecord) -> Iterator[Finding]:
    """An average that gives the first steps the share of the last, and begins with them."""
    if each.equal_shares and each.as_begun and each.moved and each.equal_shares >= ALL * each.steps >= ALL * LONG:
        yield finding(
            "ema_cold",
            f"`{each.name}` is the mean of the weights after all {each.equal_shares} steps, those of the very first"
            " with the same share as the last.",
            each.steps,
            "A convex problem may be averaged so.",
            "Begin to average in the last quarter of the run, or give `AveragedModel` a `multi_avg_fn` that forgets:"
            " `get_ema_multi_avg_fn(0.99)`.",
        )


def copy_held_by_rounding(each: HelperRecord) -> Iterator[Finding]:
    """A copy in 16 bits that is written to step after step, of which few numbers change, and which is no cast."""
    follows = [changed for changed, cast in each.rounded if cast < CAST]
    if each.moved and len(follows) == len(each.rounded) >= EARLY and median(follows) < HELD:
        yield finding(
            "low_precision_weights",
            f"`{each.name}` has 16-bit numbers and {_whole(each)} has not; at {len(follows)} looks a step wrote to it,"
            f" and {median(follows):.0%} of its numbers changed: rounding takes away what a step adds.",
            each.steps,
            f"Where {_whole(each)} hardly moves, its average need not either.",
            "Keep the average in float32, and cast it where it is used.",
        )


def statistics_left_behind(each: HelperRecord) -> Iterator[Finding]:
    """Weights follow and running statistics stay."""
    if each.buffers_still and each.still < each.looks // 2:
        yield finding(
            "batchnorm_statistics",
            f"the weights of `{each.name}` follow {_whole(each)}, and its running statistics are what they were at"
            f" first, after {each.steps} steps.",
            each.steps,
            "Statistics that are gathered anew before it is evaluated make up for that.",
            "Copy the buffers too, or use `torch.optim.swa_utils.update_bn`, before it is evaluated.",
        )


def teacher_draws(loop: LoopRecord, each: HelperRecord) -> Iterator[Finding]:
    """A network of another kind that nothing trains, in training mode, with dropouts."""
    alone = each.of is None and each.called and not each.trained and each.still == each.looks and each.steps >= 32
    if alone and each.training and each.dropouts:
        yield finding(
            "train_mode_in_validation",
            f"nothing trains `{each.name}`, and it is in training mode: {each.dropouts} dropouts are on in what it"
            " answers.",
            each.steps,
            "A teacher that is noisy on purpose looks the same.",
            "Call `eval()` on a teacher or a feature extractor.",
        )
