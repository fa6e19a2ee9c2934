"""The mapping file: which array of somebody's files is which quantity of a scene, in TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ris_fast.config.schema import ConfigError
from ris_fast.config.spelling import did_you_mean
from ris_fast.data.conversion.quantities import PAIR, QUANTITIES, SCENE, Entry, Quantity
from ris_fast.files import read_text
from ris_fast.physics.random import SPLITS

SECTIONS = ("files", "split", "task", *QUANTITIES)
KEYS = ("key", "real", "imag", "value", "axes", "unit", "scale", "conjugate")
OTHER_AXES = {"element": ("vertical", "horizontal")}  # two axes in the place of one


@dataclass(frozen=True)
class FileMapping:
    """A mapping file. `patterns`: of the files of each split; `ranges`: scenes of each split, from and to, in the one
    pool; `matlab`: whether axes are those that MATLAB shows (None: for .mat files); `offset`: of the array."""

    path: Path
    entries: Mapping[str, Entry]
    patterns: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    matlab: bool | None = None
    offset: tuple[float, float] | None = None
    text: str = ""


def read_mapping(path: Path) -> FileMapping:
    """A mapping file, everything in it known and consistent. Raises: ConfigError."""
    try:
        text = read_text(path)
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Give the mapping file (--map FILE.toml), or make one with"
            " `ris-fast convert --new-map FILE.toml --data FILE`."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend that line.") from None
    for section, values in table.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise ConfigError(f"{path}: there is no section '{section}'.{did_you_mean(section, SECTIONS)}")
    entries = {name: _entry(path, name, table[name]) for name in QUANTITIES if name in table}
    _check_complete(path, entries)
    files, split = dict(table.get("files", {})), table.get("split", {})
    matlab, offset = files.pop("matlab", None), files.pop("offset", None)
    _check_files(path, files, split, matlab, offset)
    ranges = {name: (int(each[0]), int(each[1])) for name, each in split.items()}
    where = None if offset is None else (float(offset[0]), float(offset[1]))
    return FileMapping(path, entries, files, ranges, table.get("task", {}), matlab, where, text)


def _entry(path: Path, name: str, table: Mapping[str, Any]) -> Entry:
    quantity = QUANTITIES[name]
    for key in table:
        if key not in KEYS:
            raise ConfigError(f"{path}: [{name}] has no key '{key}'.{did_you_mean(key, KEYS)}")
    ways = [way for way in ("key", "real", "value") if way in table]
    if len(ways) != 1 or ("real" in table) != ("imag" in table) or ("real" in table and not quantity.complex):
        pair = ", or real and imag" if quantity.complex else ""
        raise ConfigError(
            f"{path}: [{name}] has {', '.join(ways) or 'no key'}; expected one of key{pair}, or a value for all scenes."
        )
    unit = str(table.get("unit", "" if quantity.must or not quantity.units else quantity.units[0]))
    if unit not in (quantity.units or ("",)):
        given = f"unit = '{unit}'" if unit else "no unit"
        choices = " or ".join(f"unit = '{each}'" for each in quantity.units) or "none"
        raise ConfigError(f"{path}: [{name}] has {given}; expected {choices}.")
    axes = () if "value" in table else _axes(path, name, quantity, table.get("axes"))
    try:
        plain = {key: table[key] for key in ("key", "real", "imag", "value", "scale", "conjugate") if key in table}
        entry = Entry(name, axes, unit, **plain)
        float(entry.scale), float(entry.value or 0.0)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: [{name}] has a value of another kind; expected texts, and numbers.") from None
    return entry


def _axes(path: Path, name: str, quantity: Quantity, given: Any) -> tuple[str, ...]:
    """The axes in the order of the array. One that the quantity does not need must be a number. Raises: ConfigError."""
    usual = (SCENE, *quantity.axes)
    axes = usual if given is None else tuple(str(given).replace(",", " ").split())
    known = {*usual, *([PAIR] if quantity.complex else []), *(b for a in quantity.axes for b in OTHER_AXES.get(a, ()))}
    wrong = [axis for axis in axes if axis not in known and not axis.isdigit()]
    names = [axis for axis in axes if not axis.isdigit()]
    needed = set(quantity.axes) - {"source"}
    if {"vertical", "horizontal"} <= set(axes):
        needed.discard("element")
    if wrong or len(set(names)) != len(names) or not needed <= set(names):
        said = f"'{' '.join(axes)}'"
        raise ConfigError(
            f"{path}: [{name}] has axes {said}; expected the names of all of the array's axes in their order, among"
            f" '{' '.join(sorted(known))}', or a number for one that is taken at this place."
        )
    return axes


def _check_complete(path: Path, entries: Mapping[str, Entry]) -> None:
    """Inputs, and a target. Raises: ConfigError."""
    missing = [name for name in ("snapshots", "codes", "snr") if name not in entries]
    if not {"channel", "effective_channel"} & set(entries):
        missing.append("channel (or effective_channel)")
    positions = [name for name in ("azimuth", "elevation", "range") if name in entries]
    if 0 < len(positions) < 3:
        missing += [name for name in ("azimuth", "elevation", "range") if name not in entries]
    elif not positions and "covariance" not in entries:
        missing.append("azimuth, elevation, range and power (or covariance)")
    elif positions and not {"power", "covariance"} & set(entries):
        missing.append("power (or covariance)")
    elif not positions and "count" not in entries:
        missing.append("count")
    if missing:
        raise ConfigError(f"{path}: no section [{'], ['.join(missing)}]. A scene needs it: say which array it is.")


def _check_files(path: Path, files: Mapping[str, Any], split: Mapping[str, Any], matlab: Any, offset: Any) -> None:
    """Splits are said once, with train and val among them. Raises: ConfigError."""
    texts = all(isinstance(each, str) for each in files.values())
    if not texts or not set(files) <= set(SPLITS) or (files and not {"train", "val"} <= set(files)):
        raise ConfigError(
            f"{path}: [files] has {', '.join(files)}; expected train, val and perhaps test, each the name or pattern of"
            " its files, such as train = 'train_*.mat', or none of them."
        )
    if type(matlab) not in (bool, type(None)):
        raise ConfigError(f"{path}: [files] matlab is {matlab!r}; expected true or false.")
    pairs = [*split.values(), *([] if offset is None else [offset])]
    if not all(isinstance(each, list) and len(each) == 2 for each in pairs):
        raise ConfigError(f"{path}: a range of scenes, and an offset, is two numbers, such as train = [0, 8000].")
    if split and (files or set(split) - set(SPLITS) or not {"train", "val"} <= set(split)):
        raise ConfigError(f"{path}: [split] needs train and val, perhaps test, and no files of splits beside it.")
    spans = sorted((int(a), int(b)) for a, b in split.values())
    if any(a < 0 or b <= a for a, b in spans) or any(b > c for (_, b), (c, _) in zip(spans, spans[1:])):
        raise ConfigError(f"{path}: [split] has ranges that are empty or overlap; expected [first, last + 1] of each.")
