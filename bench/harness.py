"""Measures rivals side by side: variants alternate in one process, and repetitions that waited for a core are dropped.

Figures are medians with 20/80 percentiles. On CPU a repetition counts only if no thread of the process stood in a run
queue meanwhile (/proc/self/task/*/schedstat), and the processor time of the process stands beside the wall time: on
a busy machine, with one thread, its ratios still mean something. On a GPU the times come from CUDA events.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Repetition = tuple[float, bool, float]  # seconds, whether it counts, processor seconds
WAIT_ALLOWED_NS = 20_000  # a repetition that waited longer than this for a core, over all threads, does not count


@dataclass(frozen=True)
class Figure:
    """Seconds: median, 20th and 80th percentile; how many repetitions counted, how many were dropped; processor time."""

    median: float
    low: float
    high: float
    kept: int
    dropped: int
    processor: float


def waited_ns() -> int:
    """Time that this process's threads have spent waiting for a core; 0 where the system does not say."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread ended, or the kernel keeps no such statistics
    return total


def _once_cpu(run: Callable[[], Any]) -> Repetition:
    waited, worked, start = waited_ns(), time.process_time(), time.perf_counter()
    run()
    seconds, work = time.perf_counter() - start, time.process_time() - worked
    return seconds, waited_ns() - waited <= WAIT_ALLOWED_NS, work


def _once_cuda(run: Callable[[], Any]) -> Repetition:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e-3, True, 0.0


def _figure(times: list[Repetition]) -> Figure:
    """Percentiles of the repetitions that counted; of all of them where none did, which kept = 0 says."""
    kept = sorted(t for t, fine, _ in times if fine)
    used = kept or sorted(t for t, _, _ in times)
    at = lambda share: used[min(len(used) - 1, int(share * len(used)))]  # noqa: E731
    return Figure(at(0.5), at(0.2), at(0.8), len(kept), len(times) - len(kept), sorted(work for _, _, work in times)[len(times) // 2])


def compare(variants: dict[str, Callable[[], Any]], device: str = "cpu", seconds: float = 4.0, least: int = 5, most: int = 200) -> dict[str, Figure]:
    """Time every variant in turn, round after round, until `seconds` are over; warm-up apart.

    Args:
        variants: name -> call without arguments; compilation happens in the warm-up, outside the figures.
        least, most: rounds; `least` is kept even when the time is over.
    """
    once = _once_cuda if device.startswith("cuda") else _once_cpu
    for run in variants.values():
        run(), run()
    times: dict[str, list[Repetition]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_ in range(most):
            if round_ >= least and time.perf_counter() - start > seconds:
                break
            for name, run in variants.items():
                times[name].append(once(run))
    finally:
        gc.enable()
    return {name: _figure(each) for name, each in times.items()}


def copy_bandwidth(device: str = "cpu", bytes_: int | None = None) -> float:
    """Bytes read and written per second by a plain copy that no cache holds, measured now."""
    size = (bytes_ or (2**30 if device.startswith("cuda") else 2**27)) // 4
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    figure = compare({"copy": lambda: target.copy_(source)}, device, seconds=1.0)["copy"]
    return 8 * size / figure.median


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Memory that a call takes at its highest, beyond what was there: allocator on a GPU, resident set on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not serve this one unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return 0  # not Linux, or not permitted: nothing is claimed


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def record(benchmark: Any, figures: dict[str, Figure], ours: str, **extra: Any) -> None:
    """Put every figure, and each rival's time over ours, into pytest-benchmark's extra_info."""
    benchmark.extra_info.update({name: asdict(figure) for name, figure in figures.items()})
    benchmark.extra_info["times_ours"] = {name: figure.median / figures[ours].median for name, figure in figures.items() if name != ours}
    if figures[ours].processor:
        benchmark.extra_info["processor_times_ours"] = {name: figure.processor / figures[ours].processor for name, figure in figures.items() if name != ours}
    benchmark.extra_info.update(extra)
