"""The networks and their names. A network is imported when it is built, so that naming one costs nothing."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch import nn

from ris_fast.config.schema import MODELS, ConfigError, Task, section_of
from ris_fast.config.section import typed
from ris_fast.config.spelling import did_you_mean
from ris_fast.config.user_code import is_reference
from ris_fast.models.prediction import Prediction

__all__ = ["MODELS", "Prediction", "build_model"]


def build_model(name: str, task: Task | None = None, **options: Any) -> nn.Module:
    """The network `name` for this task, fresh weights from torch's generator.

    Args: name: "backprojection", "hybrid", or one of your own, "package.module:NAME" or "path/to/file.py:NAME", which
            is made as NAME(task, **options);
        task: the scenes, RIS-12x12 if none is given;
        options: what this network can be asked for, such as width or depth.
    Returns: a module that is called with (snapshots, channel, codes, snr_db) and returns a `Prediction`.
    Raises: ConfigError naming the nearest valid name, for a model or an option that does not exist; or what a value
        must be; or what is wrong with a module of your own.
    """
    task = Task() if task is None else section_of("build_model", "task", task, Task)
    if isinstance(name, str) and is_reference(name):
        from ris_fast.models.own import own_network

        return own_network(name, task, options)
    if not isinstance(name, str) or name not in MODELS:
        raise ConfigError(f"build_model: there is no model '{name}'.{did_you_mean(str(name), MODELS)}")
    model = getattr(import_module(f"ris_fast.models.{name}"), name.capitalize())
    known = {key: str(each.annotation) for key, each in inspect.signature(model).parameters.items() if key != "task"}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"build_model: model '{name}' has no option '{key}'.{did_you_mean(key, known)}")
        options[key] = typed(known[key], value, f"build_model: {name}'s {key}")
    return model(task, **options)
