"""Names of earlier versions. Each still works, for one release, and one line says what it is called now.

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PRESETS = {"seed": "original"}
CAUSES = {"stalled_at_floor": "stalled_at_baseline"}
SETTINGS = {
    "health.mute": CAUSES,
    "model.options.inputs": {"collapsed": "effective_channel", "backprojection": "channel"},
}  # words in their values
RETIRED = {  # settings that are read and not used: what takes their place
    "report.checkpoint_epochs": "the last checkpoint is written every report.checkpoint_seconds and at the end",
}
MODULES = {  # of names that people import, and that pickled objects refer to
    "cli": "commands.cli",
    "evaluation": "commands.evaluate",
    "settings": "config.load",
    "health.watchdog": "health.monitor.watchdog",
    "health.watched": "health.monitor.attach",
    "physics.floors": "physics.baselines",
    "physics.pairs": "physics.real_complex",
    "training.loop": "training.trainer",
    "training.optimizer": "training.optim.fused_adamw",
    "training.sample": "physics.least_squares",
    "training.terms": "training.loss_terms",
}
REPLACED = {  # a parameter that only a network of an earlier version has: what became of that network
    "y_mix.weight": "it is network 'hybrid' of an earlier version, which did not learn and was replaced: train anew, or"
    " use the version that made it."
}
RESHAPED = {  # a parameter whose shape an earlier version of its network had otherwise
    "stem.weight": "Where the settings are the run's own, an earlier version made it, whose pursuit gave the network"
    " other features: train anew, or use the version that made it.",
}
KEYS = {  # of metrics.jsonl, summary.json and evaluation.json
    "floors": "baselines",
    "bayes": "mmse_bound",
    "share_of_ceiling": "mfu",
    "ceiling_flop_per_s": "peak_matmul_flop_per_s",
    "groups_read": "optimizer_batches",
    "asleep": "modules_in_eval_mode",
    "first_asleep": "first_module_in_eval_mode",
    "answers": "prediction_hash",
    "left_over": "residual_grad_norm",
    "between_epochs": "weight_drift_between_epochs",
    "around_validation": "weight_drift_in_validation",
}


class OldNameWarning(FutureWarning):
    """A name of an earlier version was used; the message says what it is called now."""


def current_preset(name: str) -> str:
    """The preset's name today. Warns: OldNameWarning for an old one."""
    return _current(name, PRESETS, "preset")


def current_cause(name: str) -> str:
    """The cause's name today. Warns: OldNameWarning for an old one."""
    return _current(name, CAUSES, "cause")


def current_setting(key: str, value: Any) -> Any:
    """The value of the setting 'section.key' in today's words. Warns: OldNameWarning for an old one."""
    names = SETTINGS.get(key, {})
    for old in names if isinstance(value, str) else ():
        if old in value.replace(",", " ").split():
            value = value.replace(old, _current(old, names, f"{key} ="))
    return value


def retired_setting(key: str) -> bool:
    """Whether the setting 'section.key' has no effect any more. Warns: OldNameWarning, with what takes its place."""
    if key not in RETIRED:
        return False
    _warn(f"{key} has no effect any more: {RETIRED[key]}", 3)
    return True


def current_origin(origin: str) -> str:
    """'preset seed', in the provenance of an old config.toml, as it is called today."""
    kind, _, name = origin.partition(" ")
    return f"preset {PRESETS[name]}" if kind == "preset" and name in PRESETS else origin


def current_names(value: Any, text: str, where: object) -> Any:
    """A value of JSON with today's keys and causes at every depth.

    Args: text: what `value` was parsed from, so that a file without old names costs a look at its text only; where: the
        file, for the message. Warns: OldNameWarning, one line for the whole file.
    """
    if not any(f'"{old}"' in text for old in (*KEYS, *CAUSES)):
        return value
    if found := dict(_old_names(value)):
        renamed = ", ".join(f"{old} -> {new}" for old, new in sorted(found.items()))
        _warn(f"{where} is from an earlier version and is read with the names of this one: {renamed}", 5)
    return _renamed(value)


def with_old_keys(value: Any) -> Any:
    """A report with the keys of earlier versions beside today's, at every depth."""
    if isinstance(value, Mapping):
        value = {key: with_old_keys(each) for key, each in value.items()}
        return {**{old: value[new] for old, new in KEYS.items() if new in value}, **value}
    return value


def renamed_field(kind: type, old: str, new: str) -> None:
    """Makes `old` work on a dataclass, with a warning: as an argument of its constructor and as an attribute."""
    construct, said = kind.__init__, f"{kind.__name__}.{old} is called {new} now"

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if old in kwargs:
            _warn(said, 3)
            kwargs[new] = kwargs.pop(old)
        construct(self, *args, **kwargs)

    def read(self: Any) -> Any:
        _warn(said, 3)
        return getattr(self, new)

    def __setstate__(self: Any, state: Mapping[str, Any]) -> None:  # of an object that an earlier version pickled
        vars(self).update({new if name == old else name: value for name, value in state.items()})

    kind.__init__, kind.__setstate__ = __init__, __setstate__  # type: ignore[misc, attr-defined]
    setattr(kind, old, property(read, doc=f"The name of `{new}` in earlier versions."))


def _current(name: str, names: Mapping[str, str], what: str) -> str:
    if name not in names:
        return name
    _warn(f"{what} '{name}' is called '{names[name]}' now", 5)
    return names[name]


def _warn(text: str, level: int) -> None:
    """`level`: of the caller that used the old name, counted from here."""
    warnings.warn(text, OldNameWarning, stacklevel=level)


def _old_names(value: Any) -> Iterator[tuple[str, str]]:
    """(old, new) of every old key and cause in a value of JSON, at every depth."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key in KEYS:
                yield key, KEYS[key]
            yield from _old_names(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _old_names(each)
    elif isinstance(value, str) and value in CAUSES:
        yield value, CAUSES[value]


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        score = {"asleep": "in_eval_mode"} if "answers" in value else {}
        return {(KEYS | score).get(key, key): _renamed(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(each) for each in value]
    return CAUSES.get(value, value) if isinstance(value, str) else value


class OldModules:
    """Finds a module under the name that it had in earlier versions, where nothing else finds it, with a warning."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, cls()) if package == "ris_fast" and old in MODULES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"ris_fast.{MODULES[spec.name.partition('.')[2]]}"
        _warn(f"module {spec.name} is called {new} now", 3)
        module = import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # it stays the module of its new name


def find_old_modules() -> None:
    """Makes OldModules the last place that Python looks for a module in."""
    if OldModules not in sys.meta_path:
        sys.meta_path.append(OldModules)  # type: ignore[arg-type]
