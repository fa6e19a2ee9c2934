"""What only a device knows: launches and waits of a step by the profiler, and energy by the driver."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ris_fast.timing import synchronize

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def launches_and_waits(call: Callable[[], Any], device: torch.device, steps: int = 3) -> dict[str, Any]:
    """Per step. On a GPU: launches, kernels, waits by the runtime's own names, and what torch's debug mode calls
    synchronising.

    On a CPU, where nothing is launched: operators without operators inside, and the host reads (`item`) among them,
    each of which would be a wait on a GPU.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            call()
        # the profiler waits for the device when it stops, so that much is its own
    counts = Counter({event.key: event.count for event in profiler.key_averages()})
    if not cuda:
        leaves = sum(1 for event in profiler.events() if not event.cpu_children and "::" in event.name)
        return {
            "device": "no GPU",
            "operators": leaves / steps,
            "host_reads": counts["aten::_local_scalar_dense"] / steps,
        }
    kernels = sum(1 for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return {
        "launches": sum(counts[name] for name in LAUNCHES) / steps,
        "device_activities": kernels / steps,
        "waits_by_name_all_steps": {name: counts[name] for name in WAITS},
        "synchronising_calls": synchronising_calls(call, steps) / steps,
    }


def synchronising_calls(call: Callable[[], Any], steps: int) -> int:
    """How many operations of `steps` calls torch itself knows to wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message).lower() for warning in caught)


def energy(call: Callable[[], Any], device: torch.device, scenes: int, seconds: float = 5.0) -> dict[str, Any]:
    """Joules a scene over at least `seconds`, with the clock and what throttled it, by nvidia-ml-py; "no GPU" on a
    CPU."""
    if device.type != "cuda":
        return {"joules_a_scene": None, "note": "no GPU"}
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # no library, no driver access, or a card that does not count
        return {"joules_a_scene": None, "note": f"the driver does not say: {type(error).__name__}: {error}"}
    synchronize(device)
    calls, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(10):
            call()
        synchronize(device)
        calls += 10
    elapsed = time.perf_counter() - begin
    joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) * 1e-3
    return {
        "joules_a_scene": joules / (calls * scenes),
        "watts": joules / elapsed,
        "seconds": elapsed,
        "clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "throttle_reasons": hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
