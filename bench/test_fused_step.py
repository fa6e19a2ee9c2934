"""What an optimizer step with norm, clipping, averaging and clearing costs: FusedAdamW against what torch offers.

Run: pytest bench/test_fused_step.py --benchmark-json=bench/results/fused_step.json
Variants alternate in one process; a repetition in which a thread waited for a core is set aside and counted; medians
with 20/80 percentiles are in extra_info. Streaming rate: the best of x *= c and y += c x over arrays of the same size,
in the same run. On a GPU time is measured with CUDA events, and host time is that of the call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ris_fast import FusedAdamW
from ris_fast.kernels.native import loader

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BYTES = 44  # an element: gradient twice, four buffers read and written, gradient cleared
QUIET, SECONDS, WAIT_SHARE = 15, 12.0, 0.02
LARGE = 100_000_000


def shapes(elements: int, tensors: int) -> list[int]:
    """Half of the tensors are biases of 512, the others share what is left."""
    biases = tensors // 2
    return [512] * biases + [(elements - 512 * biases) // (tensors - biases)] * (tensors - biases)


def parameters(sizes: list[int]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in sizes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def from_torch(sizes: list[int], compiled: bool = False, **options: Any) -> Callable[[], None]:
    """Clip, step, average, clear, as a user assembles it."""
    params = parameters(sizes)
    values, average = [p.detach() for p in params], [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=torch.tensor(1e-3) if compiled else 1e-3, **options)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, values, 1e-3)
        optimizer.zero_grad(set_to_none=False)

    return torch.compile(step, dynamic=False) if compiled else step


def fused(sizes: list[int], telemetry: bool = True) -> Callable[[], None]:
    optimizer = FusedAdamW(parameters(sizes), lr=1e-3, max_grad_norm=1.0, ema_decay=0.999, clear_grads=True, telemetry=telemetry)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def streams(elements: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> call and bytes an element."""
    x, y = torch.randn(elements, device=DEVICE), torch.randn(elements, device=DEVICE)
    return {"stream x *= c": (lambda: x.mul_(1.0000001), 8), "stream y += c x": (lambda: y.add_(x, alpha=1e-9), 12)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waited_ns() -> int:
    """Time that the threads of this process were ready but had no core, so far."""
    return sum(int(path.read_text().split()[1]) for path in Path("/proc/self/task").glob("*/schedstat"))


def once(call: Callable[[], Any]) -> tuple[float, float, bool]:
    """Device seconds, host seconds, and whether the process was left in peace."""
    waited, begin = waited_ns(), time.perf_counter()
    if DEVICE == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        return start.elapsed_time(stop) * 1e-3, host, True
    call()
    seconds = time.perf_counter() - begin
    return seconds, seconds, (waited_ns() - waited) * 1e-9 <= WAIT_SHARE * seconds


def alternate(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Rounds over all calls until every one has QUIET undisturbed repetitions, or time is up."""
    for call in calls.values():
        call(), call()
    seen: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in calls}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end and any(sum(ok for *_, ok in runs) < QUIET for runs in seen.values()):
        for name, call in calls.items():
            seen[name].append(once(call))
    return {name: summary(runs) for name, runs in seen.items()}


def summary(runs: list[tuple[float, float, bool]]) -> dict[str, float]:
    """Over undisturbed repetitions; where there was none, over all, and `undisturbed` says 0."""
    kept = [run for run in runs if run[2]] or runs
    times = sorted(run[0] for run in kept)
    return {"s": statistics.median(times), "p20_s": times[len(times) // 5], "p80_s": times[len(times) * 4 // 5], "least_s": times[0],
            "host_s": statistics.median(run[1] for run in kept), "undisturbed": sum(run[2] for run in runs), "disturbed": sum(not run[2] for run in runs)}  # fmt: skip


def compare(benchmark: Any, elements: int, tensors: int, variants: dict[str, Callable[[], None]], facts: dict[str, Any]) -> None:
    sizes = shapes(elements, tensors)
    stream = streams(sum(sizes))
    found = alternate(variants | {name: call for name, (call, _) in stream.items()})
    ours = found["FusedAdamW"]["s"]
    rates = {name: nbytes * sum(sizes) / found[name]["s"] * 1e-9 for name, (_, nbytes) in stream.items()}
    info = {"elements": sum(sizes), "tensors": len(sizes), "achieved_GB_s": BYTES * sum(sizes) / ours * 1e-9, "stream_GB_s": rates}
    info["share_of_streaming"] = info["achieved_GB_s"] / max(rates.values())
    info["times_slower_than_ours"] = {name: found[name]["s"] / ours for name in variants}
    benchmark.extra_info.update(info | facts, variants=found, device=DEVICE, backend=loader.describe(), torch=torch.__version__)
    benchmark.pedantic(variants["FusedAdamW"], rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="fused step: against torch")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("elements, tensors", [(1_000_000, 2), (1_000_000, 150), (1_000_000, 2000), (16_340_000, 2), (16_340_000, 150), (16_340_000, 2000), (LARGE, 150)])
def test_against_torch(benchmark: Any, elements: int, tensors: int, count: int) -> None:
    sizes = shapes(elements, tensors)
    with threads(count):
        variants = {"FusedAdamW": fused(sizes), "FusedAdamW without telemetry": fused(sizes, telemetry=False)}
        variants["torch fused"] = from_torch(sizes, fused=True)
        if elements < LARGE:  # the losing forms at 100 M parameters would need 10 GB and minutes
            variants |= {"torch foreach": from_torch(sizes, foreach=True), "torch tensor by tensor": from_torch(sizes, foreach=False)}
        compare(benchmark, elements, tensors, variants, {"threads": count})


@pytest.mark.benchmark(group="fused step: against a compiled step")
def test_against_a_compiled_step(benchmark: Any) -> None:
    """torch.compile of clip, AdamW, average and clear; compile time apart."""
    sizes = shapes(16_340_000, 150)
    with threads(1):
        compiled, begin = from_torch(sizes, compiled=True, capturable=DEVICE == "cuda"), time.perf_counter()
        compiled()
        facts = {"compile_s": time.perf_counter() - begin, "threads": 1}
        compare(benchmark, 16_340_000, 150, {"FusedAdamW": fused(sizes), "torch compiled": compiled}, facts)


@pytest.mark.benchmark(group="fused step: host work")
@pytest.mark.parametrize("tensors", [2, 150, 2000])
def test_host_time(benchmark: Any, tensors: int) -> None:
    """The step on 64 elements a tensor: what Python and the dispatcher cost, for ours and for torch's fused form."""
    sizes = [64] * tensors
    with threads(1):
        found = alternate({"FusedAdamW": fused(sizes), "torch fused": from_torch(sizes, fused=True), "torch foreach": from_torch(sizes, foreach=True)})
        benchmark.extra_info.update(variants=found, tensors=tensors, device=DEVICE)
        benchmark.pedantic(fused(sizes), rounds=20, warmup_rounds=2)
