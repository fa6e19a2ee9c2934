"""What a user attached to a trainer: schedulers, averages and counters that hooks and replaced methods hold.

The trainer does not know of them. They are found by following functions to what they close over, name and are bound to.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

MOST = 5000  # objects that are looked at
PLAIN = (int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
CALLS = (FunctionType, MethodType, partial)
PACKAGES = ("ris_fast.", "torch.", "numpy.", "builtins", "collections", "functools")
CONTAINERS = (dict, list, set, deque)
PARTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # of a module
GENERATORS = (torch.Generator, random.Random, numpy.random.Generator)
SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


def attached(owners: Iterable[Any]) -> Iterator[Any]:
    """Objects that the hooks and the replaced methods of `owners` reach, without the owners and what belongs to
    them."""
    owners = list(owners)
    networks = [owner for owner in owners if isinstance(owner, nn.Module)]
    modules = [part for each in networks for part in (*each.modules(), *each.parameters(), *each.buffers())]
    seen = {id(owner) for owner in (*owners, *modules)}
    waiting = [each for owner in (*owners, *modules) for each in (*_calls(owner), *_keeps(owner), *_own_classes(owner))]
    while waiting and len(seen) < MOST:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (*PLAIN, ModuleType, BuiltinFunctionType)):
            continue
        if isinstance(value, type) and not _is_own_class(value):
            continue
        seen.add(id(value))
        yield value
        waiting.extend(_held(value))


def _calls(owner: Any) -> Iterator[Any]:
    """Methods that were replaced on an object, and its hooks."""
    values = getattr(owner, "__dict__", {})
    yield from (value for value in values.values() if isinstance(value, CALLS))
    names = [name for name in values if name.endswith("_hooks")]
    if isinstance(owner, Tensor):
        names = ["_backward_hooks", "_post_accumulate_grad_hooks"]
    for name in names:
        hooks = getattr(owner, name, None)
        yield from hooks.values() if isinstance(hooks, dict) else ()


def _keeps(owner: Any) -> Iterator[Any]:
    """Objects with a state of their own among an owner's attributes: generators, schedulers, helpers, and what a user's
    own class or its lists hold of them."""
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, (*GENERATORS, *SCHEDULERS, Optimizer, DataLoader)) or _is_helper(value):
            yield value
        elif isinstance(owner, nn.Module) and name not in PARTS and not name.endswith("_hooks"):
            if isinstance(value, (Tensor, numpy.ndarray, tuple, *CONTAINERS)):  # a cache that is no buffer
                yield value
        elif isinstance(value, (list, tuple, dict)) and not name.endswith("_hooks"):
            inner = value.values() if isinstance(value, dict) else value
            yield from (each for each in inner if isinstance(each, (*GENERATORS, *SCHEDULERS, Optimizer)))


def _is_helper(value: Any) -> bool:
    return hasattr(value, "__dict__") and is_users(value) and not isinstance(value, (ModuleType, type))


def _held(value: Any) -> Iterator[Any]:
    """What a function, a container or a user's own object leads to."""
    if isinstance(value, FunctionType):
        yield from (*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        yield from (*global_names(value).values(), *vars(value).values())
    elif isinstance(value, type):
        yield from class_attributes(value).values()
        yield from (each for each in vars(value).values() if isinstance(each, FunctionType))
    elif isinstance(value, CellType):
        yield from contents(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (tuple, *CONTAINERS)):
        yield from value
    elif isinstance(value, nn.Module):
        yield from (*value.children(), *value.parameters(), *value.buffers(), *_keeps(value), *_own_classes(value))
    elif isinstance(value, DataLoader):
        yield from (value.generator, value.sampler, getattr(value.sampler, "generator", None))
    elif isinstance(value, Optimizer):
        yield from (parameter for group in value.param_groups for parameter in group["params"])
        yield from (each for state in value.state.values() for each in state.values())
    elif isinstance(value, SCHEDULERS) or is_users(value):
        yield from (*getattr(value, "__dict__", {}).values(), *_own_classes(value))


def _own_classes(value: Any) -> Iterator[type]:
    """Classes of somebody's own that an object is made of: their methods name what is global."""
    yield from filter(_is_own_class, type(value).__mro__)


def _is_own_class(kind: type) -> bool:
    """A class of a script or of a project, and of no installed package."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    own = f"{kind.__module__}.".startswith("__main__.") or bool(file) and "site-packages" not in file
    return own and not _of_library(kind.__module__)


def class_attributes(owner: type) -> dict[str, Any]:
    """What is no method, no property and no name of Python's own."""
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("__") and not isinstance(value, FunctionType) and not hasattr(value, "__get__")
    }


def global_names(function: FunctionType) -> dict[str, Any]:
    """Global variables that a user's function names; of a library's functions none."""
    if (function.__module__ or "").startswith(PACKAGES):
        return {}
    return {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}


def contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not filled yet
        return ()


def is_users(value: Any) -> bool:
    """An instance of a class that somebody wrote around the trainer."""
    if _of_library(type(value).__module__) and not isinstance(value, SimpleNamespace):
        return False  # a thread, a lock or a queue lives on
    return not isinstance(value, (nn.Module, Optimizer, Tensor, *CALLS, CellType))


def _of_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names - {"__main__"} or f"{module}.".startswith(PACKAGES)
