"""Reads the graph of a loss: the leaves that it reaches, the operators on the way, and where a value left the graph."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ris_fast.kernels

ZERO_DERIVATIVE = ("Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside")
DISCRETE = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "argmin", "argmax", "bernoulli")
CHOICES = ("gt", "ge", "lt", "le", "max", "min", "topk", "sort", "one_hot", "multinomial")  # of what has a gradient
SAMPLE = "gumbel_softmax"  # of torch: straight through where it is hard, in a function that no mode looks into
NUMBERS = ("item", "tolist", "__float__")
OWN_OPERATORS = "ris_fast.kernels"
HERE = str(Path(__file__).parent)
KERNELS = ris_fast.kernels.__path__[0]


@dataclass(frozen=True)
class Graph:
    """Leaves by identity, and the operators between them and the loss."""

    leaves: dict[int, Tensor]
    operators: list[Any]

    def named(self, *beginnings: str) -> list[str]:
        """Operators whose name starts with one of these."""
        return sorted({node.name() for node in self.operators if node.name().startswith(beginnings)})

    @property
    def functions_by_hand(self) -> list[type]:
        """torch.autograd.Function classes that are not the project's own kernels."""
        classes = {type(node) for node in self.operators if isinstance(node, torch.autograd.function.BackwardCFunction)}
        return [
            each._forward_cls
            for each in classes
            if not each._forward_cls.__module__.startswith((OWN_OPERATORS, "kernels", "torch"))
        ]

    @property
    def written_by_hand(self) -> list[str]:
        """Their names."""
        return sorted({each.__qualname__ for each in self.functions_by_hand})


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


SATURATING = ("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Hardtanh", "Hardsigmoid", "Gelu", "Silu", "Erf", "Clamp")


def flattened_at(
    value: Tensor, names: tuple[str, ...] = SATURATING, before: float = 0.5, after: float = 0.1
) -> list[str]:
    """Operators that have ends behind `value` at which most of the gradient's numbers become exactly zero, first those
    nearest to the output. Args: before, after: shares of numbers that are not zero, at least and at most."""
    found: list[str] = []

    def look(node: Any, given: tuple, arrived: tuple) -> None:
        shares = [
            float((each != 0).float().mean()) if isinstance(each, Tensor) and each.numel() else 0.0
            for each in (arrived[0], next((one for one in given if one is not None), None))
        ]
        if shares[0] > before and shares[1] < after * shares[0]:
            found.append(node.name().removesuffix("Backward0"))

    nodes = [node for node in graph_of(value).operators if node.name().startswith(SATURATING)]
    handles = [node.register_hook(lambda given, arrived, node=node: look(node, given, arrived)) for node in nodes]
    try:
        leaves = [each for each in graph_of(value).leaves.values() if each.requires_grad]
        torch.autograd.grad(value, leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


class Exits(TorchFunctionMode):
    """Notes the calls through which a tensor that needs a gradient becomes a number, an array or a copy without one.

    `straight_through`: what is stopped is a rounding or a choice, as of a straight-through estimator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.detached: list[str] = []
        self.rebuilt: list[str] = []
        self.rounds = False  # in what was detached
        self.discrete: set[tuple[str, str]] = set()  # functions that round or choose
        self.stopping: set[tuple[str, str]] = set()  # functions that detach, or compute without grad

    @property
    def straight_through(self) -> bool:
        return self.rounds or bool(self.discrete & self.stopping)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", str(function))
        tracked = any(isinstance(each, Tensor) and each.requires_grad for each in args)
        if _function()[0].startswith(KERNELS):
            return function(*args, **(kwargs or {}))  # the product's own operators have backwards of their own
        if tracked and name in ("item", "tolist", "numpy", "__float__", "__array__"):
            self.rebuilt.append(f"{name} at {location()}")
        elif tracked and name in ("detach", "detach_") or tracked and name == "__get__" and _is_data(function):
            self.detached.append(f"{name} at {location()}")
            self.stopping.add(_function())
            self.rounds |= bool(graph_of(args[0]).named(*ZERO_DERIVATIVE))
        elif name.rstrip("_") in DISCRETE or tracked and name.strip("_") in CHOICES:
            self.discrete.add(_function())
        elif name == SAMPLE:
            self.rounds |= _is_hard(args, kwargs)
        if tracked and not torch.is_grad_enabled():
            self.stopping.add(_function())
        elif name in ("tensor", "as_tensor", "from_numpy"):
            self.rebuilt.append(f"torch.{name} at {location()}")
        return function(*args, **(kwargs or {}))


class StoppedValues(TorchFunctionMode):
    """Holds what leaves the graph: the first run under it records those values, every later one gets them again.

    With them a function moves as its gradient says where a gradient was stopped on purpose. What a custom
    autograd.Function computes in its forward is not stopped: it has a backward of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        # By location in the code: a run may find in a cache what the first one made.
        self.values: dict[tuple, list[Any]] | None = None
        self.calls: Counter[tuple] = Counter()

    def __enter__(self) -> StoppedValues:
        self.recording, self.calls = self.values is None, Counter()
        self.values = {} if self.values is None else self.values
        return super().__enter__()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if (
            name != SAMPLE
            and not _leaves(function, name, args)
            or name.endswith("_")
            and not name.endswith("__")
            or name == "__setitem__"
        ):
            return function(*args, **(kwargs or {}))  # in place: on values that are held already
        location = (name, *_frame())
        call, held = self.calls[location], self.values.get(location, [])
        self.calls[location] += 1
        if name == SAMPLE:  # what is stopped is its hard answer less its soft one
            soft = _softly(function, args, kwargs or {})
            if self.recording or call >= len(held):
                held = [*held, (function(*args, **(kwargs or {})) - soft).detach()]
                self.values[location] = held
            return soft + held[call]
        if not self.recording and call < len(held):
            return tree_map_only(Tensor, torch.clone, held[call])
        result = function(*args, **(kwargs or {}))
        if self.recording and (name in NUMBERS or any(isinstance(each, Tensor) for each in tree_leaves(result))):
            self.values[location] = [*held, tree_map_only(Tensor, torch.clone, result)]
        return result


def _leaves(function: Any, name: str, args: tuple) -> bool:
    """Whether what this call returns carries no history of what it was given."""
    if not torch.is_grad_enabled():
        return not _in_own_forward()
    tracked = any(isinstance(each, Tensor) and each.requires_grad for each in args)
    return tracked and (name in ("detach", *NUMBERS) or name == "__get__" and _is_data(function))


def _is_hard(args: tuple, kwargs: dict | None) -> bool:
    return bool((kwargs or {}).get("hard", args[2] if len(args) > 2 else False))


def _softly(function: Any, args: tuple, kwargs: dict) -> Tensor:
    """The same sample of torch's gumbel_softmax without the choice; the generators are left where they were."""
    logits = args[0] if args else kwargs["logits"]
    with torch.random.fork_rng([logits.device] if logits.is_cuda else []):
        return function(*args[:2], **{**kwargs, "hard": False})


def _in_own_forward() -> bool:
    """Whether the forward of an autograd.Function is running."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename.endswith("autograd/function.py"):
            return True
        frame = frame.f_back
    return False


def _is_data(function: Any) -> bool:
    return getattr(function, "__self__", None) is Tensor.__dict__.get("data", Tensor.data)


def location() -> str:
    """The innermost line outside of torch and of the checks."""
    file, line = _frame()
    return f"{file.rpartition('/')[2]}:{line}" if file else "an unknown line"


def _function() -> tuple[str, str]:
    """File and name of the innermost function outside of torch and of the checks."""
    frame = _outside()
    return (frame.f_code.co_filename, frame.f_code.co_name) if frame is not None else ("", "")


def _frame() -> tuple[str, int]:
    frame = _outside()
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)


def _outside() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename.startswith(HERE)):
        frame = frame.f_back
    return frame


def via(locations: list[str]) -> str:
    """The first of the locations that `Exits` noted, as the end of a sentence."""
    return f", by {locations[0]}" if locations else ""


def by_hand(graph: Graph) -> str:
    return f" (written by hand: {', '.join(graph.written_by_hand)})" if graph.written_by_hand else ""
