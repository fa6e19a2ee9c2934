"""Imports run one way: kernels <- physics <- data, models <- training <- health, report, localize <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ris_fast

ROOT = Path(__file__).parent.parent
# A module may import modules of lower floors and of its own; siblings on one floor do not know each other.
FLOORS = (
    ("config", "files", "usage", "streams", "drawing"),
    ("settings",),
    ("kernels",),
    ("physics", "environment"),
    ("data", "models"),
    ("training",),
    ("gradcheck", "benchmarks"),
    ("health", "report", "localize"),
    ("run_folder", "printed_rows"),
    ("plain_rows",),
    ("evaluation", "checkup", "memory"),
    ("launch", "bench"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted names below ris_fast, kernels under the name that they are imported by."""
    found = {}
    for folder, prefix in ((ROOT / "ris_fast", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(source: str, package: str) -> set[str]:
    """Floors that a source file imports, wherever in the file; public names count as the floor that they live on."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {_home(_absolute(node, package), alias.name) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("ris_fast.")}


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if node.level == 0:
        return node.module or ""
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _home(module: str, name: str) -> str:
    if module != "ris_fast":
        return module
    return ris_fast._HOMES.get(name, f"ris_fast.{name}" if not name.startswith("__") else "ris_fast")


def wrong_imports(floor: str, source: str, package: str = "ris_fast") -> set[str]:
    """Floors that `floor` imports and must not. Kernels know nothing of the project, not even its configuration."""
    others = imported(source, package) - {floor}
    return others if floor == "kernels" else {other for other in others if LEVEL[other] >= LEVEL[floor]}


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_run_one_way(name: str) -> None:
    floor = name.split(".")[0]
    assert floor in LEVEL, f"{name} lives on no floor: put it into one of {', '.join(LEVEL)}."
    path = modules()[name]
    package = f"ris_fast.{name}" if path.name == "__init__.py" else f"ris_fast.{name}".rpartition(".")[0]
    wrong = wrong_imports(floor, path.read_text(), package)
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}, which stand on its own floor or above."


@pytest.mark.parametrize(
    "floor, source",
    [
        ("physics", "from ris_fast.training.loss import CovarianceLoss"),
        ("models", "import ris_fast.data.shards"),
        ("kernels", "def f():\n    from ris_fast.config.schema import Task"),
        ("physics", "from ris_fast import Trainer"),
        ("data", "from .training import loop"),
        ("report", "import ris_fast.health"),
        ("config", "from ris_fast import settings"),
        ("files", "from ris_fast.config.schema import Config"),
        ("kernels", "from ris_fast.files import write_text"),
    ],
)
def test_the_check_sees_an_import_that_runs_the_other_way(floor: str, source: str) -> None:
    assert wrong_imports(floor, source)


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
def test_importing_costs_neither_torch_nor_figures(name: str) -> None:
    heavy = ("torch", "matplotlib", "numpy", "triton", "safetensors", "rich.progress")
    code = f"import sys, {name}; print(','.join(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"importing {name} loads {done.stdout.strip()}"
