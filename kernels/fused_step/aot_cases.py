"""The Triton kernels at the sizes that the launchers use, for compilation ahead of time."""

from __future__ import annotations

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels
from .samples import FLATS

FLOATS = (*FLATS, "telemetry", "steps", "coefficients", "scales")
TYPES = {f"{name}_ptr": "*fp32" for name in FLOATS}
TYPES |= {f"{name}_ptr": "*fp64" for name in ("hyper", "partial", "sums", "state")}
TYPES |= {f"{name}_ptr": "*i32" for name in ("tickets", "halves")}
TYPES |= {f"{name}_ptr": "*i64" for name in ("chunks", "segments", "addresses", "numels")}
POINTERS = tuple(TYPES)
TYPES["tensors"] = "i32"


def cases() -> list[AotCase]:
    """Every kernel, with and without its options."""
    add, chunk, tile = {"ADD": kernels.ADD}, {"CHUNK": kernels.CHUNK}, {"TILE": kernels.TILE}
    joined = {"OVERWRITE": False, "NORM": True, "ALIGNED": True}
    unaligned = {"OVERWRITE": True, "NORM": False, "ALIGNED": False}
    apply, accumulate = kernels.apply_kernel, kernels.accumulate_kernel
    return [
        _case("measure", kernels.measure_kernel, {"FINISH": True} | chunk | add, wide=True),
        _case("decide", kernels.decide_kernel, add, wide=False),
        _case("apply with average, clearing", apply, {"EMA": True, "CLEAR": True} | tile | add, wide=True),
        _case("apply", apply, {"EMA": False, "CLEAR": False} | tile | add, wide=True),
        _case("accumulate and measure", accumulate, joined | chunk | add, wide=True),
        _case("accumulate unaligned", accumulate, unaligned | chunk | add, wide=False),
    ]


def _case(name: str, kernel: object, constexprs: dict[str, object], wide: bool) -> AotCase:
    return aot_case(name, kernel, TYPES, constexprs, POINTERS, kernels.WARPS, wide=wide, max_registers=128)
