"""Rules over the ranks of a run: they hold the same weights, have scenes of their own, and every gradient is summed.

They read `health.ranks` of a row (`training/ranks/rank_telemetry.py`); a run of one rank has none, and none of them
looks at it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import NAMED, Row, Rule, RunHistory, named
from ris_fast.health.monitor.step_rules import ENOUGH_SCENES

ROUNDING = 16 * 2.0**-23  # of the sum of norms, times the root of the ranks: what a sum in float32 may lose


def ranks_hold_the_same_weights(run: RunHistory) -> Iterator[Finding]:
    """Before a step all ranks have the same weights, bit for bit; unless it was seen why not: they step with different
    gradients."""
    weights = _ranks(run.steps[-1]).get("weights", ())
    if len(set(weights)) < 2 or any(_step_apart(row) for row in run.steps[:-1]):
        return
    counts = Counter(weights)
    most = max(counts.values())
    common = weights[0] if counts[weights[0]] == most else counts.most_common(1)[0][0]
    others = [rank for rank, each in enumerate(weights) if each != common]
    if most > 1:
        verb = "holds" if len(others) == 1 else "hold"
        seen = f"{named(others)} of {len(weights)} {verb} other weights than the majority"
    elif len(weights) == 2:
        seen = "rank 1 holds other weights than rank 0"
    else:
        seen = f"no two of {len(weights)} ranks hold the same weights"
    yield run.finding("ranks_diverged", f"{seen} before step {_call(run.steps[-1])}{_agreed(run)}.")


def _step_apart(row: Row) -> bool:
    """Whether ranks that held the same weights stepped with different gradients, to the last bit."""
    ranks = _ranks(row)
    return len(set(ranks.get("weights", ()))) == 1 and len({str(each) for each in ranks["summed"]}) > 1


def _agreed(run: RunHistory) -> str:
    """When they were last seen to have the same."""
    for row in reversed(run.steps[:-1]):
        if weights := _ranks(row).get("weights"):
            return f"; before step {_call(row)} all held the same" if len(set(weights)) == 1 else ""
    return "; no step was seen before"


def ranks_have_their_own_scenes(run: RunHistory) -> Iterator[Finding]:
    """No scene of a step is shown to two ranks, and each rank is shown those of its own numbers."""
    ranks = _ranks(run.steps[-1])
    shared = [pair for pair in ranks.get("shared", ()) if _mostly_shared(run, *pair[:2])]
    wrong = _not_as_numbered(ranks.get("as_numbered", ()))
    if not shared and not wrong:
        return
    seen = [
        f"rank {high} is shown {count} of the {ranks['scenes'][high]} scenes of its step that rank {low} is shown too"
        if high not in wrong or low in wrong
        else f"rank {high} is shown {count} scenes of rank {low} instead of its own"
        for low, high, count in shared[:NAMED]
    ]
    if alone := [rank for rank in wrong if not any(rank in pair[:2] for pair in shared)]:
        seen.append(
            f"{named(alone)} {'is' if len(alone) == 1 else 'are'} shown other scenes than the other ranks have under"
            " the same numbers"
        )
    yield run.finding("rank_sees_other_data", f"in step {_call(run.steps[-1])} {'; '.join(seen)}.")


def _mostly_shared(run: RunHistory, low: int, high: int) -> bool:
    """More than half of a rank's last scenes were another's too; data may hold a scene twice."""
    shared = scenes = 0
    for row in reversed(run.steps):
        ranks = _ranks(row)
        if scenes >= ENOUGH_SCENES or not ranks:
            break
        shared += sum(count for one, other, count in ranks["shared"] if (one, other) == (low, high))
        scenes += min(ranks["scenes"][low], ranks["scenes"][high])
    return shared > max(1, scenes // 2)


def _not_as_numbered(matches: Sequence[bool | None]) -> list[int]:
    """Ranks whose scenes are not those of their numbers. Match r compares what rank r is shown with what the rank
    before it makes of that number, so that one rank with other data breaks its own match and the next one's."""
    broken = [match is False for match in matches]
    if all(broken):
        return list(range(1, len(broken)))  # nobody agrees: all but the one that writes
    return [rank for rank, each in enumerate(broken) if each and not _follows(broken, rank)]


def _follows(broken: Sequence[bool], rank: int) -> bool:
    """Whether it is the last of several in a row, which the one before it explains."""
    return broken[rank - 1] and not broken[(rank + 1) % len(broken)]


def every_rank_is_in_the_sum(run: RunHistory) -> Iterator[Finding]:
    """What every rank steps with is the sum of the gradients of all, and each rank with scenes has one."""
    ranks = _ranks(run.steps[-1])
    if not ranks or any(ranks["nonfinite"]) or not all(map(math.isfinite, _flat(ranks))):
        return
    step, own, summed, norms = _call(run.steps[-1]), ranks["own"], ranks["summed"], ranks["grad_norm"]
    slack = ROUNDING * math.sqrt(len(own)) * sum(norms)
    empty = [rank for rank, norm in enumerate(norms) if norm == 0 and ranks["scenes"][rank] and any(norms)]
    total = [sum(each) for each in zip(*own)]
    off = [rank for rank, each in enumerate(summed) if not _near(each, total, slack)]
    if empty:
        seen = f"the gradient of {named(empty)} is zero over {ranks['scenes'][empty[0]]} scenes"
        yield run.finding("rank_gradient_missing", f"in step {step} {seen}; the others' are not.")
    elif off:
        yield _explained(run, off, own, summed, total, slack)
    else:
        yield from _shares(run, ranks)


def _explained(run: RunHistory, off: list[int], own: list, summed: list, total: list, slack: float) -> Finding:
    """Why some ranks do not step with the sum of all gradients."""
    step, many = _call(run.steps[-1]), len(own)
    reached = summed[off[0]]
    same = all(_near(each, reached, slack) for each in summed)
    alone = [] if same else [rank for rank in off if _near(summed[rank], own[rank], slack)]
    if alone:
        return run.finding("rank_gradient_missing", f"in step {step} {named(alone)} of {many} {_steps_alone(alone)}.")
    if all(_near(summed[rank], reached, slack) for rank in off):
        for rank in range(many):
            weight = _weight(reached, total, own[rank], slack)
            if weight is not None:
                where = "" if len(off) == many else f" that {named(off)} {'steps' if len(off) == 1 else 'step'} with"
                seen = "is not in" if abs(weight) < 1e-3 else f"counts {weight:.4g} times in"
                seen = f"the gradient of {named([rank])} of {many} {seen} the sum{where}"
                return run.finding("rank_gradient_missing", f"in step {step} {seen}.")
        factor = sum(a * b for a, b in zip(reached, total)) / sum(b * b for b in total)
        if len(off) == many and _near(reached, [factor * each for each in total], slack):
            seen = f"all {many} ranks step with {factor:.6g} times the sum of their gradients"
            return run.finding("accumulation_not_divided", f"in step {step} {seen}.")
    odd = off if 2 * len(off) <= many else [rank for rank in off if not _near(summed[rank], reached, slack)] or off
    return run.finding(
        "rank_gradient_missing",
        f"in step {step} {named(odd)} of {many} {'steps' if len(odd) == 1 else 'step'} with another gradient than the"
        " sum of all ranks'.",
    )


def _shares(run: RunHistory, ranks: Row) -> Iterator[Finding]:
    """Every rank weighs its losses by its scenes' share of those of all ranks."""
    scenes, total = ranks["scenes"], sum(ranks["scenes"])
    wanted = [count / max(1, total) for count in scenes]
    off = [rank for rank, share in enumerate(ranks["share"]) if abs(share - wanted[rank]) > 1e-6]
    if off:
        first = off[0]
        yield run.finding(
            "accumulation_not_divided",
            f"in step {_call(run.steps[-1])} {named(off)} of {len(scenes)} {'weighs' if len(off) == 1 else 'weigh'}"
            f" losses by another share than that of their scenes: rank {first} by {ranks['share'][first]:.4g} for"
            f" {scenes[first]} of {total} scenes.",
        )


def _steps_alone(alone: Sequence[int]) -> str:
    return "steps with its own gradient alone" if len(alone) == 1 else "step with their own gradients alone"


def _near(one: Sequence[float], other: Sequence[float], slack: float) -> bool:
    """Whether two projections are of the same gradient, but for rounding (a direction has about unit numbers)."""
    return all(abs(a - b) <= slack for a, b in zip(one, other))


def _weight(reached: Sequence[float], total: Sequence[float], part: Sequence[float], slack: float) -> float | None:
    """How often `part` is in `reached`, where that is all that sets it apart from `total`; None where it is not."""
    rest = [a - b for a, b in zip(reached, total)]
    extra = sum(a * b for a, b in zip(rest, part)) / max(sum(b * b for b in part), 1e-300)
    return 1 + extra if _near(rest, [extra * each for each in part], slack) else None


def _flat(ranks: Row) -> list[float]:
    return [*ranks["grad_norm"], *(number for key in ("own", "summed") for each in ranks[key] for number in each)]


def _ranks(row: Row) -> Row:
    return (row.get("health") or {}).get("ranks") or {}


def _call(row: Row) -> int:
    """The number of the step that was read."""
    return row["health"].get("call", row.get("step", 0))


RANK_RULES: tuple[Rule, ...] = (
    ranks_hold_the_same_weights,
    ranks_have_their_own_scenes,
    every_rank_is_in_the_sum,
)
