"""Other modules of the model's class, and states that are loaded into the model."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ris_fast.health.watch.copied_hook import LeftBehind
from ris_fast.health.watch.eager import takes_hooks
from ris_fast.health.watch.guard import guarded
from ris_fast.health.watch.rivals import held_by_optimizers

KEPT = 64
SIMILAR = 64  # modules that are looked at


@dataclass(frozen=True)
class CopyRecord:
    """A module of the same class with tensors of the same names and shapes, outside the model.

    Args: tensors: how many parameters it has; with_grad: those with a gradient; held: by an optimizer;
        compiled: something compiles it.
    """

    tensors: int
    with_grad: int
    held: bool
    compiled: bool


def copies_of(model: nn.Module) -> list[CopyRecord]:
    """Looks through the objects of the process. Reads nothing from a device."""
    own = {id(module) for module in model.modules()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if not shapes:
        return []
    found: list[CopyRecord] = []
    modules = [each for each in gc.get_objects() if type(each) is type(model) and id(each) not in own][:SIMILAR]
    held: set[int] | None = None
    for each in modules:
        try:
            parameters = dict(each.named_parameters())
        except AttributeError:  # is being made, or taken apart
            continue
        if {name: tuple(p.shape) for name, p in parameters.items()} != shapes:
            continue
        if any(p is q for p, q in zip(parameters.values(), model.parameters())):
            continue
        held = held_by_optimizers() if held is None else held
        found.append(
            CopyRecord(
                len(parameters),
                sum(p.grad is not None for p in parameters.values()),
                any(id(p) in held for p in parameters.values()),
                _is_compiled(each),
            )
        )
    return found


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    wrappers = [each for each in gc.get_objects() if type(each) is dynamo.OptimizedModule] if dynamo is not None else []
    return module._compiled_call_impl is not None or any(each._orig_mod is module for each in wrappers)


class ModelLoads:
    """Notes states that are loaded into the model: whether they are its own tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[bool] = []
        hooked = takes_hooks(model)
        self.hook: Any = model.register_load_state_dict_pre_hook(_LoadHook(self)) if hooked else None

    def note(self, module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
        """A state that is to be loaded."""
        own = {id(each): each for each in module.parameters()}
        places = {each.data_ptr() for each in own.values() if each.numel() and each.device.type != "meta"}
        given = [
            value
            for name, value in state.items()
            if name.startswith(prefix) and isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        ]
        if given and places and len(self.found) < KEPT and all(each.device.type != "meta" for each in given):
            kept = {each.data_ptr() for each in given}
            self.found.append(places <= kept)

    def record(self) -> list[bool]:
        return list(self.found)

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()


class _LoadHook(LeftBehind):
    """Called before a state is loaded."""

    def __init__(self, loads: ModelLoads) -> None:
        self.loads = loads

    def __call__(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        guarded(self.loads.note, module, state, prefix)
