"""Rules of `watch` on the layers of a model: what they are given and give at first, and what recomputation and own
functions make of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from ris_fast.health.finding import Finding
from ris_fast.health.functions import FunctionCheck
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.pass_records import ForwardRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

CALLS = 4  # of a layer that show it
CUT_OFF = 1e-6  # of the spread, from one layer to the next
GROWTH, DECAY = 1e4, 1e-6  # of the spread between scenes from the first layer to the last
EPSILON = 30.0  # times the mean square beside it
WEIGHTED = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def layer_findings(loop: LoopRecord) -> list[Finding]:
    """What the layers show."""
    if (forward := loop.forward) is None:
        return []
    return [
        *constant_input(loop, forward),
        *saturated_layers(forward),
        *lost_on_the_way(forward),
        *epsilon_of_norms(forward),
        *detached_between(loop, forward),
        *sampled_between(forward),
        *recomputed_differently(forward),
        *wrong_backward(forward),
        *float16_overflow(forward),
    ]


def constant_input(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """One number is all that a layer with weights, or one of several inputs, ever gets. A learned constant requires a
    gradient; masks of ones and states of zeros are wide."""
    for name, calls in forward.layers.calls.items():
        module = forward.layers.kinds[name]
        if not isinstance(module, WEIGHTED) or len(calls) < CALLS or any(each.with_grad for each in calls):
            continue
        ends = [(float(each.given[0]), float(each.given[1])) for each in calls if each.given is not None]
        narrow = isinstance(module, nn.Linear) or all(each.one_axis for each in calls)
        if (
            narrow
            and len(ends) == len(calls)
            and len({end for both in ends for end in both}) == 1
            and calls[0].rows > 1
        ):
            yield finding(
                "constant_input",
                f"{name or type(module).__name__} is given the number {ends[0][0]:g} alone, in all {len(calls)} calls"
                " that were looked at, so that it can tell no scene from another.",
                1,
                "A part that is switched off on purpose, or a state that begins at zero, looks so.",
                "Look at how its input is made: an integer division, a cast or a mask can make it one number.",
            )
            return
    trained = [each for each in forward.passes if each.training and each.reached and len(each.others) > 1]
    for number in range(min((len(each.others) for each in trained), default=0)):
        given = [each.others[number] for each in trained]
        plain = [each for each in given if each is not None and each.shape[1] == 1 and len(each) > 1]
        if len(plain) >= EARLY and len(plain) == len(given) and len(torch.cat(plain).unique()) == 1:
            yield finding(
                "constant_input",
                f"input {number + 1} of the model is the number {float(plain[0][0, 0]):g} for all scenes, in all"
                f" {len(plain)} passes that were looked at.",
                trained[0].step + 1,
                MAY_BE_MEANT,
                "Look at how this input is made: an integer division, a cast or a mask can make it one number.",
            )
            return


def saturated_layers(forward: ForwardRecord) -> Iterator[Finding]:
    """Bounded activations that begin at their ends."""
    for name, calls in forward.layers.calls.items():
        module, first = forward.layers.kinds[name], calls[0]
        if not isinstance(module, (nn.Tanh, nn.Sigmoid)) or first.given is None or first.gives is None:
            continue
        size = math.sqrt(float(first.given[4]))
        low = -1.0 if isinstance(module, nn.Tanh) else 0.0
        # Mean square of an output whose numbers are all at an end of its range; for a sigmoid half of them at one.
        at_ends = float(first.gives[4]) > (0.95 if low else 0.475) and size > 15
        if at_ends:
            yield finding(
                "saturated_output",
                f"{name or type(module).__name__} is given numbers of size {size:.3g} in the first pass and gives"
                f" {float(first.gives[0]):.3g} to {float(first.gives[1]):.3g}, the ends of its range, where its"
                " derivative is next to zero: weights before it, or inputs, are too large.",
                1,
                f"Gates may be closed at first on purpose. {MAY_BE_MEANT}",
            )
            return


def lost_on_the_way(forward: ForwardRecord) -> Iterator[Finding]:
    """What tells scenes apart grows or shrinks by orders of magnitude from the first layer to the last."""
    spreads = [
        (name, float(calls[0].gives[3]))
        for name, calls in forward.layers.calls.items()
        if isinstance(forward.layers.kinds[name], WEIGHTED) and calls[0].gives is not None and calls[0].rows > 1
    ]
    spreads = [(name, spread) for name, spread in spreads if spread > 0 and math.isfinite(spread)]
    if len(spreads) < 3:
        return
    (_, first), (name, last) = spreads[0], spreads[-1]
    if any(after < CUT_OFF * before for (_, before), (_, after) in pairwise(spreads)):
        return  # at one place: what comes through is rounding, and nothing of the input
    if last > GROWTH * max(first, 1.0) or last < DECAY * first:
        yield finding(
            "bad_initialisation",
            f"scenes differ by {first:.3g} after the first layer and by {last:.3g} after {name} in the first pass:"
            f" activations {'explode' if last > first else 'vanish'}.",
            1,
            MAY_BE_MEANT,
        )


def epsilon_of_norms(forward: ForwardRecord) -> Iterator[Finding]:
    """A normalisation whose epsilon is larger than the square of what it is given."""
    for name, calls in forward.layers.calls.items():
        module = forward.layers.kinds[name]
        eps = getattr(module, "eps", None)
        if not isinstance(module, NORMS) or not isinstance(eps, float) or len(calls) < 2:
            continue
        squares = [float(each.given[4]) for each in calls if each.given is not None]
        if squares and all(0 < square < eps / EPSILON for square in squares):
            yield finding(
                "epsilon_swallows_signal",
                f"eps of {name or type(module).__name__} is {eps:.3g}, and the mean square of its input"
                f" {max(squares):.3g}: it divides by the former.",
                1,
                MAY_BE_MEANT,
            )
            return


def detached_between(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """A layer is given its own last output, detached, call after call, and no backward pass comes to any but the last;
    or another's, which nothing trains."""
    cuts = [each for each in forward.layers.cuts if each.step < forward.steps]
    own = [each for each in cuts if each.before == each.after]
    steps = {each.step for each in own}
    if len(steps) >= 2 and len(own) >= 2 * len(steps) and not any(each.reached for each in own):
        yield finding(
            "detached_backbone",
            f"{own[0].after} is given what it gave in the call before, detached, {len(own) // len(steps)} times for"
            " each step, and no backward pass comes to those calls: the gradient knows of the last one only.",
            own[0].step + 1,
            "A state that is cut on purpose, as to save memory, looks so.",
            "Detach the state once for each window that is trained on, not at each time within it.",
        )
        return
    heard = {name for by in loop.optimizers for each in by.records for name in each.hooked}
    came = {
        name for by in loop.optimizers for each in by.records for name in each.hooked if name not in each.none_grads
    }
    others = [each for each in cuts if each.before != each.after and not each.reached]
    for each in others:
        of_part = [name for name in heard if name.rpartition(".")[0] == each.before]
        if of_part and not came.intersection(of_part) and forward.steps >= EARLY:
            yield finding(
                "detached_backbone",
                f"{each.after} is given what {each.before} makes, detached, and no gradient has come to {each.before}.",
                forward.steps,
                MAY_BE_MEANT,
            )
            return


def sampled_between(forward: ForwardRecord) -> Iterator[Finding]:
    """The first of several outputs depends on no layer that reads the model's input, and others do."""
    of_first, beside = ({name.rpartition(".")[0] for name in names} for names in forward.beside_first)
    calls = {name: each[0] for name, each in forward.layers.calls.items() if each[0].given is not None}
    reader = next((name for name in calls if isinstance(forward.layers.kinds[name], WEIGHTED)), "")
    later = [name for name in calls if name in of_first]
    if reader not in beside or reader in of_first or not later or calls[later[0]].with_grad:
        return
    if not any(torch.equal(calls[name].given, calls[reader].given) for name in later):
        yield finding(
            "detached_backbone",
            f"the first output does not depend on {reader}, which reads the model's input, through autograd, and other"
            f" outputs do: {later[0]} goes on from a tensor that has no gradient.",
            1,
            "A head that learns beside a network, from its features, looks so.",
            "Draw with `rsample()`, or as `mean + deviation * torch.randn_like(mean)`: `sample()` has no gradient, nor"
            " has anything behind `detach()` or `no_grad()`.",
        )


def recomputed_differently(forward: ForwardRecord) -> Iterator[Finding]:
    """What backward computes once more is not what the forward pass had."""
    again = forward.layers.recomputed
    apart = [each for each in again if each.given > 0.02 or each.gives > 0.02]
    if len(apart) >= 2:
        drawn = [each for each in apart if each.given == 0]
        each = (drawn or apart)[0]
        what = "is given the same numbers and gives others" if each.given == 0 else "is given other numbers"
        yield finding(
            "recomputed_differently",
            f"in {len(apart)} of {len(again)} calls that backward repeats a layer has other numbers than in the forward"
            f" pass: {each.name} {what} (by {max(each.given, each.gives):.2g} of their size).",
            1,
            "" if drawn else "A backward that is written by hand may call layers with what it likes.",
            "Leave `preserve_rng_state=True`, and draw no random number, nor read anything that changes, in what is"
            " checkpointed.",
        )


def wrong_backward(forward: ForwardRecord) -> Iterator[Finding]:
    """An own function whose backward is no derivative of its forward. A backward of something that has no derivative,
    or that turns or scales it, is meant."""
    for each in forward.functions:
        if (cause := _judge(each)) is not None:
            pairs = ", ".join(f"{a:.3g} and {b:.3g}" for a, b in zip(each.by_forward[:3], each.by_backward[:3]))
            yield finding(
                cause,
                f"{each.name} changes along random directions by {pairs}: by differences of its forward, and by its"
                " backward.",
                1,
                "A substitute derivative may be meant.",
                "Check it with `torch.autograd.gradcheck` in float64.",
            )
            return


def _judge(check: FunctionCheck) -> str | None:
    forward, backward = (torch.tensor(side, dtype=torch.float64) for side in (check.by_forward, check.by_backward))
    size = float(forward.norm())
    if size <= 1e-9 * max(1.0, float(backward.norm())):
        return None  # no derivative: a rounding, a comparison
    if not check.wrong:
        return None
    if float(backward.norm()) == 0:
        return "wrong_backward"
    cosine = float(torch.dot(forward, backward)) / (size * float(backward.norm()))
    if cosine < -0.999:
        return None  # turned round on purpose, for an adversary
    if cosine > 0.9999:
        return "gradient_scale_differs"
    return None if check.substitute else "wrong_backward"


def float16_overflow(forward: ForwardRecord) -> Iterator[Finding]:
    """Numbers of the pass are beyond the largest of float16, although the outputs may be finite."""
    passes = [[(name, int(count)) for name, count in each.overflows if int(count)] for each in forward.shapes]
    if sum(map(bool, passes)) >= 2 and 2 * sum(map(bool, passes)) >= len(passes):
        first = next(each for each in passes if each)
        name, count = first[0]
        yield finding(
            "fp16_overflow",
            f"{count} float16 numbers of a `{name}` within the model {'are zero, as' if name == 'rsqrt' else 'are'}"
            f" {'of an infinity' if name == 'rsqrt' else 'infinite'}, in {sum(map(bool, passes))} of {len(passes)}"
            " passes that were looked at: what was squared or summed before is beyond 65504.",
            1,
            "Scenes that a mask leaves out afterwards may have them.",
            "Square, sum and normalise in float32, and go back to half precision after that.",
        )
