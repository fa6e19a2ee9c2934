"""What this machine is, how much memory it has free, and which kernels will run on it, and why."""

from __future__ import annotations

import os
import platform
import sys
from ctypes import CDLL, c_int
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ris_fast.thread_policy import thread_policy

PACKAGES = ("ris-fast", "torch", "triton", "numpy", "safetensors", "cyclopts", "rich", "matplotlib")


def environment() -> dict[str, Any]:
    """Versions, processor, memory, thread policy, GPUs, and the backend of each kernel on each device with the reason.

    Plain texts and numbers only, so that it can be written as JSON.
    """
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "threads": thread_policy(),
        "gpus": _gpus(),
        "kernels": _kernels(),
    }


def fallback_note() -> str | None:
    """One line where the CPU's kernels cannot run and plain torch does their work; None where they can.

    Cheap enough for the start of every run: it looks for the library and imports no operator.
    """
    from ris_fast.kernels.native import loader

    if loader.available():
        return None
    return (
        f"no C++ kernels here: {loader.why_not()}. Plain torch does their work, correct and several times slower. "
        "Reinstall ris-fast with cmake and a C++ compiler on PATH."
    )


def keep_freed_memory() -> bool:
    """Has glibc keep what this process frees, for the next request, instead of returning it to the system.

    A training step frees and asks for the same 70 MB every time, and memory that comes anew from the system costs a
    page fault every 4 kB: a tenth of a step of the network `original`. Returns whether it was told; with another C
    library nothing happens.
    """
    if sys.platform != "linux":
        return False
    try:
        tell = CDLL(None).mallopt
    except AttributeError:
        return False
    options = {-3: 2**30, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>, bytes
    return all([tell(c_int(option), c_int(value)) for option, value in options.items()])


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def rank_number() -> int:
    """Of this process among those that were started together; 0 where it is the only one."""
    return int(os.environ["RANK"]) if launched() else 0


def free_memory() -> float:
    """Bytes that this process may still take: what the machine has available, or its control group allows, if less; of
    several ranks on a machine each may take its part."""
    free = _available_memory()
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
            free = min(free, max(0, most - now))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return free / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def local_ranks() -> tuple[int, int]:
    """This process's number among those of the run on this machine, and how many these are, as torchrun says."""
    size = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    return min(int(os.environ.get("LOCAL_RANK") or 0), size - 1), size


def _available_memory() -> float:
    """The kernel's estimate; half of the memory on a system that has none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": _cpu_name(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):  # not on every system
        return float("nan")


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [(index, torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())]
    return [
        {
            "index": index,
            "name": gpu.name,
            "memory_gib": gpu.total_memory / 2**30,
            "capability": f"{gpu.major}{gpu.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
        }
        for index, gpu in found
    ]


def _kernels() -> list[dict[str, str]]:
    import torch

    from ris_fast.kernels.native import loader
    from ris_fast.kernels.registry import operators

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    cpu = ("C++", loader.describe().removeprefix("C++ ")) if loader.available() else ("plain torch", loader.why_not())
    gpu = (
        ("Triton", f"triton {_version('triton')}")
        if find_spec("triton")
        else ("nothing", "triton is not installed: use --device cpu")
    )
    chosen = {"cpu": ("cpp", cpu), "cuda": ("triton", gpu)}
    return [_kernel(operator, device, *chosen[device]) for operator in operators() for device in devices]


def _kernel(operator: Any, device: str, wanted: str, choice: tuple[str, str]) -> dict[str, str]:
    backend, reason = choice
    if wanted not in operator.backends:
        backend, reason = "plain torch", f"{operator.name} has no {wanted} kernel"
    elif wanted in operator.limits:
        reason = f"{reason}, {operator.limits[wanted]}"
    return {"kernel": operator.name, "device": device, "backend": backend, "reason": reason}
