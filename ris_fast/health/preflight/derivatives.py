"""Derivatives by autograd, also where `torch.autograd.grad` cannot be asked: networks with reentrant checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.preflight.autograd import graph_of

REENTRANT = "CheckpointFunctionBackward"


def derivatives(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """As `torch.autograd.grad` with `allow_unused`: the gradient of the sum at each input, None where none arrives.

    A block under `torch.utils.checkpoint` with use_reentrant=True refuses that call and knows `backward` alone: there
    gradients are taken from the leaves, whose own are put back, and from hooks on other tensors.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = list(inputs)
    if not any(graph_of(value).named(REENTRANT) for value in outputs):
        return list(torch.autograd.grad(outputs, inputs, grad_outputs, retain_graph=retain_graph, allow_unused=True))
    return _by_backward(outputs, inputs, grad_outputs, retain_graph)


def _by_backward(
    outputs: list[Tensor], inputs: list[Tensor], grad_outputs: Sequence[Tensor] | None, retain_graph: bool | None
) -> list[Tensor | None]:
    found: dict[int, Tensor] = {}

    def keep(key: int) -> Any:
        def kept(gradient: Tensor) -> None:
            found[key] = found[key] + gradient if key in found else gradient.detach().clone()

        return kept

    leaves = {id(leaf): leaf for value in (*outputs, *inputs) for leaf in graph_of(value).leaves.values()}
    leaves |= {id(value): value for value in inputs if value.is_leaf}
    before = {key: leaf.grad for key, leaf in leaves.items()}
    handles = [value.register_hook(keep(id(value))) for value in inputs if not value.is_leaf]
    try:
        for leaf in leaves.values():
            leaf.grad = None
        torch.autograd.backward(outputs, None if grad_outputs is None else list(grad_outputs), retain_graph)
        found |= {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    finally:
        for handle in handles:
            handle.remove()
        for key, leaf in leaves.items():
            leaf.grad = before[key]
    return [found.get(id(value)) for value in inputs]
