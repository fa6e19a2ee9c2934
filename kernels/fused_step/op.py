"""The operators `ris_fast::fused_step_*`, and their implementations by name.

All of them write into their arguments and return nothing; formulas in reference.py, tables and slots in layout.py.
    accumulate  the gradient buffer <- itself or 0, plus scale * a list of gradients; on request with pass one folded in
    measure     pass one, and with `finish` also `decide`
    decide      totals -> norm, skip, clip, counters, loss scale, coefficients
    apply       pass two
Float32 has kernels; other dtypes take the plain torch definition. `sources`, addresses of gradients that are not in the
flat buffer, only the C++ takes: measure(..., sources) and apply(..., sources) read them where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..native import loader
from ..registry import Family
from . import native, reference
from .samples import aot, operators

_TABLES = "Tensor chunks, Tensor segments"
SCHEMAS = {
    "accumulate": (
        f"(Tensor[] gradients, int[] starts, Tensor(a!) grad, {_TABLES}, Tensor(b!) partial, Tensor(c!) sums,"
        " Tensor(d!) state, Tensor(e!) tickets, float scale, bool overwrite, bool norm) -> ()"
    ),
    "measure": (
        f"(Tensor grad, {_TABLES}, Tensor hyper, Tensor(a!) partial, Tensor(b!) sums, Tensor(c!) telemetry, Tensor(d!)"
        " steps, Tensor(e!) coefficients, Tensor(f!) state, Tensor(g!) tickets, bool finish, Tensor? sources=None)"
        " -> ()"
    ),
    "decide": (
        "(Tensor segments, Tensor hyper, Tensor sums, Tensor(a!) telemetry, Tensor(b!) steps, Tensor(c!) coefficients,"
        " Tensor(d!) state) -> ()"
    ),
    "apply": (
        f"(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)? ema, {_TABLES},"
        " Tensor hyper, Tensor(f!) partial, Tensor(g!) telemetry, Tensor coefficients, Tensor state, Tensor(h!)"
        " tickets, bool clear, Tensor? sources=None) -> ()"
    ),
}
LIBRARY = torch.library.Library("ris_fast", "FRAGMENT")


class Backend(NamedTuple):
    """The phases through one implementation, and the longest chunk it likes."""

    accumulate: Callable[..., None]
    measure: Callable[..., None]
    decide: Callable[..., None]
    apply: Callable[..., None]
    chunk: int


def _lowest(phase: str, args: tuple[Any, ...]) -> torch.dtype:
    """dtype that decides which implementation can serve a call."""
    if phase == "accumulate":
        odd = [g.dtype for g in args[0] if g.dtype not in (torch.float32, torch.bfloat16)]
        return odd[0] if odd else args[2].dtype
    return args[0].dtype if phase != "decide" else args[5].dtype


def _cpu(phase: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        served = loader.available() and _lowest(phase, args) == torch.float32
        getattr(native if served else reference, phase)(*args)

    return run


def _cuda(phase: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        from . import triton_kernels  # here, because a CPU user need not pay for triton's import

        getattr(triton_kernels if _lowest(phase, args) == torch.float32 else reference, phase)(*args)

    return run


def _fake(*args: Any) -> None:
    """Nothing is returned, so there is no shape to know."""


for _phase, _schema in SCHEMAS.items():
    LIBRARY.define(f"fused_step_{_phase}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(f"fused_step_{_phase}", _cpu(_phase), "CPU")
    LIBRARY.impl(f"fused_step_{_phase}", _cuda(_phase), "CUDA")
    torch.library.register_fake(f"ris_fast::fused_step_{_phase}", _fake, lib=LIBRARY)


def _operators(chunk: int) -> Backend:
    ops = torch.ops.ris_fast
    return Backend(
        ops.fused_step_accumulate, ops.fused_step_measure, ops.fused_step_decide, ops.fused_step_apply, chunk
    )


def backends() -> dict[str, Backend]:
    """What can run here, by name; "native" and "triton" serve float32 on CPU and CUDA."""
    found = {
        "reference": Backend(reference.accumulate, reference.measure, reference.decide, reference.apply, native.CHUNK)
    }
    if loader.available():
        found["native"] = _operators(native.CHUNK)
    if torch.cuda.is_available():
        found["triton"] = _operators(4096)
    return found


def _triton(phase: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        from . import triton_kernels

        getattr(triton_kernels, phase)(*args)

    return run


FAMILY = Family("fused_step", operators(lambda phase: {"cpp": getattr(native, phase), "triton": _triton(phase)}), aot)
