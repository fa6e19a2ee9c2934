"""Rules of `watch` on how a model is put together: settings of layers, axes, parts in several places, equal units."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean

import torch
from torch import nn

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.loss import WALKED
from ris_fast.health.watch.pass_records import ForwardRecord
from ris_fast.health.watch.records import EARLY, LoopRecord

CALLS = 4  # of a layer that show it
HEAVY = 0.75
APART = 1.3  # factor between the spreads of two places
STALE, BATCHES, LAST = 0.3, 100, 0.5  # share of the first statistics after so many batches; momentum
WEIGHTED = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def construction_findings(loop: LoopRecord) -> list[Finding]:
    """What is odd in how the layers are set and put together."""
    if (forward := loop.forward) is None:
        return []
    return [
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
