"""Operations of a graph that run over the scenes of a batch instead of within each, by their axis and shapes alone.

Nothing is read from a tensor: which axis an operation runs over stays known when its numbers are freed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ris_fast.health.watch.tensors import crosses

SPREADS = {"Std", "Var", "StdMean", "VarMean"}  # by which a normalisation divides
OVER_AN_AXIS = {"Softmax", "LogSoftmax", "Cumsum", "Cumprod", "Logcumsumexp", "LinalgVectorNorm", "Norm"}
RESHAPING = {"View", "UnsafeView", "ReshapeAlias"}
STEPWISE = {"Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside"}  # whose derivative is zero everywhere
CUTTING = {"Clamp", "ClampMin", "ClampMax", "Hardtanh"}  # zero derivative beyond a bound


def over_scenes(nodes: Iterable[Any], rows: int, pairs: bool = False) -> list[str]:
    """What runs over the first axis of tensors with a row for each scene: 'softmax over axis 0 of (64, 8, 8)'.

    `pairs`: within a loss, where squares of all pairs of a batch and the spread of a batch are usual.
    """
    found = []
    for node in nodes:
        name = operation(node)
        if name in OVER_AN_AXIS or (name in SPREADS and not pairs):
            shape = _operand_shape(node) if name in SPREADS | {"LinalgVectorNorm", "Norm"} else made_shape(node)
            square = pairs and len(shape) == 2 and shape[0] == shape[1]
            if len(shape) > 1 and shape[0] == rows > 1 and not square and axes_of(node, len(shape)) == {0}:
                found.append(f"{_SPOKEN.get(name, name.lower())} over axis 0 of {shape}")
    return found


PRODUCTS = {"Addmm", "Mm", "Bmm", "Baddbmm", "Convolution"}
STRAIGHT = {*PRODUCTS, *RESHAPING, "T", "Transpose", "Permute", "Expand", "Squeeze", "Unsqueeze", "AccumulateGrad"}
STRAIGHT |= {"Add", "Sub", "Neg", "Sum", "Mean", "Cat", "Slice", "Select", "Split", "Clone", "ToCopy"}


def straight_products(nodes: Iterable[Any]) -> int:
    """Products with weights, where nothing between them bends; 0 where something does."""
    names = [operation(each) for each in nodes]
    return sum(name in PRODUCTS for name in names) if STRAIGHT.issuperset(names) else 0


def reshaped_apart(nodes: Iterable[Any], rows: int) -> list[str]:
    """Reshapes of a tensor with scenes on its second axis into one with scenes on its first."""
    found = []
    for node in nodes:
        before, after = _sizes(node), made_shape(node)
        if operation(node) not in RESHAPING or len(before) < 2 or not after or rows < 2:
            continue
        if before[0] not in (1, rows) and before[1] == rows == after[0] and len(after) <= len(before):
            found.append(f"{before} as {after}")
    return found


def reshaped_as_transposed(nodes: Iterable[Any]) -> list[str]:
    """Reshapes that neither part an axis nor join some, as a transpose does that is written as a reshape."""
    shapes = [(_sizes(node), made_shape(node)) for node in nodes if operation(node) in RESHAPING]
    return [f"{before} as {after}" for before, after in shapes if before and after and crosses(before, after)]


def operation(node: Any) -> str:
    """'MseLoss' of MseLossBackward0."""
    return type(node).__name__.rpartition("Backward")[0].removeprefix("_") or type(node).__name__


def made_shape(node: Any) -> tuple[int, ...]:
    """Of what the operation gives."""
    made = getattr(node, "_input_metadata", None)
    return tuple(made[0].shape) if made else ()


def _operand_shape(node: Any) -> tuple[int, ...]:
    before = next((each for each, _ in node.next_functions if each is not None), None)
    return made_shape(before) if before is not None else ()


def axes_of(node: Any, count: int) -> set[int]:
    """Counted from the first; as saved, those from the last on may be unsigned numbers of 64 bits."""
    axes = getattr(node, "_saved_dim", None)
    if axes is None:
        return set()
    axes = [axes] if isinstance(axes, int) else list(axes)
    return {(axis - 2**64 if axis >= 2**63 else axis) % count for axis in axes}


def _sizes(node: Any) -> tuple[int, ...]:
    return tuple(getattr(node, "_saved_self_sym_sizes", ()))


_SPOKEN = {
    "LogSoftmax": "a logarithm of a softmax",
    "Softmax": "a softmax",
    "Cumsum": "a cumulative sum",
    "Cumprod": "a cumulative product",
    "LinalgVectorNorm": "a norm",
    "Norm": "a norm",
}


def saved_tensor(node: Any, name: str) -> Tensor | None:
    """What an operation keeps for its backward pass; None where hooks pack it, as a checkpoint does, whose unpacking
    computes the part again, and where it is freed."""
    kept = getattr(node, f"_raw_saved_{name}", None)
    if kept is None or getattr(kept, "unpack_hook", None) is not None:
        return None
    try:
        value = getattr(kept, "data", None)
    except RuntimeError:
        return None
    return value if isinstance(value, Tensor) else None
