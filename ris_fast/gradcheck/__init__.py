"""Proves the gradients of every registered operator in every backend that this machine has: `ris-fast gradcheck`.

A row is an operator in one backend and one dtype: error of value and gradient against the float64 definition beside
the error that plain eager float32 makes, torch.autograd.gradcheck in float64, and whether the autograd graph stays
whole. Sabotaged backwards (sign, conjugate, one missing term) are checked too: those rows pass if they are caught.
`criteria` holds what is asked, `rows` of whom; here they are run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from ris_fast.gradcheck.criteria import graph_faults, numerical, outcome, tensors_of
from ris_fast.gradcheck.rows import (
    WRONG,
    Row,
    backends_here,
    measure,
    network_row,
    operator_rows,
    sabotage_rows,
    sabotaged,
)
from ris_fast.kernels.registry import Operator, operators

__all__ = [
    "WRONG",
    "Row",
    "backends_here",
    "graph_faults",
    "interpreted_rows",
    "measure",
    "numerical",
    "outcome",
    "rows_of",
    "run_gradcheck",
    "sabotaged",
    "tensors_of",
]


BY_NUMPY = "only 0-dimensional arrays can be converted"  # said by numpy 2.4 to the interpreter of triton 3.6


def run_gradcheck(device: str | torch.device | None = None, interpreter: bool = True) -> list[Row]:
    """All rows for this machine; the verdict is all(row.passed for row in rows).

    Args:
        device: "cpu" or "cuda[:i]"; the GPU where there is one by default.
        interpreter: also run the Triton bodies under Triton's interpreter (half a minute; needs triton).
    """
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    for operator in operators():
        rows += rows_of(operator, device)
    rows.append(network_row(device))
    if interpreter and _has_triton():
        rows += interpreted_rows()
    return rows


def rows_of(operator: Operator, device: str) -> list[Row]:
    """Those of one operator; wrong backwards that must be caught are among them where it has a gradient."""
    differentiable = any(sample.differentiable for sample in operator.samples)
    return operator_rows(operator, device) + (sabotage_rows(operator, device) if differentiable else [])


def interpreted_rows() -> list[Row]:
    """The Triton bodies under Triton's interpreter on the CPU, in a process of their own (it must be chosen before
    import)."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ris_fast.gradcheck"], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if BY_NUMPY in last:
            last += "; this triton's interpreter needs `pip install 'numpy<2.4'`"
        return [
            Row(
                "every", "triton (interpreter)", "float64", passed=False, note=f"the interpreter process failed: {last}"
            )
        ]
    return [Row(**row) for row in json.loads(done.stdout)]


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
