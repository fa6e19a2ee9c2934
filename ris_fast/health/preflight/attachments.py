"""What a user attached to a trainer: schedulers, averages and counters that hooks and replaced methods hold.

The trainer does not know of them. They are found by following functions to what they close over, name and are bound to.
"""

from __future__ import annotations

import random
import sys
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
GENERATORS = (torch.Generator, random.Random, numpy.random.Generator)
SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)


def attached(owners: Iterable[Any]) -> Iterator[Any]:
    """Objects that the hooks and the replaced methods of `owners` reach, without the owners and what belongs to
    them."""
    owners = list(owners)
    networks = [owner for owner in owners if isinstance(owner, nn.Module)]
    modules = [part for each in networks for part in (*each.modules(), *each.parameters(), *each.buffers())]
    seen = {id(owner) for owner in (*owners, *modules)}
    waiting = [call for owner in (*owners, *modules) for call in (*_calls(owner), *_keeps(owner))]
    while waiting and len(seen) < MOST:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (*PLAIN, ModuleType, type, BuiltinFunctionType)):
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
        elif isinstance(value, (list, tuple, dict)) and not name.endswith("_hooks"):
            inner = value.values() if isinstance(value, dict) else value
            kinds = (*GENERATORS, *SCHEDULERS, Optimizer, *((Tensor,) if isinstance(owner, nn.Module) else ()))
            yield from (each for each in inner if isinstance(each, kinds))
        elif isinstance(owner, nn.Module) and isinstance(value, Tensor):  # a cache that is no buffer
            yield value


def _is_helper(value: Any) -> bool:
    return hasattr(value, "__dict__") and is_users(value) and not isinstance(value, (ModuleType, type))


def _held(value: Any) -> Iterator[Any]:
    """What a function, a container or a user's own object leads to."""
    if isinstance(value, FunctionType):
        yield from (*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        yield from global_names(value).values()
    elif isinstance(value, CellType):
        yield from contents(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, DataLoader):
        yield from (value.generator, value.sampler, getattr(value.sampler, "generator", None))
    elif isinstance(value, Optimizer):
        yield from (parameter for group in value.param_groups for parameter in group["params"])
        yield from (each for state in value.state.values() for each in state.values())
    elif isinstance(value, SCHEDULERS) or is_users(value):
        yield from getattr(value, "__dict__", {}).values()


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
    module = type(value).__module__
    if module.partition(".")[0] in sys.stdlib_module_names and not isinstance(value, SimpleNamespace):
        return False  # a thread, a lock or a queue lives on
    return not f"{module}.".startswith(PACKAGES) and not isinstance(
        value, (nn.Module, Optimizer, Tensor, *CALLS, CellType)
    )
