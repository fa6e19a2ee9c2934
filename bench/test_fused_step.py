"""What an optimizer step with norm, clipping, averaging and clearing costs: FusedAdamW against what torch offers.

Run: pytest bench/test_fused_step.py --benchmark-json=bench/results/fused_step.json
How time is taken: ris_fast/timing.py. Streaming rate: the better of x *= c and y += c x over arrays of the same size,
in the same run. The bytes of a step: gradient read twice, four buffers read and written, gradient cleared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import record
from torch import nn

from ris_fast import FusedAdamW
from ris_fast.timing import alternate, threads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BYTES = 44  # an element: gradient twice, four buffers read and written, gradient cleared
QUIET, SECONDS = 200, 8.0
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


def in_a_loop(kind: Callable[..., Any], sizes: list[int]) -> Callable[[], None]:
    """A user's loop: `zero_grad()` leaves None, backward hands over fresh tensors, and the step finds them there."""
    params = parameters(sizes)
    fresh, values = [p.grad for p in params], [p.detach() for p in params]
    average = [value.clone() for value in values]
    ours = kind is FusedAdamW
    optimizer = kind(params, lr=1e-3, **({"max_grad_norm": 1.0, "ema_decay": 0.999} if ours else {"fused": True}))

    def step() -> None:
        optimizer.zero_grad()
        for p, gradient in zip(params, fresh, strict=True):
            p.grad = gradient
        if not ours:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if not ours:
            torch._foreach_lerp_(average, values, 1e-3)

    return step


def fused(sizes: list[int], telemetry: bool = True) -> Callable[[], None]:
    optimizer = FusedAdamW(
        parameters(sizes), lr=1e-3, max_grad_norm=1.0, ema_decay=0.999, clear_grads=True, telemetry=telemetry
    )

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def streams(elements: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> call and bytes an element."""
    x, y = torch.randn(elements, device=DEVICE), torch.randn(elements, device=DEVICE)
    return {"stream x *= c": (lambda: x.mul_(1.0000001), 8), "stream y += c x": (lambda: y.add_(x, alpha=1e-9), 12)}


def against(benchmark: Any, elements: int, tensors: int, variants: dict[str, Callable[[], None]], **facts: Any) -> None:
    """Times all variants and the streams in turn; writes ratios and the achieved share of the streaming rate."""
    total, stream = sum(shapes(elements, tensors)), streams(sum(shapes(elements, tensors)))
    found = alternate(
        variants | {name: call for name, (call, _) in stream.items()}, DEVICE, quiet=QUIET, seconds=SECONDS, least=5
    )
    rates = {name: nbytes * total / found[name]["s"] * 1e-9 for name, (_, nbytes) in stream.items()}
    achieved = BYTES * total / found["FusedAdamW"]["s"] * 1e-9
    facts |= {
        "elements": total,
        "tensors": tensors,
        "achieved_GB_s": achieved,
        "stream_GB_s": rates,
        "share_of_streaming": achieved / max(rates.values()),
    }
    record(benchmark, found, "FusedAdamW", device=str(DEVICE), **facts)
    benchmark.pedantic(variants["FusedAdamW"], rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="fused step: against torch")
@pytest.mark.parametrize("count", [1, 2] if DEVICE.type == "cpu" else [1])
@pytest.mark.parametrize(
    "elements, tensors",
    [
        (1_000_000, 2),
        (1_000_000, 150),
        (1_000_000, 2000),
        (16_340_000, 2),
        (16_340_000, 150),
        (16_340_000, 2000),
        (LARGE, 150),
    ],
)
def test_against_torch(benchmark: Any, elements: int, tensors: int, count: int) -> None:
    sizes = shapes(elements, tensors)
    with threads(count):
        variants = {"FusedAdamW": fused(sizes), "FusedAdamW without telemetry": fused(sizes, telemetry=False)}
        variants["torch fused"] = from_torch(sizes, fused=True)
        if elements < LARGE:  # the losing forms at 100 M parameters would need 10 GB and minutes
            variants |= {
                "torch foreach": from_torch(sizes, foreach=True),
                "torch tensor by tensor": from_torch(sizes, foreach=False),
            }
        against(benchmark, elements, tensors, variants, threads=count)


@pytest.mark.benchmark(group="fused step: in a user's loop")
@pytest.mark.parametrize("elements", [1_000_000, 16_340_000])
def test_in_a_users_loop(benchmark: Any, elements: int) -> None:
    """Gradients that come anew in every step, beside those that stay in the flat buffer."""
    sizes = shapes(elements, 150)
    with threads(1):
        variants = {"FusedAdamW": in_a_loop(FusedAdamW, sizes), "FusedAdamW, clear_grads": fused(sizes)}
        against(benchmark, elements, 150, variants | {"torch fused": in_a_loop(torch.optim.AdamW, sizes)}, threads=1)


@pytest.mark.benchmark(group="fused step: against a compiled step")
def test_against_a_compiled_step(benchmark: Any) -> None:
    """torch.compile of clip, AdamW, average and clear; compile time apart."""
    sizes = shapes(16_340_000, 150)
    with threads(1):
        compiled, begin = from_torch(sizes, compiled=True, capturable=DEVICE.type == "cuda"), time.perf_counter()
        compiled()
        seconds = time.perf_counter() - begin
        against(
            benchmark,
            16_340_000,
            150,
            {"FusedAdamW": fused(sizes), "torch compiled": compiled},
            compile_s=seconds,
            threads=1,
        )


@pytest.mark.benchmark(group="fused step: host work")
@pytest.mark.parametrize("tensors", [2, 150, 2000])
def test_host_time(benchmark: Any, tensors: int) -> None:
    """The step on 64 elements a tensor: what Python and the dispatcher cost, for ours and for torch's fused form."""
    sizes = [64] * tensors
    with threads(1):
        rivals = {"torch fused": from_torch(sizes, fused=True), "torch foreach": from_torch(sizes, foreach=True)}
        found = alternate({"FusedAdamW": fused(sizes)} | rivals, DEVICE, quiet=QUIET, seconds=2.0, least=5)
        record(benchmark, found, "FusedAdamW", tensors=tensors, device=str(DEVICE))
        benchmark.pedantic(fused(sizes), rounds=20, warmup_rounds=2)
