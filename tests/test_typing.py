"""What the annotations promise to a type checker: right use of every public name passes, wrong use is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ris_fast

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_mypy_accepts_right_use_and_refuses_wrong_use() -> None:
    """Wrong use carries `# type: ignore[code]`, and an ignore that hides nothing is an error (strict)."""
    pytest.importorskip("mypy", reason="mypy comes with the test extra")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", ["right_use.py", "wrong_use.py"])
def test_typed_files_use_every_public_name(file: str) -> None:
    text = (ROOT / "tests" / "typed" / file).read_text()
    missing = [
        name for name in ris_fast.__all__ if name not in text and (file, name) != ("wrong_use.py", "__version__")
    ]
    assert not missing, f"add a use of {', '.join(missing)} to tests/typed/{file}"
