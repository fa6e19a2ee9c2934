"""Where two passes through one network part: the first module that is given the same and answers otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ris_fast.health.preflight.measures import SAME, relative_change

Seen = list[tuple[str, list[Tensor], list[Tensor]]]  # name of a module, what it was given, what it answered


def parting(
    model: nn.Module,
    one: Callable[[], Any],
    other: Callable[[], Any],
    rows: slice = slice(None),
    others: slice = slice(None),
) -> str:
    """Name of the innermost module where two passes begin to differ in some rows of the batch; '' where none is.

    Args: one, other: make a pass through `model` each; rows, others: of their batches, that are compared.
    """
    first, second = _followed(model, one, rows), _followed(model, other, others)
    for (name, given, made), (same, given_then, made_then) in zip(first, second):
        if name != same:
            break
        if name and _alike(given, given_then) and not _alike(made, made_then):
            return name
    return ""


def _followed(model: nn.Module, run: Callable[[], Any], rows: slice) -> Seen:
    """Every call of a module in the order in which they end: an inner one before the one around it."""
    seen: Seen = []

    def keep(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        seen.append((name, _rows(inputs, rows), _rows(output if isinstance(output, tuple) else (output,), rows)))

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows(values: tuple, rows: slice) -> list[Tensor]:
    return [each.detach()[rows].float().clone() for each in values if isinstance(each, Tensor) and each.dim()]


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and relative_change(a, b) <= SAME for a, b in zip(one, other)
    )
