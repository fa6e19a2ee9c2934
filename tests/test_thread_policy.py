"""The command line decides how threads wait before libgomp is loaded, unless the user has; the package does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from ris_fast.thread_policy import MARK, SPINS, THEIRS, set_thread_policy, thread_policy

ENV = [sys.executable, "-m", "ris_fast", "env", "--json"]
IMPORT = [
    sys.executable,
    "-c",
    "import ris_fast; ris_fast.cov_nmse; import os; print(os.environ.get('GOMP_SPINCOUNT'))",
]
POOL = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import os
from ris_fast.thread_policy import set_thread_policy, thread_policy
if __name__ == "__main__":
    set_thread_policy()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print(pool.submit(thread_policy).result()["set_by"])
"""


def _run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in (*THEIRS, MARK)}
    environ |= {"OMP_DISPLAY_ENV": "verbose"} | variables
    return subprocess.run(words, env=environ, capture_output=True, text=True, check=True)


def _spins_of_libgomp(run: subprocess.CompletedProcess[str]) -> str:
    """What libgomp itself has read: it says so as it is loaded."""
    if (found := re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)) is None:
        pytest.skip("torch is not built with libgomp")
    return found[1]


@pytest.mark.slow
def test_command_line_reaches_libgomp_before_torch_loads_it() -> None:
    run = _run(ENV)
    assert _spins_of_libgomp(run) == SPINS
    assert json.loads(run.stdout)["threads"] == {
        "policy": f"GOMP_SPINCOUNT={SPINS}",
        "set_by": "ris-fast",
        "runtime": "libgomp",
    }


@pytest.mark.slow
def test_users_wait_policy_wins() -> None:
    run = _run(ENV, OMP_WAIT_POLICY="passive")
    assert _spins_of_libgomp(run) == "0"
    threads = json.loads(run.stdout)["threads"]
    assert (threads["policy"], threads["set_by"]) == ("OMP_WAIT_POLICY=passive", "the environment")


@pytest.mark.slow
def test_importing_the_package_sets_nothing() -> None:
    run = _run(IMPORT)
    assert run.stdout == "None\n" and _spins_of_libgomp(run) != SPINS


def test_processes_that_a_command_starts_inherit_the_policy(tmp_path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    assert _run([sys.executable, str(script)]).stdout == "ris-fast\n"


@pytest.mark.parametrize("name", THEIRS)
def test_set_thread_policy_leaves_each_users_variable_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (*THEIRS, MARK):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "7")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    set_thread_policy()
    assert thread_policy() | {"runtime": None} == {"policy": f"{name}=7", "set_by": "the environment", "runtime": None}
    assert MARK not in os.environ


def test_set_thread_policy_does_nothing_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (*THEIRS, MARK):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setitem(sys.modules, "torch", object())
    set_thread_policy()
    assert thread_policy()["set_by"] == "nobody" and not {*THEIRS, MARK} & set(os.environ)
