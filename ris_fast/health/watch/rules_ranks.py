"""Rules of `watch` over ranks: each steps with the sum of what all have, on data of its own, from the same weights.

They compare the ranks that reported at the same step. Of a rank that reports alone, only a gradient that is still bit
for bit its own says something.

Legend: R ranks, S numbers, a few of every tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.watch.compare_ranks import (
    ALL,
    FAR,
    NEAR,
    Group,
    RankedStep,
    all_alike,
    all_apart,
    group_ranks,
    judged_parts,
    multiple_of,
)
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.rank_records import RanksRecord
from ris_fast.health.watch.records import LoopRecord

OWN_BATCHES = (
    "Give each rank batches of its own: `DistributedSampler(..., num_replicas=world_size, rank=rank)` with `set_epoch`,"
    " or a generator seeded with the rank."
)
ENOUGH = 8  # steps that show the same thing on both ranks
LOCAL_SGD = "Local SGD, DiLoCo and runs that are independent on purpose look so too: there weights are averaged, or not"


def rank_findings(loop: LoopRecord) -> list[Finding]:
    """What ranks show; nothing in a single process."""
    if loop.ranks is None:
        return []
    group = group_ranks(loop.ranks)
    if len(group.ranks) < 2:
        return list(_own_gradient(loop.ranks))
    broken = list(_clipped_on_ranks(group)) or [*_never_reduced(group), *_not_in_the_sum(group)]
    return [
        *broken,
        *(list(_same_data(group)) or _same_inputs(group)),
        *_vanished(group),
        *_diverged(group, explained=bool(broken)),
        *_other_steps(loop.ranks),
    ]


def _own(step: RankedStep, part: slice) -> frozenset[int]:
    """Places of the ranks that step with what is a multiple of their own gradient alone, where ranks' gradients are
    not multiples of each other."""
    arrived, at_step = step.arrived[:, part], step.at_step[:, part]
    if all_alike(at_step) or not all_apart(arrived):
        return frozenset()
    return frozenset(n for n in range(len(arrived)) if multiple_of(arrived[n], at_step[n]) is not None)


def _never_reduced(group: Group) -> Iterator[Finding]:
    """Tensors with which ranks step alone, in the last two steps that were looked at at least.

    Without DistributedDataParallel only those that began with the same weights, as copies do.
    """
    own = [
        {name: ranks for name, part in judged_parts(step).items() if (ranks := _own(step, part))}
        for step in group.steps
    ]
    judged = dict.fromkeys(name for step in group.steps for name in judged_parts(step))
    seen = {
        name: [name in each for each, step in zip(own, group.steps) if name in judged_parts(step)] for name in judged
    }
    meant = group.within or group.copied()
    alone = [n for n, those in seen.items() if _ends_so(those) and (n in meant or (n == ALL and meant))]
    if not alone or _averaged(group):
        return
    since = next(step.step for step, each in zip(group.steps, own) if alone[0] in each)
    ranks = sorted(set.union(*(set(each.get(alone[0], ())) for each in own)))
    count = f"all {len(judged)}" if len(alone) == len(judged) else f"{len(alone)} of {len(judged)}"
    few = "" if len(group.steps) >= 4 else "Few steps have been looked at."
    doubt = group.loose or (few if group.given else f"{LOCAL_SGD}.")
    yield finding(
        "rank_gradient_missing",
        f"from step {since + 1} on {group.named(ranks)} of {len(group.ranks)} "
        f"{'steps' if len(ranks) == 1 else 'step'} with what backward left on that rank alone, in {count} tensors:"
        f" {', '.join(alone[:3])}. Nothing sums it over ranks.",
        since + 1,
        doubt,
        advice=(
            "Call the DistributedDataParallel wrapper and not the bare module, wrap after the last layer was added, "
            "leave `no_sync` before the last backward of a step; without the wrapper, all-reduce each gradient."
        ),
    )


def _averaged(group: Group) -> bool:
    """Whether all ranks had the same weights again after they had different ones, as in local SGD."""
    alike: dict[int, list[bool]] = {}
    for step in group.steps:
        alike.setdefault(step.optimizer, []).append(all_alike(step.weights))
    return any(now and not all(each[:n]) for each in alike.values() for n, now in enumerate(each))


def _ends_so(seen: list[bool]) -> bool:
    return len(seen) > 1 and seen[-1] and seen[-2]


def _clipped_on_ranks(group: Group) -> Iterator[Finding]:
    """Ranks step with multiples of one gradient, in two steps at least."""
    found = [(step, factors) for step in group.steps if (factors := _factors(step))]
    if len(found) > 1:
        step, by_tensor = found[0]
        name, factors = next(iter(by_tensor.items()))
        usual = Counter(round(each, 4) for each in factors).most_common(1)[0][0]
        odd = [n for n, factor in enumerate(factors) if abs(factor - usual) > 1e-3 * usual] or [len(factors) - 1]
        sizes = ", ".join(f"{each:.4g}" for each in factors[:8])
        yield finding(
            "clipped_apart",
            f"in {len(found)} of {len(group.steps)} steps that were looked at ranks step with one gradient at different"
            f" sizes, in {len(by_tensor)} of {len(judged_parts(step))} tensors: in step {step.step + 1} that of {name}"
            f" is {sizes} times rank {group.ranks[0].rank}'s, and {group.named(odd)} differs.",
            step.step + 1,
            group.loose,
        )


def _factors(step: RankedStep) -> dict[str, list[float]]:
    """Of tensors, each rank's gradient at the step against the first's, where they are multiples and one is not 1.

    What backward left was reduced, for it differed; or it was the same on all ranks, as for layers that ranks with
    parts of others have whole.
    """
    found = {}
    for name, part in judged_parts(step).items():
        arrived, at_step = step.arrived[:, part], step.at_step[:, part]
        factors = [multiple_of(at_step[0], row) for row in at_step]
        if all(factors) and any(abs(each - 1) > 1e-3 for each in factors if each):
            if all_apart(arrived) or (arrived.any() and all_alike(arrived)):
                found[name] = [each for each in factors if each]
    return found


def _not_in_the_sum(group: Group) -> Iterator[Finding]:
    """All ranks step with the same gradient, and a sum that leaves a rank out explains it."""
    weights = [each for step in group.steps if (each := _weights_in_sum(step)) is not None]
    if len(weights) < 2:
        return
    missing = [n for n in range(len(group.ranks)) if all(abs(float(each[n])) < 0.02 for each in weights)]
    if missing and len(missing) < len(group.ranks):
        shares = ", ".join(f"{float(each):.2f}" for each in weights[0])
        yield finding(
            "rank_gradient_missing",
            f"the gradient of {group.named(missing)} of {len(group.ranks)} is not in the sum that all ranks step with:"
            f" ranks have shares {shares}.",
            group.steps[0].step + 1,
            group.loose or ("" if group.managed else "It may be left out on purpose."),
        )


def _weights_in_sum(step: RankedStep) -> Tensor | None:
    """(R,) how often each rank's gradient is in what all of them step with, in shares of the largest; None where no sum
    explains it, or several do."""
    arrived, at_step = step.arrived.T, step.at_step[0]
    rows, ranks = arrived.shape
    norms = arrived.norm(dim=0)
    if not all_alike(step.at_step) or rows < 4 * ranks or not bool((norms > 0).all()) or not at_step.any():
        return None
    if not bool(arrived.isfinite().all() & at_step.isfinite().all()):
        return None
    if float(torch.linalg.svdvals(arrived / norms)[-1]) < FAR:
        return None
    weights = torch.linalg.lstsq(arrived, at_step[:, None]).solution[:, 0]
    residual = float((arrived @ weights - at_step).norm())
    return weights / weights.abs().max() if residual <= NEAR * float(at_step.norm()) else None


def _same_data(group: Group) -> Iterator[Finding]:
    """Backward leaves the same bits on two ranks, in every step, and others in each.

    Without DistributedDataParallel, gradients may have been reduced by hooks during backward.
    """
    steps = [step for step in group.steps if step.arrived.any(dim=1).all()]
    if len(steps) < 3 or len(steps) < len(group.steps) or not group.managed:
        return
    pairs = [
        (a, b)
        for a, b in combinations(range(len(group.ranks)), 2)
        if all(torch.equal(step.arrived[a], step.arrived[b]) for step in steps)
    ]
    moving = [a for a, _ in pairs if not all(torch.equal(s.arrived[a], steps[0].arrived[a]) for s in steps)]
    if pairs and moving:
        ranks = sorted({rank for pair in pairs for rank in pair})
        yield finding(
            "rank_sees_other_data",
            f"backward leaves the same gradient on {group.named(ranks)}, bit for bit, in all {len(steps)} steps that"
            " were looked at: they are given the same batches.",
            steps[0].step + 1,
            "" if len(steps) >= ENOUGH else "Few steps have been looked at.",
            advice=OWN_BATCHES,
        )


def _same_inputs(group: Group) -> Iterator[Finding]:
    """Two ranks' models are given the same inputs in every pass, and others in most of them."""
    numbers = set.intersection(*(set(each.inputs) for each in group.ranks))
    pairs = [
        (a, b)
        for a, b in combinations(range(len(group.ranks)), 2)
        if all(group.ranks[a].inputs[number] == group.ranks[b].inputs[number] for number in numbers)
    ]
    if not pairs or len(numbers) < ENOUGH or not group.managed:
        return
    kinds = {group.ranks[pairs[0][0]].inputs[number] for number in numbers}
    if 2 * len(kinds) > len(numbers):
        yield finding(
            "rank_sees_other_data",
            f"the model is given the same inputs on {group.named(sorted({n for pair in pairs for n in pair}))} in all "
            f"{len(numbers)} passes that were looked at, and backward leaves other gradients there.",
            group.ranks[0].steps,
            "Noise of one seed, with targets of its own on each rank, looks so too.",
            advice=OWN_BATCHES,
        )


def _vanished(group: Group) -> Iterator[Finding]:
    """Backward leaves zeros on one rank and a gradient on another: in all steps, or in a few."""
    nothing = [n for n in range(len(group.ranks)) if all(not step.arrived[n].any() for step in group.steps)]
    full = [n for n in range(len(group.ranks)) if all(step.arrived[n].any() for step in group.steps)]
    if nothing and full and len(group.steps) > 1:
        certain = group.managed and len(group.steps) >= ENOUGH
        yield finding(
            "rank_gradient_missing",
            f"backward leaves zeros only on {group.named(nothing)} in all {len(group.steps)} steps that were looked at,"
            f" and a gradient on {group.named(full)}.",
            group.steps[0].step + 1,
            "" if certain else "A rank may have no share in the loss on purpose.",
        )
        return
    for optimizers in zip(*(each.optimizers for each in group.ranks)):
        for n, mine in enumerate(optimizers):
            others = [set(each.full_steps) for k, each in enumerate(optimizers) if k != n]
            lost = sorted(set(mine.zero_steps).intersection(*others))
            if lost and len(mine.zero_steps) <= 0.1 * len(mine.full_steps):
                yield finding(
                    "rank_gradient_missing",
                    f"backward leaves zeros on {group.named([n])} in {len(lost)} of {mine.steps} steps, first in step"
                    f" {lost[0] + 1}, where the other ranks have a gradient.",
                    lost[0] + 1,
                    "A batch without anything to learn from does that too.",
                )


def _diverged(group: Group, explained: bool) -> Iterator[Finding]:
    """Weights that should be copies are not; unless it was seen why: ranks step with other gradients.

    They should be where DistributedDataParallel looks after them, and where all ranks step with the same gradient.
    """
    copies = group.managed or _stepped_alike(group)
    unlike_rows = [(name, row) for name, row in group.hashes.items() if len(set(row)) > 1 and name in copies]
    if (
        not unlike_rows
        or _averaged(group)
        or (explained and all(all_alike(step.weights) for step in group.first_steps()))
    ):
        return
    name, row = unlike_rows[0]
    usual = Counter(row).most_common(1)[0][0]
    odd = [n for n, each in enumerate(row) if each != usual]
    devices = len({each.device for each in group.ranks}) > 1
    step = next((step.step for step in group.steps if not all_alike(step.weights)), None)
    since = "" if step is None else f", before step {step + 1} already"
    yield finding(
        "ranks_diverged",
        f"{len(unlike_rows)} of {len(group.hashes)} tensors differ between ranks, {name} on {group.named(odd)}{since}."
        f"{_why(group)}",
        group.ranks[0].steps if step is None else step + 1,
        group.loose or ("Ranks on unlike devices may round differently." if devices else ""),
        advice=(
            "Start all ranks from the same weights (DistributedDataParallel sends rank 0's when it is built) and change"
            " nothing on one rank alone: no weight, no learning rate, no frozen layer, no skipped step."
        ),
    )


def _stepped_alike(group: Group) -> set[str]:
    """Tensors with which all ranks step alike in each step that was looked at, and not alike in all of them.

    What backward left differs, so that something reduces it; else the weights began as copies, for ranks that have
    parts of a layer may have the same gradient on purpose.
    """
    arrived, stepped = _by_name(group, "arrived"), _by_name(group, "at_step")
    copied = group.copied()
    return {
        name
        for name, steps in stepped.items()
        if all(map(all_alike, steps)) and not all(torch.equal(rows, steps[0]) for rows in steps)
        if name in copied or all(map(all_apart, arrived[name]))
    }


def _by_name(group: Group, kind: str) -> dict[str, list[Tensor]]:
    """(R, S) of each step, by tensor."""
    found: dict[str, list[Tensor]] = {}
    for step in group.steps:
        for name, part in step.parts.items():
            found.setdefault(name, []).append(getattr(step, kind)[:, part])
    return found


def _why(group: Group) -> str:
    """What else differs between ranks."""
    for step in group.steps:
        if any(rates != step.rates[0] for rates in step.rates):
            rates = "; ".join(
                f"rank {each.rank}: {', '.join(f'{rate:.4g}' for rate in rates)}"
                for each, rates in zip(group.ranks[:8], step.rates)
            )
            return f" Learning rates differ in step {step.step + 1}: {rates}."
    trainable = [dict(zip(each.names, each.trainable)) for each in group.ranks]
    if any(each[name] != trainable[0][name] for each in trainable for name in group.hashes):
        return " Ranks do not train the same tensors: requires_grad differs."
    counts = [each.steps for rank in group.ranks for each in rank.optimizers]
    return " The optimizers have not made the same number of steps." if _uneven(group, counts) else ""


def _uneven(group: Group, counts: list[int]) -> bool:
    per_rank = len(counts) // len(group.ranks)
    return any(counts[n : n + per_rank] != counts[:per_rank] for n in range(0, len(counts), per_rank))


def _other_steps(ranks: RanksRecord) -> Iterator[Finding]:
    """Ranks that reported at the same time have made other numbers of steps."""
    if ranks.elsewhere and ranks.mine.wrapper:
        rank, steps = next(iter(ranks.elsewhere.items()))
        yield finding(
            "ranks_diverged",
            f"rank {rank} has made {steps} steps when rank {ranks.mine.rank} has made {ranks.mine.steps}.",
            ranks.mine.steps,
            "They may have reported at different moments.",
        )


def _own_gradient(ranks: RanksRecord) -> Iterator[Finding]:
    """Of a rank that reports alone: gradients that DistributedDataParallel should have reduced, untouched."""
    wrapper = ranks.mine.wrapper
    if wrapper is None or wrapper.own_reduction or len(wrapper.ranks) < 2:
        return
    records = [record for each in ranks.mine.optimizers for record in each.records if record.arrived.any()]
    if len(records) > 1 and all(torch.equal(record.arrived, record.at_step) for record in records):
        yield finding(
            "rank_gradient_missing",
            f"in all {len(records)} steps that were looked at gradients reach the optimizer bit for bit as backward "
            f"left them on rank {ranks.mine.rank}: DistributedDataParallel has not reduced them.",
            records[0].step + 1,
            "Ranks that are given the same batches look so too; `report()` on every rank at the same step tells.",
        )
