"""Sample arguments of the fused step's operators for tests and benchmarks, and what each call costs at least.

Random weights, gradients, moments and averages in flat buffers; two groups, one AdamW and one Adam that maximises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..registry import Cost, Sample
from . import native, reference
from .arguments import TENSORS
from .layout import Coefficient, Segment, State, Telemetry, padded, scratch, tables

FLATS = ("param", "grad", "exp_avg", "exp_avg_sq", "ema")
RESULTS = {  # what a phase writes, its scratch apart
    "accumulate": ("grad", "sums", "state"),
    "measure": ("sums", "telemetry", "steps", "coefficients", "state"),
    "decide": ("telemetry", "steps", "coefficients", "state"),
    "apply": (*FLATS, "telemetry"),
}
SIZES = {
    "few": (5, 4096, 0, 9000, 64, 130),
    "one element": (1,),
    "no element": (0,),
    "many small": tuple(range(0, 300, 7)),
    "long": (4096 * 12 + 1, 65),
}


def buffers(
    numels: Sequence[int],
    live: Sequence[bool] | None = None,
    chunk: int = native.CHUNK,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that the phases need, after a few steps, by name; float32 values whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    groups = [i % 2 for i in range(len(numels))]
    segments, chunks = tables(numels, groups, [True] * len(numels) if live is None else live, chunk)
    partial, tickets = scratch(segments, chunks)
    made: dict[str, Any] = {"chunks": chunks, "segments": segments, "partial": partial, "tickets": tickets}
    made["starts"] = segments[:, Segment.START].tolist()
    made["gradients"] = [torch.randn(n, generator=generator).to(dtype) for n in numels]
    for name in FLATS:
        flat = torch.zeros(sum(padded(n) for n in numels))
        for start, numel in zip(made["starts"], numels, strict=True):
            flat[start : start + numel] = torch.randn(numel, generator=generator)
        made[name] = (flat.square() if name == "exp_avg_sq" else flat).to(dtype)
    count = len(numels)
    made["steps"] = torch.arange(count).float()
    made["sums"] = torch.zeros(count, 2, dtype=torch.float64)
    made["telemetry"] = torch.zeros(count, Telemetry.COUNT)
    made["coefficients"] = torch.zeros(
        count, Coefficient.COUNT, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    hyper = [0.5, 0.999, 1, 1, 1, 5, 0, 0, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, 1, 0, 2e-3, 0.8, 0.99, 1e-6, 0.1, -1, 0, 0]
    made["hyper"] = torch.tensor(hyper, dtype=torch.float64)
    made["state"] = torch.zeros(State.COUNT, dtype=torch.float64)
    for slot, value in (
        (State.SCALE, 8),
        (State.EXTERNAL_SCALE, 1),
        (State.FIRST_BAD, -1),
        (State.GROWTH, 3),
        (State.APPLIED, 3),
    ):
        made["state"][slot] = value
    reference.measure(*(made[name] for name in TENSORS["measure"]), True)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}


def _sample(phase: str, name: str, extra: tuple[Any, ...]) -> Sample:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        made = buffers(SIZES[name], dtype=dtype, device=device, chunk=4096)
        made["gradients"] = [g.to(device) for g in made["gradients"]]
        return *(made[key] for key in TENSORS[phase]), *extra

    return Sample(name, make, small=name != "many small")


COSTS: dict[str, Callable[..., Cost]] = {
    "accumulate": lambda *a: Cost(sum(g.nbytes for g in a[0]) + (4 if a[-2] else 8) * a[2].numel(), 2 * a[2].numel()),
    "measure": lambda *a: Cost(a[0].nbytes, 2 * a[0].numel()),
    "decide": lambda *a: Cost(a[5].nbytes + a[3].nbytes, 40 * a[0].shape[0]),
    "apply": lambda *a: Cost(a[0].nbytes * ((10 if a[4] is not None else 8) - (not a[-1])), 25 * a[0].numel()),
}
EXTRAS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "accumulate": ((0.25, False, True), (2.0, True, False)),
    "measure": ((True,), (False,)),
    "decide": ((),),
    "apply": ((True,), (False,)),
}


def record(phase: str) -> dict[str, Any]:
    """Fields of the phase's `Operator`, apart from its backends."""
    return {
        "reference": getattr(reference, phase),
        "samples": tuple(_sample(phase, name, extra) for name in SIZES for extra in EXTRAS[phase]),
        "cost": COSTS[phase],
        "results": 0,
        "mutates": tuple(i for i, name in enumerate(TENSORS[phase]) if name in RESULTS[phase]),
        "dtypes": (torch.float32,),
    }
