"""Runs the stages of stages.py one after the other, within a time, and keeps every figure: see bench/gpu.sh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu import report, rows
from bench.gpu.stages import STAGES

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "bench" / "results" / "gpu"  # what earlier runs have brought
RESULTS, LOG = "results.jsonl", "stages.log"
DONE, OUT_OF_TIME = "done", "out of time"
LEAST, GRACE = 10, 12  # seconds below which no stage begins; that a stage may take to end when its time is over


def main() -> int:
    out = Path(os.environ.get("OUT") or KEPT)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + float(os.environ.get("RIS_FAST_GPU_SH_SECONDS") or 420)
    small = rows.trial()
    if out.resolve() != KEPT.resolve() and (KEPT / RESULTS).is_file() and not (out / RESULTS).exists():
        shutil.copy(KEPT / RESULTS, out / RESULTS)  # what comes back is everything
    os.environ[rows.ROWS] = str(out / RESULTS)
    rows.end_line(out / RESULTS)
    asked = os.environ.get("RIS_FAST_GPU_SH_STAGES", "").split()
    unknown = [name for name in asked if name not in STAGES]
    if unknown:
        print(f"gpu.sh: {', '.join(unknown)}: no such stage; there are {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    commit = os.environ.get(rows.COMMIT, "unknown")
    failed = 0
    for name in asked or order(outcomes(rows.read(out / RESULTS)), commit):
        outcome = run(name, small, end, out / LOG)
        failed += outcome != DONE
    print(report.table(rows.read(out / RESULTS)))
    return int(failed > 0)


def outcomes(kept: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Stage -> commit -> how it last ended there."""
    found: dict[str, dict[str, str]] = {}
    for row in kept:
        if row.get("item") == "stage" and bool(row.get("trial")) == rows.trial():
            found.setdefault(row["stage"], {})[row["commit"]] = row["outcome"]
    return found


def order(known: Mapping[str, Mapping[str, str]], commit: str) -> list[str]:
    """Stages that never got through, then those that did with other code; those that did with this code are left
    out."""
    through = {name: [at for at, outcome in known.get(name, {}).items() if outcome == DONE] for name in STAGES}
    return sorted((name for name in STAGES if commit not in through[name]), key=lambda name: bool(through[name]))


def run(name: str, small: bool, end: float, log: Path) -> str:
    """One stage within its time and what is left of all time; its outcome, which is also a row."""
    stage, began = STAGES[name], time.monotonic()
    limit = min(stage.seconds, end - began)
    os.environ[rows.STAGE] = name
    if limit < LEAST:
        outcome = "not run: no time left"
    else:
        command = stage.small if small else stage.command
        with log.open("ab", buffering=0) as file:
            file.write(f"\n==== {name}: {' '.join(command)}\n".encode())
            outcome = watched(command, limit, file)
    seconds = time.monotonic() - began
    rows.note("stage", outcome=outcome, seconds=round(seconds, 1), limit=round(limit, 1))
    print(f"{name:<16} {seconds:4.0f} s  {outcome}", flush=True)
    return outcome


def watched(command: Iterable[str], limit: float, log: Any) -> str:
    """Runs a command; when its time is over it is asked to end, and what is left of it a little later is killed."""
    child = subprocess.Popen([*command], stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    try:
        return said(child.wait(limit))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        return OUT_OF_TIME
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # workers that it left behind
        except ProcessLookupError:
            pass
        child.wait()


def said(code: int) -> str:
    return DONE if code == 0 else f"killed by signal {-code}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
