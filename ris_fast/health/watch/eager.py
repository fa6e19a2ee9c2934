"""Hooks that run eagerly wherever they are called from, and that dynamo leaves out of what it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import skip_code
from torch.utils.hooks import unserializable_hook


@torch.compiler.disable
def _run(function: Callable[..., None], *args: Any) -> None:
    function(*args)


def eager_hook(function: Callable[..., None]) -> Callable[..., None]:
    """A hook for tensors or modules, which changes nothing and returns nothing.

    A compiled function that runs backward calls it uncompiled: compiled, it would be compiled anew for what it finds in
    each step. Where it would become part of a graph, as under compiled autograd and in an exported module, it is left
    out: a break would be an error under `fullgraph=True`.
    """

    def hook(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            _run(function, *args)

    # `torch.compiler.disable` would break the graphs that call it.
    skip_code(hook.__code__)
    return unserializable_hook(hook)
