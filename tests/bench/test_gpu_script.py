"""bench/gpu.sh runs seldom and far away: what it names must exist here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


def test_gpu_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""


def test_gpu_script_names_existing_tests() -> None:
    named = re.findall(r"tests/\w+(?:/\w+\.py)?", SCRIPT.read_text())
    assert "tests/kernels" in named and all((ROOT / each).exists() for each in named)


@pytest.mark.parametrize("stage, name", re.findall(r"^(bench_\w+)\(\) { bench (\w+)", SCRIPT.read_text(), re.MULTILINE))
def test_gpu_script_has_a_smallest_case_per_benchmark(stage: str, name: str) -> None:
    text = SCRIPT.read_text()
    assert stage in re.search(r"stages=.*", text)[0] and re.search(rf"^        {name}\) echo .+ ;;", text, re.MULTILINE)
    assert (ROOT / "bench" / f"test_{name}.py").is_file()
