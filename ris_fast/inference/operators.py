"""Importing this registers every operator that an exported network may call; and the plain form of each one.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode

from ris_fast.kernels.field import real
from ris_fast.kernels.registry import operators
from ris_fast.models import linear

NAMESPACE = "ris_fast"
OPERATORS = {operator.name: operator for operator in operators()}
PLAIN: dict[Any, Callable[..., Any]] = {
    **{operator.call: operator.reference for operator in OPERATORS.values()},
    OPERATORS["aperture_field"].call: real.aperture_field,  # without complex numbers, which ONNX has not
    linear.onednn_linear._opoverload: fn.linear,
}


class PlainForms(TorchFunctionMode):
    """Within the block each operator of ours is computed by its definition in torch's own operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


class Recorder(TorchFunctionMode):
    """Keeps the names, `library.operator`, of the operators called within the block that are not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            self.names |= foreign([func])
        return func(*args, **(kwargs or {}))


def foreign(targets: Any) -> set[str]:
    """The names of those operators that torch does not bring along."""
    found = {str(each).removesuffix(".default") for each in targets if isinstance(each, torch._ops.OpOverload)}
    return {name for name in found if name.partition(".")[0] not in ("aten", "prim", "prims")}


@torch.no_grad()
def operators_called(model: nn.Module, inputs: tuple[Any, ...]) -> set[str]:
    """The names of the operators beyond torch's own that the network calls for these inputs."""
    with Recorder() as recorder:
        model(*inputs)
    return recorder.names
