"""`ris-fast gradcheck`: value and gradient of every kernel in every backend of this machine."""

from __future__ import annotations

from dataclasses import asdict

from ris_fast import exit_codes, gradcheck
from ris_fast.report.eventlog import dumps
from ris_fast.report.gradcheck import gradcheck_text
from ris_fast.streams import stage
from ris_fast.training.compiled_model import choose_device


def gradcheck_command(*, device: str, interpreter: bool, json: bool) -> int:
    """Prints a row for each kernel, backend and dtype. Returns: 1 where one is wrong, else 0."""
    stage("comparing kernels and gradients with float64, one to two minutes")
    rows = gradcheck.run_gradcheck(choose_device(device, "--device"), interpreter)
    passed = all(row.passed for row in rows)
    print(dumps({"passed": passed, "rows": [asdict(row) for row in rows]}, indent=2) if json else gradcheck_text(rows))
    return exit_codes.DONE if passed else exit_codes.GRADIENT_WRONG
