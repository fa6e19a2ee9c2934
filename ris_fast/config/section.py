"""What a section of the configuration is made of: options with help, choices and a range, checked on construction.

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any

from ris_fast.config.spelling import closest
from ris_fast.exit_codes import USAGE

LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 3.4e38  # what an int64 and a float32 hold
SMALLEST_FLOAT = 2.0**-126  # the smallest float32 of full precision; FusedAdamW takes no epsilon below it
KINDS: dict[str, tuple[tuple[type, ...], Callable[[Any], Any], str]] = {
    "int": ((Integral,), int, "a whole number"),
    "float": ((Real,), float, "a number"),
    "bool": ((bool,), bool, "true or false"),
    "str": ((str, os.PathLike), os.fspath, "text"),
    "Mapping[str, Any]": (
        (Mapping,),
        lambda table: {key: _plain(value) for key, value in table.items()},
        "a table of names and values",
    ),
}


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, what was given and what would do. Exit code 2."""

    exit_code = USAGE


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    compare: bool = True,
) -> Any:
    """A setting. Args: compare: whether sections that differ in it alone are different ones."""
    rule = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, compare=compare, metadata=rule)


def typed(kind: str, value: Any, where: str) -> Any:
    """The value as Python's own int, float, bool, str or dict: numpy's numbers are numbers, a path is text.

    Raises: ConfigError with what was given and what a setting of this `kind` expects.
    """
    accepted, plain, expected = KINDS[kind]
    if isinstance(value, accepted) and (kind == "bool" or not isinstance(value, bool)):
        return plain(value)
    raise ConfigError(f"{where} = {value!r} ({type(value).__name__}): expected {expected}.{_meant(kind, value)}")


def _plain(value: Any) -> Any:
    """An option of a network, whose kind only the network knows."""
    number = next((kind for kind in ("int", "float") if isinstance(value, KINDS[kind][0])), None)
    return value if number is None or isinstance(value, bool) else KINDS[number][1](value)


def _meant(kind: str, value: Any) -> str:
    """' Did you mean ...?' where the value says in another way what this kind of setting can hold."""
    word = str(value).strip().lower()
    if kind == "bool" and word in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        return f" Did you mean {'true' if word in ('true', 'yes', 'on', '1') else 'false'}?"
    try:
        number = float(word)
    except ValueError:
        return ""
    if kind == "float" and abs(number) <= LARGEST_FLOAT:
        return f" Did you mean {number!r}?"
    return f" Did you mean {int(number)}?" if kind == "int" and number.is_integer() else ""


class Section:
    """Checks type, choices and range of every field once, when the section is built."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            where = f"{type(self).__name__.lower()}.{item.name}"
            value = typed(str(item.type), getattr(self, item.name), where)
            object.__setattr__(self, item.name, value)  # frozen: this is its construction
            _check(where, value, item.metadata)


def _check(where: str, value: Any, rule: Mapping[str, Any]) -> None:
    if rule["choices"] and value not in rule["choices"]:
        near = closest(value, rule["choices"])
        raise ConfigError(
            f"{where} is {value!r}; it must be one of: {', '.join(rule['choices'])}."
            + (f" Did you mean '{near}'?" if near else "")
        )
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:  # NaN compares false
        raise ConfigError(f"{where} = {value} is not a finite number in single precision. Give one that is.")
    low, high = rule["low"], LARGEST_INT if rule["high"] is None else rule["high"]
    if low is not None and value < low:
        raise ConfigError(f"{where} = {value} is too small; it must be at least {low}.")
    if value > high and (isinstance(value, int) or rule["high"] is not None):
        raise ConfigError(f"{where} = {value} is too large; it must be at most {high}.")
