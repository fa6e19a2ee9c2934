"""Sample arguments of the fused step's operators for the generic tests and benchmarks, and what each call costs."""

from __future__ import annotations

from ..registry import Operator


def operators() -> tuple[Operator, ...]:
    return ()
