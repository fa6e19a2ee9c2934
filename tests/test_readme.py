"""The README says what is true: its script is the one that is tested, its commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_script_is_the_tested_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert (ROOT / "examples" / "plain_loop.py").read_text() in blocks


def test_every_snippet_runs() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README", "exec"), {"__name__": "readme"})


def test_every_command_exists() -> None:
    from ris_fast.commands.cli import app

    told = set(re.findall(r"^\| `ris-fast (\w+)", README, re.M))
    assert told and told == {name for name in app if not name.startswith("-")}


def test_every_picture_and_linked_file_exists() -> None:
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert linked and all((ROOT / target).is_file() for target in linked)


def test_ci_runs_the_readmes_test_command() -> None:
    command = next(block for block in re.findall(r"```sh\n(.*?)```", README, re.S) if "pytest" in block)
    steps = command.strip().split(" && ")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in steps] == steps and lines[-1] == steps[-1]
