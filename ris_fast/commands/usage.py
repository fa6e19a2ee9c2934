"""What the parser of the command line needs of us: whole numbers as people write them, and its errors in a user's
words."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise

from cyclopts import CycloptsError, Token, UnusedCliTokensError

TAKE_SETTINGS = ("train", "check", "simulate", "convert", "predict", "tune")
SETTINGS_FILE = re.compile(
    r'Unknown (?:option|command):? "?(?:(?:--config|-c)(?:=[^"]*?)?|([^-"][^"]*\.toml))"?\.(?!\w)'
)

SETTING = re.compile(r"\w+\.[\w.]+=")


def whole_number(_: type, tokens: Sequence[Token]) -> int:
    """1000 and 1e3 are whole numbers, 1.5 is not; the parser's own rule would round it."""
    text = tokens[0].value
    try:
        return int(text)  # a float would round what is beyond 2^53
    except ValueError:
        value = _float(text)
    if not value.is_integer():
        raise ValueError(f"'{text}' is not a whole number")
    return int(value)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def whole_number_or_auto(kind: type, tokens: Sequence[Token]) -> int | str:
    """`auto`, or a whole number."""
    try:
        return "auto" if tokens[0].value == "auto" else whole_number(kind, tokens)
    except ValueError as error:
        raise ValueError(f"{error}, nor auto") from None


def whole_number_or_word(kind: type, tokens: Sequence[Token]) -> int | str:
    """A whole number where the text is one of digits, else the word itself."""
    text = tokens[0].value
    return text if text.isalpha() else whole_number(kind, tokens)


def empty_value(tokens: Sequence[str]) -> str | None:
    """What is wrong with an empty argument, which as a path would be the current folder; None where there is none."""
    for before, token in zip(("", *tokens), tokens):
        if token == "" or re.fullmatch(r"--[\w-]+=", token):
            name = token.rstrip("=") or (before if before.startswith("--") else "an argument")
            return f"{name} is empty. Give a value; perhaps a shell variable is not set. The current folder is '.'."
    return None


def without_set(tokens: Sequence[str]) -> str | None:
    """The advice where settings are given without --set, as in `--set a.b=1 c.d=2`; None where none does."""
    lonely = [
        word
        for before, word in pairwise(tokens)
        if SETTING.match(word) and not before.startswith("-") and not os.path.lexists(word)
    ]
    if not lonely or tokens[0] not in TAKE_SETTINGS:
        return None
    return f"--set takes one setting and is repeated for each. Write: {' '.join(f'--set {word}' for word in lonely)}"


def usage_message(error: CycloptsError) -> str:
    """The parser's message; where it has no near miss to offer, what the command takes."""
    text, chain = str(error), " ".join(error.command_chain or ())
    if isinstance(error, UnusedCliTokensError):
        text = f"Too many arguments: {' '.join(error.unused_tokens or ())}."
    if chain in ("", *TAKE_SETTINGS) and (found := SETTINGS_FILE.match(text)):
        return (
            f"{found[0]} A file with settings is given without an option: ris-fast {chain or 'train'}"
            f" {found[1] or 'FILE.toml'}"
        )
    if "Did you mean" in text or "Available commands" in text or error.app is None:
        return text
    return f"{text.rstrip('.')}. Try: ris-fast {chain + ' ' if chain else ''}--help"
