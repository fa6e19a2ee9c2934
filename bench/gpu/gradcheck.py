"""The gradient checks of this device, several processes side by side; every row is kept as it is made."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict

import torch

from bench.gpu.rows import note
from ris_fast.gradcheck.rows import Row, network_row, operator_rows, sabotage_rows
from ris_fast.kernels.registry import operators

PROCESSES = 12
NETWORK = "whole network"


def main() -> int:
    names = [*(operator.name for operator in operators()), NETWORK]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    processes = min(PROCESSES, os.cpu_count() or 1, len(names))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(rows_of, name, device): name for name in names}
        for done in as_completed(waiting):
            rows = done.result() if done.exception() is None else [broken(waiting[done], done.exception())]
            for row in rows:
                note(f"{row.operator}, {row.backend}, {row.dtype}", ok=row.passed, **asdict(row))
                print(f"{row.operator}, {row.backend}, {row.dtype}: {'passed' if row.passed else row.note}", flush=True)
                failed += not row.passed
    return int(failed > 0)


def rows_of(name: str, device: str) -> list[Row]:
    """Those of one operator, wrong backwards that must be caught included."""
    if name == NETWORK:
        return [network_row(device)]
    operator = next(each for each in operators() if each.name == name)
    differentiable = any(sample.differentiable for sample in operator.samples)
    return operator_rows(operator, device) + (sabotage_rows(operator, device) if differentiable else [])


def broken(name: str, error: BaseException) -> Row:
    return Row(name, "every", "every", passed=False, note=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
