"""How time is taken: variants alternate in one process, and a repetition in which a thread waited for a core is set aside.

On a GPU time is that between two CUDA events, and host time is that of the call; on a CPU both are the wall clock's.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ris_fast.environment import environment

QUIET, SECONDS, WAIT_SHARE = 7, 20.0, 0.02
Run = tuple[float, float, bool]           # device seconds, host seconds, left in peace


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waited_ns() -> int:
    """Time that the threads of this process were ready but had no core, so far; 0 where the system does not say."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except OSError:  # the thread ended in the meantime
            continue
    return total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], Any], device: torch.device) -> Run:
    """One call, timed."""
    synchronize(device)
    waited, begin = waited_ns(), time.perf_counter()
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        host = time.perf_counter() - begin
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3, host, True
    call()
    seconds = time.perf_counter() - begin
    return seconds, seconds, (waited_ns() - waited) * 1e-9 <= WAIT_SHARE * seconds


def summary(runs: list[Run]) -> dict[str, float]:
    """Medians and percentiles over undisturbed repetitions; where there was none, over all, and `undisturbed` says 0."""
    kept = [run for run in runs if run[2]] or runs
    times = sorted(run[0] for run in kept)
    return {"s": statistics.median(times), "p20_s": times[len(times) // 5], "p80_s": times[len(times) * 4 // 5],
            "least_s": times[0], "host_s": statistics.median(run[1] for run in kept),
            "undisturbed": sum(run[2] for run in runs), "disturbed": sum(not run[2] for run in runs)}


def alternate(calls: Mapping[str, Callable[[], Any]], device: torch.device, *, quiet: int = QUIET,
              seconds: float = SECONDS, warm: int = 2) -> dict[str, dict[str, float]]:
    """Rounds over all calls until every one has `quiet` undisturbed repetitions, or time is up; at least one round."""
    for call in calls.values():
        for _ in range(warm):
            call()
    seen: dict[str, list[Run]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while any(sum(ok for *_, ok in runs) < quiet for runs in seen.values()):
        for name, call in calls.items():
            seen[name].append(once(call, device))
        if time.perf_counter() >= end:
            break
    return {name: summary(runs) for name, runs in seen.items()}


class Stopwatch:
    """Time between laps of one pass over several phases; on a GPU by events, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.names = device, []
        self.marks = [self._mark()]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        self.names.append(name)
        self.marks.append(self._mark())

    def read(self) -> dict[str, float]:
        """Seconds of each phase; waits for the device."""
        synchronize(self.device)
        gap = (lambda a, b: a.elapsed_time(b) * 1e-3) if self.device.type == "cuda" else (lambda a, b: b - a)
        return {name: gap(a, b) for name, a, b in zip(self.names, self.marks, self.marks[1:])}


def ceiling(device: torch.device, precision: str = "fp32", seconds: float = 2.0) -> float:
    """FLOP/s of one large matrix product in this precision, the best of several calls: the most that can be hoped for.

    On a CPU both libraries that torch may call are tried, and the faster one counts.
    """
    from ris_fast.models.linear import linear

    size = 8192 if device.type == "cuda" else 1536
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    kinds = {"matmul": lambda: a @ b} | ({"linear": lambda: linear(a, b)} if device.type == "cpu" else {})
    found = alternate(kinds, device, quiet=5, seconds=seconds, warm=1)
    return 2.0 * size**3 / min(each["least_s"] for each in found.values())


def conditions(device: torch.device) -> dict[str, Any]:
    """What a figure must be read with: commit, versions, processor, threads, device. Names no host."""
    found = environment()
    return {"commit": commit(), "device": str(device), "threads": torch.get_num_threads(), "versions": found["versions"],
            "python": found["python"], "cpu": found["cpu"], "gpus": found["gpus"] or "no GPU", "kernels": found["kernels"]}


def commit() -> str:
    """The commit of the code that runs, with + where the working tree differs; 'unknown' outside a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
