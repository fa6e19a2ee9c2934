"""The ahead-of-time checks once more with the oldest triton of the range (3.6), where RIS_FAST_TRITON36 says it is.

pip install --target FOLDER 'triton==3.6.*', then RIS_FAST_TRITON36=FOLDER pytest tests/kernels/test_aot_oldest.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("RIS_FAST_TRITON36", "")


@pytest.mark.skipif(not FOLDER, reason="triton 3.6 is not installed: RIS_FAST_TRITON36 does not name its folder")
def test_aot_kernels_do_not_spill_with_triton_3_6() -> None:
    path = os.pathsep.join([FOLDER, os.environ.get("PYTHONPATH", "")])
    version = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert version.stdout.startswith("3.6"), version.stdout + version.stderr
    tests = Path(__file__).with_name("test_aot.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
