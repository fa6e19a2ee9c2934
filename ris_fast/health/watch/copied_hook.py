"""Hooks on modules that leave nothing of ours in a copy of the model, pickled or not."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import nn

from ris_fast.health.watch.guard import guarded

is_compiling, is_tracing, peek_interpreter_stack, current_graph_task = (
    torch.compiler.is_compiling,
    torch._C._is_tracing,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._current_graph_task_id,
)


class LeftBehind:
    """In a copy of what holds it, it is a function that takes any arguments and returns None."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class CopiedHook(LeftBehind):
    """A hook that does nothing within a compiled function."""

    def __init__(self, call: Any, again: Any = None) -> None:
        """`call`: a method; `again`: the one of the same object that is called instead where a backward pass computes a
        part once more."""
        self.owner, self.function = weakref.ref(call.__self__), call.__func__
        self.again = again.__func__ if again is not None else None

    def __call__(self, module: nn.Module, *given: Any) -> None:
        if is_compiling() or is_tracing() or peek_interpreter_stack():
            return
        function = self.function if current_graph_task() == -1 else self.again
        if function is not None and (owner := self.owner()) is not None:
            guarded(function, owner, module, *given)
