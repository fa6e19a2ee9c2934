"""Which parameters each term of the loss reaches, with how much gradient, and whether autograd knows the term at
all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.restore import preserve_state


def term_gradient_table(context: PreflightContext) -> dict[str, list[Any]]:
    """A row a tensor, a column a term: norm of the weighted term's gradient; '-' where the term does not reach it.

    The first three rows say of each term: weighted value, requires_grad, and the name of its grad_fn.
    """
    with preserve_state(context.trainer), context.small():
        context.model.train()
        _, terms, _ = context.run()
        live = context.trainable
        weighted = {name: context.loss.weights.get(name, 0.0) * value for name, value in terms.items()}
        columns = {name: _gradients(value, list(live.values())) for name, value in weighted.items()}
        rows: list[list[Any]] = [
            ["(weighted value)", *(float(value.detach()) for value in weighted.values())],
            ["(requires_grad)", *(str(value.requires_grad) for value in terms.values())],
            ["(grad_fn)", *(value.grad_fn.name() if value.grad_fn is not None else "none" for value in terms.values())],
        ]
        for row, name in enumerate(live):
            rows.append([name, *(_shown(column[row]) for column in columns.values())])
    return {"headers": ["tensor", *terms], "rows": rows}


def _gradients(value: Tensor, tensors: list[Tensor]) -> list[float | None]:
    if not value.requires_grad:
        return [None] * len(tensors)
    parts = derivatives(value, tensors, retain_graph=True)
    return [None if part is None else float(part.norm()) for part in parts]


def _shown(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.3g}"
