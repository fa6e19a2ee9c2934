"""The README and its files say what is true: examples run, commands and links exist, CI runs what it shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_readme_is_short() -> None:
    assert len(README.split()) < 1000
    assert max(len(line) for page in PAGES for line in page.read_text().splitlines()) < 120


def test_readme_loop_is_the_tested_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks == [(ROOT / "examples" / "own_loop.py").read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_readme_examples_run_and_are_linked(example: Path) -> None:
    assert example.name == "own_loop.py" or f"](examples/{example.name})" in README
    runpy.run_path(str(example), run_name="__main__")


def test_watch_example_names_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "watch_any_loop.py"))
    assert capsys.readouterr().out.startswith("clip_too_small")


def test_readme_lists_the_commands_that_exist() -> None:
    from ris_fast.commands.cli import app

    told = set(re.findall(r"^\| `ris-fast ([\w-]+)", README, re.M))
    assert told and told == {name for name in app if not name.startswith("-")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_readme_links_exist(page: Path) -> None:
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]
    assert (linked or page.stem == "CONTRIBUTING") and all((page.parent / target).exists() for target in linked)


def test_scene_picture_can_be_drawn_again(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs" / "scene.py"))["draw"](tmp_path / "scene.png")
    drawn, kept = ((folder / "scene.png").stat().st_size for folder in (tmp_path, ROOT / "docs"))
    assert drawn > 50_000 and kept < 200_000


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = next(block for block in re.findall(r"```sh\n(.*?)```", README, re.S) if "pytest" in block)
    steps = command.strip().split(" && ")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in steps] == steps and lines[-1] == steps[-1]
