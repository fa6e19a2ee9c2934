"""How fast training is with threads that wait in different ways, alone and beside other programs: `python -m
bench.threads`, under ten minutes, Linux only.

One process for each policy, all built before the first measurement and asleep but for the one that is measured; the
policies alternate in rounds beside each load. A measurement during which anything else had more than a tenth of a core
is repeated, as time allows, else marked. Writes bench/results/threads.json and prints the table of docs/threads.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ris_fast.thread_policy import MARK, THEIRS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "threads.json"
POLICIES: dict[str, dict[str, str]] = {
    "as libgomp comes": {},
    "`GOMP_SPINCOUNT=100000`": {"GOMP_SPINCOUNT": "100000"},
    "`GOMP_SPINCOUNT=10000`": {"GOMP_SPINCOUNT": "10000"},
    "`GOMP_SPINCOUNT=1000`": {"GOMP_SPINCOUNT": "1000"},
    "`OMP_WAIT_POLICY=passive`": {"OMP_WAIT_POLICY": "passive"},
}
BUSY = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"]
TESTS = ["sh", "-c", f"while kill -0 $PPID; do {sys.executable} -m pytest -n 2 tests/physics; done"]
LOADS: dict[str, list[list[str]]] = {
    "alone": [],
    "beside one busy loop": [BUSY],
    "beside two": [BUSY, BUSY],
    "beside a test run": [TESTS],
}
SECONDS, SETTLE, LIMIT = 3.0, 3.0, 540.0  # of a measurement; of a load before the first one; of everything
OTHERS = 0.1  # cores that nobody accounts for, beyond which a measurement is disturbed
TICK = os.sysconf("SC_CLK_TCK")


def worker(preset: str) -> None:
    """Trains for as many seconds as each line of standard input says, and answers with scenes a second."""
    from ris_fast.benchmarks.training import step_call
    from ris_fast.commands.bench import configured
    from ris_fast.timing import torch

    config = configured(preset, torch.device("cpu"))
    step, _ = step_call(config, config.training.batch_size)
    print("ready", flush=True)
    for line in sys.stdin:
        step()
        count, begin = 0, time.perf_counter()
        while (seconds := time.perf_counter() - begin) < float(line):
            step()
            count += 1
        print(count * config.training.batch_size / seconds, flush=True)


class Worker:
    """A process that trains when it is asked to, under one policy."""

    def __init__(self, policy: dict[str, str], preset: str) -> None:
        unset = {"OMP_NUM_THREADS", MARK, *THEIRS}
        environ = {name: value for name, value in os.environ.items() if name not in unset} | policy
        words = [sys.executable, "-m", "bench.threads", "--worker", preset]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def rate(self, seconds: float) -> float:
        print(seconds, file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("bench.threads: a worker failed; its error is above.")
        return line.strip()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def loaded(commands: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Runs programs beside the block, each a session of its own; gives the numbers of these sessions."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(words, cwd=ROOT, start_new_session=True, **quiet) for words in commands]
    try:
        time.sleep(SETTLE if running else 0.0)
        yield [each.pid for each in running]
    finally:
        for each in running:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()


def busy_s() -> float:
    """Seconds that the processors have worked so far, for whomever."""
    user, nice, system, _idle, _wait, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / TICK


def used_s(process: int, sessions: Sequence[int]) -> float:
    """Seconds of a process and of all in these sessions, with their children that have ended."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(path.parent.name) == process or int(fields[3]) in sessions:
            total += sum(map(int, fields[11:15]))
    return total / TICK


def measure(worker: Worker, sessions: Sequence[int], seconds: float) -> dict[str, Any]:
    """One measurement, with the load average before it and the cores that others had meanwhile."""
    load, began = os.getloadavg()[0], time.perf_counter()
    foreign = busy_s() - used_s(worker.process.pid, sessions)
    rate = worker.rate(seconds)
    foreign = busy_s() - used_s(worker.process.pid, sessions) - foreign
    others = foreign / (time.perf_counter() - began)
    return {"scenes_per_s": rate, "load": load, "others": max(0.0, others), "disturbed": others > OTHERS}


def compare(preset: str, rounds: int, seconds: float, limit: float) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Load -> policy -> measurements. Disturbed ones are made again, twice at most, while `limit` allows."""
    began, found = time.monotonic(), {load: {name: [] for name in POLICIES} for load in LOADS}
    with ExitStack() as stack:
        workers = {name: Worker(policy, preset) for name, policy in POLICIES.items()}
        for each in workers.values():
            stack.callback(each.end)
        for position, (load, commands) in enumerate(LOADS.items()):
            due = limit * (position + 1) / len(LOADS)
            with loaded(commands) as sessions:
                for turn in range(rounds):
                    print(f"{load}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
                    for name, process in workers.items():
                        row = measure(process, sessions, seconds)
                        left = (rounds - turn) * len(POLICIES) * seconds
                        for _ in range(2):
                            if row["disturbed"] and time.monotonic() - began + left < due:
                                row = measure(process, sessions, seconds)
                        found[load][name].append(row)
    return found


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Markdown: median and range of the undisturbed measurements; of all, with a star, where there are fewer than
    three."""
    lines = [f"| | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for policy in POLICIES:
        cells = []
        for rows in (each[policy] for each in found.values()):
            calm = [row["scenes_per_s"] for row in rows if not row["disturbed"]]
            rates = calm if len(calm) >= min(3, len(rows)) else [row["scenes_per_s"] for row in rows]
            star = "" if rates is calm else " *"
            cells.append(f"{statistics.median(rates):,.0f} ({min(rates):,.0f} .. {max(rates):,.0f}){star}")
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each measurement")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", metavar="PRESET", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        return worker(given.worker)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the loads are ended too
    found = compare(given.preset, given.rounds, given.seconds, LIMIT)
    from ris_fast.environment import environment  # torch is imported here, after everything is measured
    from ris_fast.files import write_text

    known = {key: value for key, value in environment().items() if key in ("python", "versions", "cpu")}
    result = {"env": known, "preset": given.preset, "seconds": given.seconds, "scenes_per_s": found}
    write_text(given.out, json.dumps(result, indent=1) + "\n")
    print(table(found))
    if any(each["disturbed"] for load in found.values() for policy in load.values() for each in policy):
        print("\n`*`: other programs disturbed these", file=sys.stderr)


if __name__ == "__main__":
    main()
