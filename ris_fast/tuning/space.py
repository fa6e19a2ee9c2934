"""The space of settings that a study searches: a [tune] table of TOML, of keys with a range or choices."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Protocol

from ris_fast.config.load import toml_value
from ris_fast.config.schema import SECTIONS, ConfigError
from ris_fast.config.spelling import did_you_mean

TUNABLE = ("model.", "loss.", "optimizer.", "training.batch_size", "training.accumulate", "training.precision")
KEYS = ("low", "high", "log", "step", "choices")
FORM = "a range {low = 1e-4, high = 1e-2, log = true} or choices [64, 128]"


class Suggests(Protocol):
    """What is asked for values: a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool, step: float | None) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool, step: int) -> int: ...


@dataclass(frozen=True)
class Dimension:
    """The values of one setting: `choices`, or all from low to high; whole numbers where both are."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Suggests) -> Any:
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log, step=int(self.step or 1))
        return trial.suggest_float(self.key, self.low, self.high, log=self.log, step=self.step)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that say whether all of them can be used."""
        return self.choices or (self.low, self.high)

    def to_toml(self) -> str:
        if self.choices:
            return f'"{self.key}" = {toml_value(self.choices)}'
        rest = [f"log = {toml_value(True)}"] * self.log + ([f"step = {self.step!r}"] if self.step else [])
        return f'"{self.key}" = {{{", ".join([f"low = {self.low!r}", f"high = {self.high!r}", *rest])}}}'


Space = dict[str, Dimension]  # by the key of the setting


def default_space(model: str) -> Space:
    """That of a network of ours; of any other network, its optimizer and batch."""
    folder = resources.files("ris_fast.tuning").joinpath("spaces")
    file = folder.joinpath(f"{model}.toml") if model.isidentifier() else folder.joinpath("any.toml")
    return read_space(tomllib.loads((file if file.is_file() else folder.joinpath("any.toml")).read_text())["tune"])


def read_space(table: Any) -> Space:
    """The space of a [tune] table. Raises: ConfigError that names the key."""
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(f'[tune] is empty. Write a line for each setting: "section.key" = {FORM}.')
    return {key: _dimension(key, value) for key, value in _joined(table).items()}


def space_toml(space: Space) -> str:
    """The space as a [tune] table that `read_space` takes."""
    return "\n".join(["[tune]", *(each.to_toml() for each in space.values())]) + "\n"


def _joined(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """'section.key' -> value, where keys are quoted as one, dotted or in tables of their own."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{path}{key}"
        inner = isinstance(value, Mapping) and not set(value) & set(KEYS)
        found |= _joined(value, f"{name}.") if inner else {name: value}
    return found


def _dimension(key: str, value: Any) -> Dimension:
    where = f"[tune] {key}"
    if not key.startswith(TUNABLE):
        raise ConfigError(
            f"{where}: trials are compared on the same scenes, with the same budget. Tune settings of model, loss or"
            " optimizer, or training.batch_size, accumulate or precision."
        )
    if isinstance(value, Mapping) and "choices" in value:
        value = value["choices"] if set(value) == {"choices"} else value
    if isinstance(value, list):
        if len(value) < 2 or not all(isinstance(each, (bool, int, float, str)) for each in value):
            raise ConfigError(f"{where} = {value!r}: choices are a list of two values or more.")
        return Dimension(key, choices=tuple(value))
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {value!r}: expected {FORM}.")
    for name in value:
        if name not in KEYS[:-1]:
            raise ConfigError(f"{where}: a range has no '{name}'.{did_you_mean(name, KEYS)}")
    return _range(key, where, value)


def _range(key: str, where: str, value: Mapping[str, Any]) -> Dimension:
    low, high, log, step = value.get("low"), value.get("high"), value.get("log", False), value.get("step")
    if not _number(low) or not _number(high) or not low < high:
        raise ConfigError(f"{where}: expected low and high, two numbers with low < high, got {low!r} and {high!r}.")
    if not isinstance(log, bool) or (log and low <= 0):
        raise ConfigError(f"{where}: log is true or false, and a range on a log scale begins above 0.")
    if step is not None and (not _number(step) or step <= 0 or log):
        raise ConfigError(f"{where}: step is a number above 0, and has no meaning on a log scale.")
    if _kind(key) == "float":
        low, high = float(low), float(high)
    return Dimension(key, low=low, high=high, log=log, step=step)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(key: str) -> str:
    """Of a setting, as its section says; that of a network's options only the network knows."""
    section, _, name = key.partition(".")
    return next((str(item.type) for item in fields(SECTIONS[section]) if item.name == name), "")
