"""Imports run one way and without circles (the contracts are in pyproject.toml), and light modules stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "matplotlib", "numpy", "triton", "safetensors", "rich.progress")


def lint_imports(folder: Path, config: Path = ROOT / "pyproject.toml") -> subprocess.CompletedProcess[str]:
    """import-linter over the packages in `folder`, with the contracts in `config`."""
    pytest.importorskip("importlinter", reason="import-linter comes with the test extra")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    return subprocess.run([sys.executable, "-c", code, config], cwd=folder, capture_output=True, text=True)


def test_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module, line, said",
    [
        (
            "ris_fast/physics/array.py",
            "from ris_fast.training.loss import CovarianceLoss",
            "physics.array -> ris_fast.tr",
        ),
        ("ris_fast/models/linear.py", "import ris_fast.data.shards", "models.linear -> ris_fast.data.shards"),
        ("ris_fast/data/write.py", "def f():\n    from ris_fast import training", "data.write -> ris_fast.training"),
        ("ris_fast/physics/random.py", "from . import scenes", "No cycles are allowed in ris_fast.physics"),
        (
            "kernels/scale.py",
            "def f():\n    from ris_fast.config.load import nearest",
            "kernels.scale -> ris_fast.config",
        ),
        ("ris_fast/brand_new.py", "", "brand_new"),
    ],
)
def test_import_contracts_see_a_wrong_import(tmp_path: Path, module: str, line: str, said: str) -> None:
    mirror(tmp_path)
    changed = tmp_path / module
    text = changed.read_text() if changed.exists() else ""
    changed.unlink(missing_ok=True)
    changed.write_text(f"{text}\n{line}\n")
    assert said in lint_imports(tmp_path).stdout


def mirror(folder: Path) -> None:
    """ris_fast/ and kernels/ in `folder`, each file a link to the one of this tree."""
    for path in [*(ROOT / "ris_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        link = folder / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def test_kernels_import_each_other_without_cycles(tmp_path: Path) -> None:
    """The contracts see kernels/ beside ris_fast/, under which name its files do not import each other."""
    (tmp_path / "ris_fast").mkdir()
    (tmp_path / "ris_fast" / "__init__.py").touch()
    (tmp_path / "ris_fast" / "kernels").symlink_to(ROOT / "kernels")
    contract = "[importlinter]\nroot_package = ris_fast\n[importlinter:contract:1]\nname = No circles\n"
    (tmp_path / ".importlinter").write_text(contract + "type = acyclic_siblings\nancestors = ris_fast\n")
    done = lint_imports(tmp_path, tmp_path / ".importlinter")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "ris_fast",
        "ris_fast.config.schema",
        "ris_fast.files",
        "ris_fast.config.load",
        "ris_fast.commands.cli",
        "ris_fast.environment",
        "ris_fast.report.eventlog",
    ],
)
def test_importing_loads_neither_torch_nor_matplotlib(name: str) -> None:
    code = f"import sys, {name}; print(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"importing {name} loads {done.stdout.strip()}"
