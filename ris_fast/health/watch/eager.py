"""Hooks that run eagerly wherever they are called from, and that dynamo leaves out of what it compiles.

`torch.compiler.disable` does so by two changes of the interpreter's state in each call, compiled or not. Here only a
call that dynamo would look at pays for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import skip_code
from torch.utils.hooks import unserializable_hook

from ris_fast.health.watch.guard import guarded


def eager(function: Callable[..., None]) -> Callable[..., None]:
    """As `torch.compiler.disable`: parts what is compiled around a call."""
    disabled = torch.compiler.disable(guarded)

    @wraps(function)
    def call(*args: Any) -> None:
        if get_eval_frame_callback() is None:
            guarded(function, *args)
        else:
            disabled(function, *args)

    skip_code(call.__code__)  # one for all
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def eager_hook(function: Callable[..., None]) -> Callable[..., None]:
    """A hook for tensors or modules, which changes nothing and returns nothing.

    A compiled function that runs backward calls it uncompiled: compiled, it would be compiled anew for what it finds in
    each step. Where it would become part of a graph, as under compiled autograd and in an exported module, it is left
    out: a break would be an error under `fullgraph=True`.
    """

    def hook(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            if get_eval_frame_callback() is None:
                guarded(function, *args)
            else:
                _run(function, *args)

    return unserializable_hook(hook)


def takes_hooks(module: Any) -> bool:
    """Whether a module has hooks: one that `torch.jit.script` has compiled has none, a traced one has."""
    return not isinstance(module, torch.jit.ScriptModule) or isinstance(module, torch.jit.TracedModule)


def is_eager_hook(function: Any) -> bool:
    """Whether `eager_hook` made it."""
    return getattr(function, "__code__", None) is _CODE


@torch.compiler.disable
def _run(function: Callable[..., None], *args: Any) -> None:
    guarded(function, *args)


_CODE = eager_hook(_run).__code__  # of all these hooks
skip_code(_CODE)  # `torch.compiler.disable` would break the graphs that call it
