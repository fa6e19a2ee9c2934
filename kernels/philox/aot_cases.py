"""The Triton kernel at its tuned size, for compilation ahead of time."""

from __future__ import annotations

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels

TYPES = {"out_ptr": "*fp32", "index_ptr": "*i64", "rows": "i32", "count": "i32", "blocks": "i32"}
TYPES |= {"seed": "i64", "stream": "i64"}


def cases() -> list[AotCase]:
    """Both laws, with and without 128-bit stores."""
    return [_case(normal, whole) for normal in (True, False) for whole in (True, False)]


def _case(normal: bool, whole: bool) -> AotCase:
    name = f"{'normal' if normal else 'uniform'}-{'whole' if whole else 'ragged'}"
    constexprs = {"NORMAL": normal, "WHOLE": whole, "BLOCKS": kernels.BLOCKS}
    aligned = ("out_ptr", "index_ptr", *(("count",) if whole else ()))
    kernel = kernels.philox_kernel
    return aot_case(name, kernel, TYPES, constexprs, aligned, kernels.WARPS, wide=whole, max_registers=48)
