"""A finding, and the order in which findings are reported: causes before their consequences, certain before likely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ris_fast.health.causes import CAUSES, FOLLOWS


@dataclass(frozen=True)
class Finding:
    """One cause with what was seen.

    Args: cause: a name of `causes.CAUSES`; evidence: tensors, steps and numbers in one or two sentences;
        step: optimizer steps attempted when it was seen, 0 before the first; severity: the cause's level;
        advice: the cause's fix, unless there is a better one; harm: share of the weights that it leaves untrained, or
        of the steps without effect, where it is not all of them.
    """

    cause: str
    evidence: str
    step: int = 0
    severity: str = ""
    advice: str = ""
    certain: bool = field(default=True)
    harm: float = 1.0

    def __post_init__(self) -> None:
        if self.cause not in CAUSES:
            raise ValueError(f"Finding: no cause is called '{self.cause}'. Add it to causes.py, with a page.")
        object.__setattr__(self, "severity", self.severity or CAUSES[self.cause].level)
        object.__setattr__(self, "advice", self.advice or CAUSES[self.cause].fix)

    @property
    def meaning(self) -> str:
        """What the cause means, in a sentence."""
        return CAUSES[self.cause].meaning

    def to_json(self) -> dict[str, Any]:
        """The fields and the meaning by name, of plain numbers and texts."""
        return asdict(self) | {"meaning": self.meaning}

    def __str__(self) -> str:
        when = "before the first step" if self.step == 0 else f"at step {self.step}"
        doubt = "" if self.certain else ", not certain"
        return (
            f"{self.cause} ({self.severity}, {when}{doubt}): {self.meaning}.\n"
            f"  seen: {self.evidence}\n"
            f"  fix: {self.advice}"
        )


def ranked(findings: Iterable[Finding], muted: Iterable[str] = ()) -> list[Finding]:
    """Most certain first, of these what does most harm, and what follows from another behind it; each cause once (where
    it was seen first), without muted ones."""
    first: dict[str, Finding] = {}
    left_out = set(muted)
    for finding in findings:
        if finding.cause not in left_out:
            first.setdefault(finding.cause, finding)
    order = sorted(first.values(), key=lambda finding: (not finding.certain, -finding.harm, CAUSES[finding.cause].rank))
    return _behind_their_causes(order)


def _behind_their_causes(order: Sequence[Finding]) -> list[Finding]:
    """The same findings; one that follows from others, which are no less certain, comes behind the first of these."""
    waiting, found = list(order), list[Finding]()
    while waiting:
        ready = next((each for each in waiting if not any(_follows(each, other) for other in waiting)), waiting[0])
        waiting.remove(ready)
        found.append(ready)
    return found


def _follows(finding: Finding, other: Finding) -> bool:
    return other.cause in FOLLOWS.get(finding.cause, ()) and other.certain >= finding.certain


def explained(findings: Sequence[Finding], *, more: bool = False) -> str:
    """Ranked findings in full: all that are certain, or the first where none is; what else was seen in a line each.

    `more`: with the command that explains a cause.
    """
    whole = [finding for finding in findings if finding.certain] or list(findings[:1])
    lines = [f"{each}\n  more: ris-fast why --explain {each.cause}" if more else str(each) for each in whole]
    rest = [f"also seen, less telling: {each.cause}: {each.evidence}" for each in findings if each not in whole]
    return "\n".join([*lines, *rest])
