"""Did you mean ...?

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known spelling nearest to `word`, whatever the case of its letters; None where none is near."""
    folded = {each.casefold(): each for each in known}
    found = difflib.get_close_matches(str(word).casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest known spelling, or ' There are: ...' with all of them."""
    known = list(known)
    near = closest(word, known)
    return f" Did you mean '{near}'?" if near else f" There are: {', '.join(known)}."


def words(text: str) -> tuple[str, ...]:
    """Names with commas or spaces between them."""
    return tuple(text.replace(",", " ").split())
