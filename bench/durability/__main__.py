"""Runs the campaign and prints its table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bench.durability import access, clocks, damage, disk_full, kills
from bench.durability.processes import ROOT, Server
from bench.durability.tasks import Prepared, prepare
from bench.durability.trial import CONTINUED, VERDICTS, Outcome, Part, Trial, timed

PARTS = (*kills.PARTS, *disk_full.PARTS, *damage.PARTS, *access.PARTS, *clocks.PARTS)
RESULTS = ROOT / "bench" / "results" / "durability.json"


def run_parts(parts: Sequence[Part], jobs: int, seed: int, share: float, folder: Path) -> dict[str, Any]:
    """Name of each part -> its counts, its seconds and what was not as it should be; `share` of its trials."""
    idle: SimpleQueue[list[Server]] = SimpleQueue()
    servers = [[Server(), Server()] for _ in range(jobs)]
    prepared = prepare(folder / "prepared", servers[0][0])
    for each in servers:
        idle.put(each)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            return {part.name: _run_part(part, pool, idle, seed, share, folder, prepared) for part in parts}
    finally:
        for each in servers:
            for server in each:
                server.close()


def _run_part(
    part: Part,
    pool: ThreadPoolExecutor,
    idle: SimpleQueue[list[Server]],
    seed: int,
    share: float,
    folder: Path,
    prepared: Prepared,
) -> dict[str, Any]:
    began = time.monotonic()

    def one(number: int) -> tuple[Trial, Outcome]:
        servers = idle.get()
        trial = Trial(number, seed, folder / part.name.replace(" ", "-") / str(number), servers, prepared)
        outcome, _ = timed(part, trial)
        idle.put(servers)
        if outcome.verdict == CONTINUED:
            shutil.rmtree(trial.folder, ignore_errors=True)
        return trial, outcome

    done = list(pool.map(one, range(max(1, round(share * part.trials)))))
    counts = {verdict: sum(outcome.verdict == verdict for _, outcome in done) for verdict in VERDICTS}
    found = {"trials": len(done), **counts, "seconds": round(time.monotonic() - began, 1)}
    print(_line(part.name, found), flush=True)
    faults = [
        {"trial": trial.number, "verdict": outcome.verdict, "detail": outcome.detail, "story": trial.story}
        for trial, outcome in done
        if outcome.verdict not in VERDICTS[:2] or any("does not say" in each for each in trial.story)
    ]
    for fault in faults:
        print(f"    {fault['verdict']} {fault['trial']}: {fault['detail']}", flush=True)
    return {**found, "faults": faults}


def _line(name: str, found: dict[str, Any]) -> str:
    return f"{name:28}" + "".join(f"{found[key]:>12}" for key in ("trials", *VERDICTS, "seconds"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", help="beginning of a part's name; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of each part's trials")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="keep what the trials left here")
    given = parser.parse_args()
    parts = [part for part in PARTS if not given.part or any(part.name.startswith(each) for each in given.part)]
    folder = given.folder or Path(tempfile.mkdtemp(prefix="durability-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    print(f"{'part':28}" + "".join(f"{word:>12}" for word in ("trials", *VERDICTS, "seconds")))
    found = run_parts(parts, given.jobs, given.seed, given.share, folder)
    total = {key: sum(each[key] for each in found.values()) for key in ("trials", *VERDICTS, "seconds")}
    print(_line("all", total | {"seconds": round(total["seconds"], 1)}))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"seed": given.seed, "parts": found, "all": total}, indent=1) + "\n")
    if given.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return int(total["lost"] + total["silent"] > 0)


raise SystemExit(main())
