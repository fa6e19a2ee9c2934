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
