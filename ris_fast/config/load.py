"""Puts a configuration together from defaults, a preset, a TOML file, `--set` and flags, and remembers who said
what."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from importlib import resources
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

from ris_fast.config.schema import CONTENTS, SECTIONS, Config, ConfigError, Task
from ris_fast.config.section import typed
from ris_fast.config.spelling import closest, did_you_mean
from ris_fast.files import read_text
from ris_fast.old_names import current_preset, current_setting, retired_setting

MANIFEST = "manifest.json"  # of a data set that `ris-fast simulate` has written
PRESETS = ("laptop", "full", "original")


def load_config(
    path: str | Path | None = None,
    preset: str | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The resolved configuration; later layers win: defaults < preset < the data set's own task < file < --set < flags.

    Args: path: TOML file with settings;
        preset: "laptop", "full" or "original"; by default the file's, else laptop on a CPU and full on a GPU;
        overrides: 'section.key=value' strings, as `--set` takes them;
        flags: 'section.key' to a value (None: not given).
    Raises: ConfigError for a file that cannot be read and for an unknown preset, section, key or value.
    """
    overrides = _checked(path, overrides, flags)
    table = read_toml(Path(path)) if path else {}
    named = table.pop("preset", None)
    table.pop("tune", None)  # the space of `ris-fast tune`
    given = [
        (str(path), _flatten(table, str(path))),
        ("--set", dict(_parse_override(text) for text in overrides)),
        ("flag", {key: value for key, value in (flags or {}).items() if value is not None}),
    ]
    devices = [layer["training.device"] for _, layer in given if "training.device" in layer]
    name = current_preset(preset or named or default_preset(devices[-1] if devices else None))
    layers = [
        (f"preset {name}", _flatten(read_preset(name), f"preset {name}")),
        ("data set", _task_of_data(given)),
        *given,
    ]
    values: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    for origin, layer in layers:
        _forget_contents(values, provenance, layer)
        for key, value in layer.items():
            if retired_setting(key):
                continue
            _merge(values, _known(key, origin), current_setting(key, value), origin)
            provenance[key] = origin
    return _build(name, values, provenance)


def _task_of_data(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """'task.key' -> value of the data set at data.path, where it is one of ours; a setting that contradicts is the
    reader's to refuse."""
    said = {key: value for _, layer in layers for key, value in layer.items() if key in ("data.path", "data.source")}
    if not said.get("data.path") or said.get("data.source", "auto") not in ("auto", "shards"):
        return {}
    try:
        table = json.loads((Path(said["data.path"]) / MANIFEST).read_text(encoding="utf-8"))["task"]
        task = Task(**{item.name: table[item.name] for item in fields(Task) if item.name in table})
    except (OSError, ValueError, TypeError, KeyError):  # no data set of ours, or a damaged one: its reader says which
        return {}
    return {f"task.{name}": value for name, value in asdict(task).items()}


def _checked(path: Any, overrides: Any, flags: Any) -> list[str]:
    """The overrides as a list. Raises: ConfigError where an argument of `load_config` is of another kind."""
    given = list(overrides) if isinstance(overrides, Iterable) and not isinstance(overrides, (str, Mapping)) else [None]
    if not all(isinstance(each, str) for each in given):
        instead = [overrides] if isinstance(overrides, str) else "['section.key=value', ...]"
        raise ConfigError(
            f"load_config: overrides is {overrides!r}, expected a list of 'section.key=value'. Pass"
            f" overrides={instead}; a table of keys and values is flags={{...}}."
        )
    if not isinstance(flags, (Mapping, NoneType)):
        raise ConfigError(f"load_config: flags is {flags!r}, expected a table of 'section.key' and value.")
    if not isinstance(path, (str, PathLike, NoneType)):
        raise ConfigError(f"load_config: path is {path!r}, expected the path of a TOML file.")
    return given


def default_preset(device: str | None) -> str:
    """`full` where a GPU will be used, else `laptop`."""
    if device is not None and device != "auto":
        return "full" if str(device).startswith("cuda") else "laptop"
    import torch

    return "full" if torch.cuda.is_available() else "laptop"


def read_preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ConfigError(f"There is no preset '{name}'.{did_you_mean(name, PRESETS)}")
    return tomllib.loads(resources.files("ris_fast.config").joinpath("presets", f"{name}.toml").read_text())


def render_toml(config: Config) -> str:
    """The configuration as TOML that `load_config` reads back, each line with where its value came from."""
    lines = [f'preset = "{config.preset}"']
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        values = getattr(config, section)
        for item in fields(values):
            value = getattr(values, item.name)
            if item.name == "options":
                lines += [
                    _line(f"options.{key}", each, _origin(config, f"model.options.{key}", "model.options"))
                    for key, each in value.items()
                ]
            else:
                lines.append(_line(item.name, value, _origin(config, f"{section}.{item.name}")))
    return "\n".join(lines) + "\n"


def plain_settings(config: Config) -> dict[str, Any]:
    """'section.key' -> plain value of every setting, as `load_config` takes them for flags."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        for key, value in asdict(getattr(config, section)).items():
            found |= (
                {f"model.options.{name}": each for name, each in value.items()}
                if key == "options"
                else {f"{section}.{key}": value}
            )
    return json.loads(json.dumps(found))


def _origin(config: Config, *keys: str) -> str:
    return next((config.provenance[key] for key in keys if key in config.provenance), "default")


def _line(key: str, value: Any, origin: str) -> str:
    return f"{key} = {toml_value(value)}".ljust(40) + f"  # {origin}"


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # otherwise TOML's escapes are JSON's
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(each) for each in value) + "]"
    return repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises: ConfigError."""
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder. Give a TOML file, such as the config.toml of a run.")
    if not path.is_file():
        raise ConfigError(f"There is no configuration file '{path}'. Give a TOML file, or a preset with --preset.")
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a TOML file that can.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend that line.") from error


def _flatten(table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in table.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: '{section} = {values}' is outside a section.{_home_of(section)}")
        for key, value in values.items():
            if section == "model" and key == "options" and isinstance(value, Mapping):
                flat.update({f"model.options.{name}": each for name, each in value.items()})
            else:
                flat[f"{section}.{key}"] = value
    return flat


def _home_of(key: str) -> str:
    """Where a key outside a section belongs."""
    if key in SECTIONS:
        return f" {key} is a section: write [{key}] on a line of its own, and its keys below it."
    if homes := [section for section, names in _names().items() if key in names]:
        return f" Write it below [{homes[0]}]."
    return did_you_mean(key, ("preset", *SECTIONS))


def _names() -> dict[str, list[str]]:
    return {section: [item.name for item in fields(kind)] for section, kind in SECTIONS.items()}


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set {text}: expected section.key=value, such as training.batch_size=64.")
    try:
        return key.strip(), tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw


def _known(key: str, origin: str) -> str:
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        raise ConfigError(f"{origin}: there is no section '{section}'.{did_you_mean(section, SECTIONS)}")
    names = _names()[section]
    if name.partition(".")[0] not in names or ("." in name and not key.startswith("model.options.")):
        raise ConfigError(f"{origin}: [{section}] has no key '{name}'.{_elsewhere(section, name)}")
    return key


def _elsewhere(section: str, name: str) -> str:
    """What a key that its section lacks may mean: the same name elsewhere, a near one here, one that speaks of it."""
    everything = {f"{home}.{key}": key for home, names in _names().items() for key in names}
    if same := [f"'{key}'" for key, end in everything.items() if end == name]:
        return f" Did you mean {' or '.join(same)}?"
    if near := closest(name, _names()[section], 0.6):
        return f" Did you mean '{near}'?"
    described = {
        f"{home}.{item.name}": f"{item.name.replace('_', ' ')} {item.metadata['help']}"
        for home, kind in SECTIONS.items()
        for item in fields(kind)
    }
    if speak := [f"'{key}'" for key, text in described.items() if f" {name.replace('_', ' ')} " in f" {text} "]:
        return f" Did you mean {' or '.join(speak[:4])}?"
    near = closest(name, everything.values(), 0.75)
    return did_you_mean(name, _names()[section]) if near is None else _elsewhere(section, near)


def _merge(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    section, _, name = key.partition(".")
    if key.startswith("model.options."):
        options = values.setdefault("model", {}).setdefault("options", {})
        options[name.partition(".")[2]] = value
        return
    table = values.setdefault(section, {})
    if key == "model.name" and table.get("name", value) != value:
        table.pop("options", None)  # another network: the options of the first one do not apply
    kind = next(str(item.type) for item in fields(SECTIONS[section]) if item.name == name)
    table[name] = typed(kind, value, f"{origin}: {key}")


def _forget_contents(values: dict[str, Any], provenance: dict[str, str], layer: Mapping[str, Any]) -> None:
    """A layer that names a file or a function means what lies there now, not what an earlier layer knew of another."""
    for place, contents in CONTENTS.items():
        for name in contents if f"task.{place}" in layer else ():
            values.get("task", {}).pop(name, None)
            provenance.pop(f"task.{name}", None)


def _build(name: str, values: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, str]) -> Config:
    sections = {key: SECTIONS[key](**entries) for key, entries in values.items()}
    found = {
        f"task.{name}": provenance[f"task.{place}"]
        for place, contents in CONTENTS.items()
        for name in contents
        if f"task.{place}" in provenance
    }
    return Config(preset=name, provenance={**found, **provenance}, **sections)
