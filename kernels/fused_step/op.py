"""The fused step behind one signature: plain torch here, C++ and Triton where they exist.

All calls write their arguments in place and return nothing. The tables and slots are in layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ris_fast.kernels.fused_step import reference


class Backend(NamedTuple):
    """The three phases through one implementation, and the longest chunk it likes."""

    measure: Callable[..., None]
    decide: Callable[..., None]
    apply: Callable[..., None]
    chunk: int


def _reference_measure(
    grad: Tensor, chunks: Tensor, segments: Tensor, hyper: Tensor, partial: Tensor, sums: Tensor, telemetry: Tensor,
    steps: Tensor, coefficients: Tensor, state: Tensor, tickets: Tensor, finish: bool,
) -> None:  # fmt: skip
    reference.measure(grad, segments, sums, state)
    if finish:
        reference.decide(segments, hyper, sums, telemetry, steps, coefficients, state)


def _reference_apply(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor | None, chunks: Tensor, segments: Tensor,
    hyper: Tensor, partial: Tensor, telemetry: Tensor, coefficients: Tensor, state: Tensor, tickets: Tensor, clear: bool,
) -> None:  # fmt: skip
    reference.apply(param, grad, exp_avg, exp_avg_sq, ema, segments, hyper, telemetry, coefficients, state, clear)


BACKENDS: dict[str, Backend] = {"reference": Backend(_reference_measure, reference.decide, _reference_apply, 4096)}
