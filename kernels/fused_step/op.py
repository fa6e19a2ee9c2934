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
from ..registration import register, triton_function
from ..registry import Family, Operator
from . import native, reference
from .arguments import TENSORS
from .samples import record

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


class Backend(NamedTuple):
    """The phases through one implementation, and the longest chunk it likes."""

    accumulate: Callable[..., None]
    measure: Callable[..., None]
    decide: Callable[..., None]
    apply: Callable[..., None]
    chunk: int


_DECISIVE = {"accumulate": "grad", "measure": "grad", "decide": "coefficients", "apply": "param"}  # whose dtype counts


def _served(kernels: Callable[..., None], phase: str, library: bool) -> Callable[..., None]:
    """The kernels for float32, the definition for every other dtype; library: the kernels need the C++ library."""
    plain, position = getattr(reference, phase), TENSORS[phase].index(_DECISIVE[phase])
    with_gradients = phase == "accumulate"

    def run(*args: Any) -> None:
        ready = args[position].dtype == torch.float32 and (not library or loader.available())
        if ready and with_gradients:
            ready = all(gradient.dtype in (torch.float32, torch.bfloat16) for gradient in args[0])
        (kernels if ready else plain)(*args)

    return run


def _fake(*args: Any) -> None:
    """Nothing is returned, so there is no shape to know."""


def _register(phase: str) -> Operator:
    cpp, triton = getattr(native, phase), triton_function(__package__, phase)
    return register(
        f"fused_step_{phase}{SCHEMAS[phase]}",
        cpu=_served(cpp, phase, library=True),
        cuda=_served(triton, phase, library=False),
        fake=_fake,
        backends={"cpp": cpp, "triton": triton},
        **record(phase),
    )


FAMILY = Family("fused_step", tuple(_register(phase) for phase in SCHEMAS))


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
