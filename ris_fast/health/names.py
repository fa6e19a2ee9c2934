"""Names that a person writes into health.mute and health.frozen: one that means nothing is refused, not ignored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ris_fast.config.schema import ConfigError
from ris_fast.config.spelling import did_you_mean
from ris_fast.health.causes import CAUSES
from ris_fast.old_names import current_cause


def known_causes(names: Iterable[str], setting: str) -> frozenset[str]:
    """The names as a set. Raises: ConfigError for one that is no cause, which would mute nothing; `setting`: where it
    was written."""
    names = frozenset(map(current_cause, names))
    for name in sorted(names - CAUSES.keys()):
        raise ConfigError(f"{setting}: there is no cause '{name}'.{did_you_mean(name, CAUSES)}")
    return names


def begins(name: str, beginnings: Sequence[str]) -> bool:
    """Whether a name begins with one of these. A number ends where its digits do: 'net.10' does not begin with
    'net.1'."""
    for beginning in beginnings:
        if name.startswith(beginning) and not (beginning[-1:].isdigit() and name[len(beginning) :][:1].isdigit()):
            return True
    return False


def check_beginnings(beginnings: Sequence[str], parameters: Sequence[str], setting: str) -> None:
    """Raises: ConfigError for the beginning of no parameter's name, which would freeze nothing; `setting`: where it was
    written."""
    for beginning in beginnings:
        if not any(begins(name, [beginning]) for name in parameters):
            parts = dict.fromkeys(name.partition(".")[0] for name in parameters)
            raise ConfigError(
                f"{setting}: no parameter's name begins with '{beginning}'.{did_you_mean(beginning, parts)}"
            )
