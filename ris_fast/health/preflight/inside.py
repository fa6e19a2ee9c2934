"""Preflight of what a network of the user's own computes between its layers: axes that are confused, and functions with
ends that all they are given lies at.

Legend: B batch, T positions, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.autograd import graph_of, location
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.modes import eval_mode
from ris_fast.models.own import OwnNetwork

RESHAPES = ("view", "reshape", "unflatten", "flatten")
PASSED = ("Expand", "View", "UnsafeView", "ReshapeAlias", "NativeDropout", "ToCopy", "Clone")  # and an attention's mask
END, MOST, FEWEST = 0.005, 0.9, 4  # from the ends; share of the numbers, or rows; entries of a softmax


class Reshapes(TorchFunctionMode):
    """Notes reshapes in which an axis of a scene comes to lie elsewhere, which only a transpose does rightly."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.found: list[tuple[tuple[int, ...], tuple[int, ...], str]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in RESHAPES and args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            before, after = tuple(args[0].shape), tuple(result.shape)
            if before[:1] == after[:1] == (self.batch,) and moves_an_axis(before[1:], after[1:]):
                self.found.append((before, after, location()))
        return result


def moves_an_axis(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a reshape neither splits axes nor joins neighbours, and an axis of some length is there again."""
    before, after = ([size for size in shape if size != 1] for shape in (before, after))
    if prod(before) != prod(after):
        return False
    ends = [{prod(shape[: k + 1]) for k in range(len(shape))} for shape in (before, after)]
    common = sorted(ends[0] & ends[1])
    for start, end in zip([1, *common], common):
        one, other = (
            [size for k, size in enumerate(shape) if start < prod(shape[: k + 1]) <= end] for shape in (before, after)
        )
        if min(len(one), len(other)) > 1 and set(one) & set(other):
            return True
    return False


def axes(context: PreflightContext) -> Iterator[Finding]:
    """No reshape stands where a transpose is meant, and attention's weights sum to one over what they weigh."""
    if not isinstance(context.model, OwnNetwork):
        return
    seen = Reshapes(context.scenes.batch)
    with eval_mode(context.model), context.as_written(), seen:
        prediction = context.predict(context.scenes)
    if seen.found:
        before, after, where = seen.found[0]
        yield Finding(
            "wrong_layout",
            f"at {where} a reshape makes {after} of {before}: that neither splits axes nor joins neighbours, so that"
            " numbers of different places come to lie beside each other. An axis that is to stand elsewhere is moved by"
            " transpose or permute, before any reshape.",
            advice="Write x.transpose(1, 2) for (B, T, W) -> (B, W, T), and x.view(B, T, heads, -1).transpose(1, 2) for"
            " the heads of an attention. Where numbers are shifted past each other on purpose, that is meant.",
            certain=False,
        )
        return
    nodes = [node for value in prediction if value is not None for node in graph_of(value).operators]
    if any(_over_the_wrong_axis(node) for node in nodes if node.name().startswith("Bmm")):
        yield Finding(
            "wrong_layout",
            "a softmax is taken over one axis and its result is multiplied over the other: the weights of an attention"
            " then sum to one over the queries and not over the keys that they weigh.",
            advice="Take the softmax over the last axis, dim=-1, of queries @ keys.transpose(-2, -1). Where places"
            " compete for the inputs, as slots do, that is meant.",
            certain=False,
        )


def _over_the_wrong_axis(node: Any) -> bool:
    """Whether an operand of a matrix product is a softmax over another axis than the product sums over."""
    for (source, _), summed in zip(node.next_functions, (-1, -2)):
        swapped = False
        while source is not None and (source.name().startswith((*PASSED, "Transpose"))):
            if source.name().startswith("Transpose"):
                swapped = not swapped
            source = source.next_functions[0][0]
        if source is not None and source.name().startswith("Softmax"):
            result = source._saved_result
            axis = (_signed(source._saved_dim) % result.dim()) - result.dim()
            axis = {-1: -2, -2: -1}.get(axis, axis) if swapped else axis
            if axis != summed and axis in (-1, -2):
                return True
    return False


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def ends(context: PreflightContext) -> Iterator[Finding]:
    """No softmax, tanh or sigmoid within the network has nearly all of its numbers at its ends, where it is flat."""
    if not isinstance(context.model, OwnNetwork):
        return
    with eval_mode(context.model), context.as_written(), context.full_precision():
        prediction = context.predict(context.scenes)
    outputs = [value for value in (prediction.factor, *prediction[1:]) if value is not None]
    nodes = {node for value in outputs for node in graph_of(value).operators}
    for node in sorted(nodes, key=lambda node: node.name()):
        kind = node.name().partition("Backward")[0]
        if kind in ("Softmax", "Tanh", "Sigmoid") and (share := _at_ends(kind, node)) > MOST:
            what = (
                f"gives {share:.0%} of its rows a weight of more than {1 - END:g} at one entry"
                if kind == "Softmax"
                else f"has {share:.0%} of its numbers within {END:g} of an end"
            )
            yield Finding(
                "saturated_output",
                f"before training a {kind.lower()} within the network {what}: there it is flat, and next to no gradient"
                " passes it. What it is given is too large: the two likeliest reasons are a missing scale, as"
                " 1 / sqrt(d) of an attention or a normalisation before it, and initial weights that are too large.",
                advice="Print what it is given: bring it to numbers of order one.",
                certain=False,
            )
            return


def _at_ends(kind: str, node: Any) -> float:
    """The share of its numbers, or of a softmax's rows, that lie at the ends."""
    result = node._saved_result.detach()
    if kind == "Softmax":
        axis = _signed(node._saved_dim)
        rows = result.dim() > 0 and result.shape[axis] >= FEWEST
        return float((result.amax(axis) > 1 - END).float().mean()) if rows else 0.0
    low = -1.0 if kind == "Tanh" else 0.0
    return float(((result > 1 - END) | (result < low + END)).float().mean()) if result.numel() >= FEWEST else 0.0


CHECKS = {"axes are what they are taken for": axes, "nothing inside the network starts at its ends": ends}
