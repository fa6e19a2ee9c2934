"""The gradient checks of this device, several processes side by side; every row is kept as it is made."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict

import torch

from bench.gpu.rows import note
from ris_fast.gradcheck import rows_of
from ris_fast.gradcheck.rows import Row, network_row
from ris_fast.kernels.registry import operators

PROCESSES = 12
NETWORK = "whole network"


def main() -> int:
    names = [*(operator.name for operator in operators()), NETWORK]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    processes = min(PROCESSES, os.cpu_count() or 1, len(names))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(named_rows, name, device): name for name in names}
        for done in as_completed(waiting):
            rows = done.result() if done.exception() is None else [broken(waiting[done], done.exception())]
            for row in rows:
                note(f"{row.operator}, {row.backend}, {row.dtype}", ok=row.passed, **asdict(row))
                print(f"{row.operator}, {row.backend}, {row.dtype}: {'passed' if row.passed else row.note}", flush=True)
                failed += not row.passed
    return int(failed > 0)


def named_rows(name: str, device: str) -> list[Row]:
    """Those of one operator, or of the network."""
    if name == NETWORK:
        return [network_row(device)]
    return rows_of(next(each for each in operators() if each.name == name), device)


def broken(name: str, error: BaseException) -> Row:
    return Row(name, "every", "every", passed=False, note=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
