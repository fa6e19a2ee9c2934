"""How long an OpenMP thread that waits for the others spins on its core before it sleeps: the command line's choice.

libgomp's own choice, milliseconds, makes training several times slower where another program wants a core, because a
thread that spins holds the core that the thread it waits for would need. libgomp reads its variables once, when torch
is imported. The measurements are in docs/threads.md. Only the standard library is imported here.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

VARIABLE, SPINS = "GOMP_SPINCOUNT", "10000"  # turns of the waiting loop; libgomp's own number is 300,000
MARK = "RIS_FAST_SPINCOUNT"  # what the command has set, for the processes that it starts
THEIRS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables of a user who has chosen
RUNTIMES = ("libgomp", "libiomp5", "libomp")


def set_thread_policy() -> None:
    """Chooses for this process and those that it starts, unless the user has, or torch is loaded and it is too late."""
    if "torch" in sys.modules or any(name in os.environ for name in THEIRS):
        return
    os.environ[VARIABLE] = os.environ[MARK] = SPINS


def thread_policy() -> dict[str, Any]:
    """What holds in this process: `policy` as VARIABLE=value, who has set it (`set_by`), and the OpenMP `runtime` that
    is loaded, None where there is none or the system does not say."""
    chosen = {name: os.environ[name] for name in THEIRS if name in os.environ}
    ours = chosen == {VARIABLE: os.environ.get(MARK)}
    return {
        "policy": " ".join(f"{name}={value}" for name, value in chosen.items()) or "the OpenMP runtime's own",
        "set_by": "ris-fast" if ours else "the environment" if chosen else "nobody",
        "runtime": _runtime(),
    }


def _runtime() -> str | None:
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return None
    loaded = {re.split(r"[-.]", Path(line.split()[-1]).name)[0] for line in lines if "/" in line}
    return next((each for each in RUNTIMES if each in loaded), None)
