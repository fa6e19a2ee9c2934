"""What a model's modules are set to, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NormRecord:
    """A normalisation with running statistics. `share`: of the first statistics that is left in them."""

    name: str
    momentum: float
    batches: int
    share: float
    training: bool


@dataclass(frozen=True)
class AlikeUnits:
    """`axis`: 0 for rows, 1 for columns; groups, later: how many of those that have moved are equal, of each kind of
    them, after some steps and now."""

    name: str
    axis: int
    groups: list[int]
    later: list[int]

    @property
    def stay(self) -> bool:
        """Whether all are equal after some steps, or all of some parts of one size, such as the gates of a cell; that
        alone sets them apart from labels that never occur. Rounding may tell some apart later."""
        parts = len(self.groups) == 1 or 4 <= max(self.groups) <= 2 * min(self.groups)
        return parts and 2 * len(self.later) <= max(2, sum(self.later))


@dataclass
class ModulesRecord:
    """Args: dropouts: rates of those that were called; norms: called ones with running statistics; untracked: called
    ones that never keep any; repeated: a container's name, the first name of a part that it has several times, and how
    often; named_twice: both names of a part that a module has as two attributes."""

    dropouts: dict[str, float] = field(default_factory=dict)
    norms: list[NormRecord] = field(default_factory=list)
    untracked: list[str] = field(default_factory=list)
    repeated: list[tuple[str, str, int]] = field(default_factory=list)
    named_twice: list[tuple[str, str]] = field(default_factory=list)
