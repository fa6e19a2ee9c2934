"""Reads the graph of a loss: the leaves that it reaches, the operators on the way, and where a value left the graph."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ZERO_DERIVATIVE = ("Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside")
OWN_OPERATORS = "ris_fast.kernels"


@dataclass(frozen=True)
class Graph:
    """Leaves by identity, and the operators between them and the loss."""

    leaves: dict[int, Tensor]
    operators: list[Any]

    def named(self, *beginnings: str) -> list[str]:
        """Operators whose name starts with one of these."""
        return sorted({node.name() for node in self.operators if node.name().startswith(beginnings)})

    @property
    def written_by_hand(self) -> list[str]:
        """torch.autograd.Function classes that are not the project's own kernels."""
        classes = {type(node) for node in self.operators if isinstance(node, torch.autograd.function.BackwardCFunction)}
        return sorted({each._forward_cls.__qualname__ for each in classes
                       if not each._forward_cls.__module__.startswith((OWN_OPERATORS, "kernels", "torch"))})


def graph_of(value: Tensor) -> Graph:
    """Every node behind `value`, once."""
    leaves: dict[int, Tensor] = {}
    operators, seen, waiting = [], set(), [value.grad_fn] if value.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        else:
            operators.append(node)
        waiting.extend(child for child, _ in node.next_functions)
    return Graph(leaves, operators)


class Exits(TorchFunctionMode):
    """Notes the calls through which a tensor that needs a gradient becomes a number, an array or a copy without one."""

    def __init__(self) -> None:
        super().__init__()
        self.detached: list[str] = []
        self.rebuilt: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", str(function))
        tracked = any(isinstance(each, Tensor) and each.requires_grad for each in args)
        if tracked and name in ("item", "tolist", "numpy", "__float__", "__array__"):
            self.rebuilt.append(f"{name} at {_place()}")
        elif tracked and name in ("detach", "detach_") or tracked and name == "__get__" and _is_data(function):
            self.detached.append(f"{name} at {_place()}")
        elif name in ("tensor", "as_tensor", "from_numpy"):
            self.rebuilt.append(f"torch.{name} at {_place()}")
        return function(*args, **(kwargs or {}))


def _is_data(function: Any) -> bool:
    return getattr(function, "__self__", None) is Tensor.__dict__.get("data", Tensor.data)


def _place() -> str:
    """The innermost line outside of torch and of this file."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and not frame.filename.endswith("health/autograd.py"):
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return "an unknown line"

