"""How time and memory are taken: variants alternate in one process; a repetition that waited for a core is set aside.

On a GPU time is that between two CUDA events, and host time is that of the call; on a CPU both are the wall clock's.
Processor time is that of the whole process: on a busy machine, with one thread, its ratios still mean something.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ris_fast.environment import environment
from ris_fast.streams import stage

QUIET, SECONDS, WAIT_SHARE = 7, 20.0, 0.02
Found = dict[str, dict[str, float]]  # name of a variant -> its summary


class Run(NamedTuple):
    """One repetition: seconds on the device, on the host and of processors, and whether no thread waited for a core."""

    device: float
    host: float
    processor: float
    quiet: bool


class Stopped(KeyboardInterrupt):
    """Ctrl-C while something was measured; `found` holds what was known by then, as the result would."""

    def __init__(self, found: Any) -> None:
        super().__init__("stopped")
        self.found = found


@contextmanager
def keeping(found: Callable[[], Any]) -> Iterator[None]:
    """Within the block Ctrl-C becomes Stopped with `found()`; one that already is Stopped too."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Stopped(found()) from interrupt


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
        except (OSError, IndexError):  # the thread ended in the meantime, or the system keeps no such statistics
            continue
    return total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], Any], device: torch.device) -> Run:
    """One call, timed."""
    synchronize(device)
    waited, worked, begin = waited_ns(), time.process_time(), time.perf_counter()
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        host = time.perf_counter() - begin
        stop.synchronize()
        return Run(start.elapsed_time(stop) * 1e-3, host, time.process_time() - worked, True)
    call()
    seconds, work = time.perf_counter() - begin, time.process_time() - worked
    return Run(seconds, seconds, work, (waited_ns() - waited) * 1e-9 <= WAIT_SHARE * seconds)


def summary(runs: list[Run]) -> dict[str, float]:
    """Medians and percentiles over undisturbed repetitions; where there was none, over all, and `undisturbed` says 0.

    Processor time is a mean: its clock ticks coarsely on some systems.
    """
    kept = [run for run in runs if run.quiet] or runs
    times = sorted(run.device for run in kept)
    return {
        "s": statistics.median(times),
        "p20_s": times[len(times) // 5],
        "p80_s": times[len(times) * 4 // 5],
        "least_s": times[0],
        "fastest_s": min(run.device for run in runs),
        "host_s": statistics.median(run.host for run in kept),
        "processor_s": statistics.fmean(run.processor for run in kept),
        "undisturbed": sum(run.quiet for run in runs),
        "disturbed": sum(not run.quiet for run in runs),
    }


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    quiet: int = QUIET,
    seconds: float = SECONDS,
    warm: int = 2,
    least: int = 1,
) -> Found:
    """Rounds over all calls until every one has `quiet` undisturbed repetitions, or time is up; `least` rounds anyhow.

    Raises Stopped at Ctrl-C, with what the whole rounds before it have shown.
    """
    for name, call in calls.items():
        stage(f"warming up: {name}")
        for _ in range(warm):
            call()
    seen: dict[str, list[Run]] = {name: [] for name in calls}
    with (
        no_garbage_collection(),
        keeping(lambda: {name: summary(runs) for name, runs in seen.items()} if all(seen.values()) else {}),
    ):
        rounds, end, shown = 0, time.perf_counter() + seconds, 0.0
        while rounds < least or (
            time.perf_counter() < end and any(sum(run.quiet for run in runs) < quiet for runs in seen.values())
        ):
            for name, call in calls.items():
                seen[name].append(once(call, device))
            rounds += 1
            if time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                stage(f"measuring {', '.join(calls)}: round {rounds}, at most {max(0.0, end - shown):.0f} s more")
    return {name: summary(runs) for name, runs in seen.items()}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects now and not within the block, where it would fall upon one variant by chance."""
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def times_slower(found: Found, ours: float, key: str = "s") -> dict[str, float]:
    """Each variant's time over `ours`."""
    return {name: each[key] / ours for name, each in found.items()}


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


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes read and written per second by a plain copy of `size` bytes, which no cache holds, measured now."""
    elements = (size or (2**30 if device.type == "cuda" else 2**27)) // 4
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    return 8 * elements / alternate({"copy": lambda: target.copy_(source)}, device, quiet=200, seconds=1.0)["copy"]["s"]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Memory that a call takes at its highest, beyond what was there: allocator on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not serve this one unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return 0  # not Linux, or not permitted: nothing is claimed


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def conditions(device: torch.device) -> dict[str, Any]:
    """What a figure must be read with: commit, versions, processor, threads, device. Names no host."""
    found = environment()
    return {
        "commit": commit(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": found["versions"],
        "python": found["python"],
        "cpu": found["cpu"],
        "gpus": found["gpus"] or "no GPU",
        "kernels": found["kernels"],
    }


def commit() -> str:
    """The commit of the code that runs, with + where the working tree differs; outside a repository what
    RIS_FAST_COMMIT says, else 'unknown'."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RIS_FAST_COMMIT", "unknown")
