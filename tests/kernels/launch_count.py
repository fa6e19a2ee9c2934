"""Counts what code would launch on a GPU, and the bytes it would move, with all tensors on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", "lift_fresh", "expand", "alias")


@dataclass
class Launches:
    """Names and bytes of kernels in their order; a tensor argument counts once in each, whether read or written."""

    made: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )  # Triton's: kernel, arguments

    def __len__(self) -> int:
        return len(self.made)

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.made)

    def note(self, name: str, arguments: Any) -> None:
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        self.made.append((name, sum({id(each): occupied(each) for each in tensors}.values())))


def occupied(x: Tensor) -> int:
    """Bytes that a tensor's entries occupy; expanded axes occupy none."""
    entries = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        entries *= size if stride else min(size, 1)
    return entries * x.element_size()


class _Operations(TorchDispatchMode):
    """Every operation of torch that is neither a view nor an allocation is one kernel."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.name().removeprefix("aten::")
        views = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if not views and name.split(".")[0] not in NO_KERNEL:
            self.launches.note(name, (args, kwargs, out))
        return out


@contextmanager
def counted(monkeypatch: Any) -> Iterator[Launches]:
    """Triton kernels are noted instead of launched; operations of torch run on their own device."""
    from triton.runtime.jit import JITFunction

    launches = Launches()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.note(self.fn.__name__, args)
        launches.calls.append((self, args, options))

    with monkeypatch.context() as patch, _Operations(launches):
        patch.setattr(JITFunction, "run", note)
        yield launches


def on_meta(value: Any) -> Any:
    """Tensors of nested arguments on the meta device."""
    if isinstance(value, (list, tuple)):
        return type(value)(on_meta(each) for each in value)
    return value.to("meta") if isinstance(value, Tensor) else value
