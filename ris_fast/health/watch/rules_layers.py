"""Rules of `watch` on the layers of a model: what they are given and give at first, how they are set and put together,
and what recomputation and own functions make of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean

import torch
from torch import nn

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.functions import FunctionCheck
from ris_fast.health.watch.loss import WALKED
from ris_fast.health.watch.records import EARLY, ForwardRecord, LoopRecord

CALLS = 4  # of a layer that show it
CUT_OFF = 1e-6  # of the spread, from one layer to the next
GROWTH, DECAY = 1e4, 1e-6  # of the spread between scenes from the first layer to the last
EPSILON = 30.0  # times the mean square beside it
HEAVY = 0.75
APART = 1.3  # factor between the spreads of two places
STALE, BATCHES, LAST = 0.3, 100, 0.5  # share of the first statistics after so many batches; momentum
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
        *indices_without_offsets(forward),
        *scenes_mixed(loop, forward),
        *wrong_layout(loop, forward),
        *heavy_dropout(forward),
        *norm_statistics(forward),
        *norm_of_few(forward),
        *dropout_at_the_end(loop, forward),
        *tied_parameters(loop, forward),
        *shared_norm(loop, forward),
        *symmetric_init(loop, forward),
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
    if float((forward - backward).norm()) <= 0.02 * size:
        return None
    if float(backward.norm()) == 0:
        return "wrong_backward"
    cosine = float(torch.dot(forward, backward)) / (size * float(backward.norm()))
    if cosine < -0.999:
        return None  # turned round on purpose, for an adversary
    return "gradient_scale_differs" if cosine > 0.9999 else "wrong_backward"


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


def indices_without_offsets(forward: ForwardRecord) -> Iterator[Finding]:
    """Places that are looked up in the rows of all scenes together lie all in those of the first scene."""
    passes = [each.reaches for each in forward.shapes]
    short = [[int(most) < each for _, each, most in reaches] for reaches in passes]
    if len(passes) >= 2 and all(each and all(each) for each in short):
        rows, each, most = passes[0][0]
        yield finding(
            "scenes_mixed",
            f"the model is given {rows} rows, {each} for each output, and looks up places up to {int(most)} only: the"
            " places of every scene are counted from the first row of all.",
            1,
            "Where only the first rows are to be read, that is right.",
            "Add to the indices of each scene, such as the ends of edges, the number of rows before it.",
        )


def scenes_mixed(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """Operations that run over the axis of the scenes, within the model or its loss."""
    within = [each.over_scenes for each in forward.shapes]
    apart = [each.apart for each in forward.shapes]
    in_loss = [each.over_scenes for each in (*loop.losses, *loop.met)]
    graph = any(each.inputs > 1 for each in forward.passes)
    if len(within) >= 2 and all(within):
        yield finding(
            "scenes_mixed",
            f"in each pass that was looked at {within[0][0]} runs over the scenes of the batch, within the model.",
            1,
            "Where rows are the nodes of one graph or the members of a set, that is right."
            if graph
            else "Where the first axis is no batch, or scenes are compared on purpose, that is right.",
        )
    elif len(apart) >= 2 and all(apart):
        yield finding(
            "scenes_mixed",
            f"a tensor with scenes on its second axis is reshaped, not transposed, to have them on its first:"
            f" {apart[0][0]}.",
            1,
            MAY_BE_MEANT,
            "Transpose or permute before the reshape.",
        )
    elif any(in_loss):
        some = next(each for each in in_loss if each)
        yield finding(
            "scenes_mixed",
            f"between the outputs and the loss {some[0]} runs over the scenes of the batch.",
            1,
            "Scenes that are compared with each other on purpose look so.",
        )


def wrong_layout(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """A reshape that should be a transpose."""
    within, in_loss = [each.transposed for each in forward.shapes], [each.transposed for each in loop.met[:WALKED]]
    found = next((each for each in (within, in_loss) if len(each) >= 2 and all(each)), None)
    if found is not None:
        yield finding(
            "wrong_layout",
            f"{'within the model' if found is within else 'between the outputs and the loss'} a tensor is reshaped in a"
            f" way that neither parts nor joins axes, {found[0][0]}: numbers keep their old order and come under other"
            " places.",
            1,
            MAY_BE_MEANT,
            "Use `transpose` or `permute` where axes change places.",
        )


def heavy_dropout(forward: ForwardRecord) -> Iterator[Finding]:
    """A rate at which next to nothing is left."""
    heavy = {name: rate for name, rate in forward.modules.dropouts.items() if rate >= HEAVY}
    if heavy and any(each.training for each in forward.passes):
        name, rate = next(iter(heavy.items()))
        yield finding(
            "heavy_dropout",
            f"{name or 'the dropout'} removes {rate:.0%} of what it is given in training"
            f"{f', and {len(heavy) - 1} more do' if len(heavy) > 1 else ''}.",
            1,
            "The rate of torch's dropout is the share that is removed, not the share that is kept.",
        )


def dropout_at_the_end(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """What the model gives has gone through a dropout, and is compared with targets as it is."""
    name, module = next(reversed(forward.layers.kinds.items()), ("", None))
    first = next((each for each in forward.passes if each.training and each.reached and each.input is not None), None)
    calls = forward.layers.calls.get(name, [])
    direct = [each for each in (*loop.losses, *loop.met) if each.direct]
    if not isinstance(module, nn.modules.dropout._DropoutNd) or not module.p or first is None or not direct:
        return
    given = [each for each in calls if each.training and each.gives is not None]
    zeros = [each.output for each in forward.passes if each.training and each.reached and each.output is not None]
    share = sum(float((each == 0).float().mean()) for each in zeros) / max(1, len(zeros))
    if len(given) >= CALLS and len(zeros) >= CALLS and 0.5 * module.p < share < 1.5 * module.p:
        yield finding(
            "heavy_dropout",
            f"the last layer, {name or type(module).__name__}, is a dropout: {share:.0%} of the outputs that are"
            " compared with targets are zero in training, at random.",
            1,
            "Features for another network may be dropped so.",
            "Put the dropout before the last layer with weights.",
        )


def norm_of_few(forward: ForwardRecord) -> Iterator[Finding]:
    """A normalisation over the batch is given batches of one or two scenes in training."""
    if not any(not each.training and not each.reached for each in forward.passes):
        return
    for name, calls in forward.layers.calls.items():
        rows = [each.rows for each in calls if each.training and each.enabled]
        if isinstance(forward.layers.kinds[name], nn.BatchNorm1d) and len(rows) >= CALLS and max(rows) <= 2:
            yield finding(
                "batchnorm_statistics",
                f"{name or 'the model'} normalises batches of {max(rows)} scenes in training, of which nothing but"
                " signs is left, and evaluates with statistics of many.",
                forward.steps,
                "Where each scene has a long axis of its own, that may do.",
                "Take larger batches, or a LayerNorm or GroupNorm, which do not look at other scenes.",
            )
            return


def norm_statistics(forward: ForwardRecord) -> Iterator[Finding]:
    """Running statistics that hardly follow, or that are those of the last batch; or none, where evaluation uses
    them."""
    if not any(not each.training and not each.reached for each in forward.passes):
        return
    slow = [each for each in forward.modules.norms if each.batches >= BATCHES and each.share > STALE]
    fast = [each for each in forward.modules.norms if each.batches >= BATCHES and each.momentum > LAST]
    if slow or fast:
        each = (slow or fast)[0]
        yield finding(
            "batchnorm_statistics",
            f"after {each.batches} batches at a momentum of {each.momentum:g} the running statistics of"
            f" {each.name or 'the model'} are still {each.share:.0%} those that it was made with."
            if slow
            else f"at a momentum of {each.momentum:g} the running statistics of {each.name or 'the model'} are those of"
            " the last batch or two.",
            forward.steps,
            "Evaluation uses them. Torch's momentum is the share of the new batch; elsewhere that of the old ones.",
            "Set `momentum` to 0.1, or to 0.01 for long runs.",
        )
    elif forward.modules.untracked:
        yield finding(
            "batchnorm_statistics",
            f"{', '.join(forward.modules.untracked[:3])}: track_running_stats is off, so that evaluation normalises"
            " with the statistics of each batch that it is given, and a scene's answer depends on the others.",
            forward.steps,
            MAY_BE_MEANT,
        )


def tied_parameters(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """A container has one part several times."""
    if forward.modules.repeated:
        container, part, count = forward.modules.repeated[0]
        yield finding(
            "tied_parameters",
            f"{container or 'the model'} has one and the same part {count} times, first as {part}: they share all"
            " weights.",
            loop.steps,
            "Layers are sometimes shared on purpose; `[layer] * n` does it by accident.",
            "Build each part: `nn.ModuleList(make() for _ in range(n))`.",
        )
        return
    for first, other in forward.modules.named_twice:
        inside = [
            calls for name, calls in forward.layers.calls.items() if f"{name}.".startswith((f"{first}.", f"{other}."))
        ]
        pairs = [(one, now) for calls in inside[:1] for one, now in pairwise(calls)]
        same = [
            one.given is not None and now.given is not None and torch.equal(one.given, now.given) for one, now in pairs
        ]
        if sum(same) >= 2 and 2 * sum(same) >= len(same):
            yield finding(
                "tied_parameters",
                f"{first} and {other} are one and the same part, and are given the same numbers in {sum(same)} passes:"
                " both give the same.",
                loop.steps,
                MAY_BE_MEANT,
                "Build each part by itself, or copy it with `copy.deepcopy`.",
            )
            return


def shared_norm(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """A normalisation with running statistics that is called in several places of each pass, which see other numbers.
    Where all layers are called as often, the whole network is."""
    counts = {name: len(calls) for name, calls in forward.layers.calls.items()}
    weighted = [n for name, n in counts.items() if isinstance(forward.layers.kinds[name], WEIGHTED)]
    for name, calls in forward.layers.calls.items():
        module, given = forward.layers.kinds[name], [each.given for each in calls if each.training]
        if not isinstance(module, nn.modules.batchnorm._NormBase) or not module.track_running_stats or not weighted:
            continue
        times = counts[name] // max(1, max(weighted))
        if times < 2 or len(given) < 2 * times or any(each is None for each in given):
            continue
        spreads = [fmean(float(each[2]) for each in given[place::times]) for place in range(times)]  # type: ignore[index]
        low, high = min(spreads), max(spreads)
        if high > APART * low > 0:
            yield finding(
                "tied_parameters",
                f"{name} normalises in {times} places of each pass, at spreads of {high:.2g} and {low:.2g}: its running"
                " statistics, with which evaluation normalises, are those of neither.",
                loop.steps,
                MAY_BE_MEANT,
                "Give each place a normalisation of its own.",
            )
            return


def symmetric_init(loop: LoopRecord, forward: ForwardRecord) -> Iterator[Finding]:
    """Rows or columns of a matrix that began equal, and of which training has made few different ones or none."""
    trained = {each.name for by in loop.optimizers for each in by.trained}
    alike = [each for each in forward.units if each.name in trained and each.stay]
    if alike and loop.steps >= EARLY:
        first = alike[0]
        which = "rows" if first.axis == 0 else "columns"
        yield finding(
            "symmetric_init",
            f"all {which} of {first.name} were equal when the watch began, and of {sum(first.later)} that were looked"
            f" at {len(first.later)} {'is' if len(first.later) == 1 else 'are'} different after {loop.steps} steps"
            f"{f'; so it is in {len(alike) - 1} more' if len(alike) > 1 else ''}: they receive equal gradients and stay"
            " equal, so that they do the work of one.",
            1,
            MAY_BE_MEANT,
        )
