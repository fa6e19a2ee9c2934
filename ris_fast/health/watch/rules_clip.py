"""The rule of `watch` on a norm that is clipped over part of the tensors, in a single process.

Between ranks a gradient also changes where it is reduced: there `rules_ranks` compares what the ranks step with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.records import StepRecord


def clipped_in_part(records: list[StepRecord]) -> Iterator[Finding]:
    """Some tensors' gradients reach the optimizer as they came, and the others at one factor, which is another in each
    step: their norm was clipped without the rest."""
    found = [(record, split) for record in records if not record.closure and (split := _split(record))]
    sets = {clipped for _, (clipped, _, _) in found}
    factors = {round(factor, 6) for _, (_, factor, _) in found}
    if len(found) < 3 or len(sets) > 1 or len(factors) < 2:
        return
    record, (clipped, factor, untouched) = found[0]
    yield finding(
        "clipped_apart",
        f"in {len(found)} steps the gradients of {len(clipped)} tensors ({', '.join(sorted(clipped)[:3])}) are scaled"
        f" down together, by {factor:.3g} in step {record.step + 1}, and those of {len(untouched)}"
        f" ({', '.join(sorted(untouched)[:3])}) are left as they came.",
        record.step + 1,
        "Clipping by groups may be meant.",
        advice=(
            "If one norm was meant, clip all parameters of the optimizer in one call; if groups were, each with its own"
            " threshold, this is right."
        ),
    )


def _split(record: StepRecord) -> tuple[frozenset[str], float, frozenset[str]] | None:
    """Names of the tensors that were scaled down, the factor, and names of those that were not, but for a loss scale
    taken out of all; None for another pattern."""
    ratios = {
        name: float(after) / float(before)
        for name, before, after in zip(record.names, record.grad_after_backward, record.grad_at_step)
        if name in record.hooked and 0 < float(before) < math.inf
    }
    scale = max(ratios.values(), default=0.0)
    if not _power_of_two(scale):
        return None
    untouched = frozenset(name for name, ratio in ratios.items() if ratio > (1 - 1e-6) * scale)
    factors = [ratio / scale for name, ratio in ratios.items() if name not in untouched]
    if len(factors) < 2 or min(factors) <= 0 or max(factors) > 1 - 1e-3:
        return None
    alike = max(factors) <= (1 + 1e-3) * min(factors)
    return (frozenset(ratios.keys() - untouched), factors[0], untouched) if alike else None


def _power_of_two(scale: float) -> bool:
    return scale > 0 and abs(math.log2(scale) - round(math.log2(scale))) < 1e-5
