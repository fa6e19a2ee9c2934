"""The Triton kernels at the sizes of N = 144, Q = 10, K = 5, for compilation ahead of time."""

from __future__ import annotations

import triton
import triton.language as tl

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels

POINTERS = dict.fromkeys("f_ptr x_ptr s_ptr target_ptr snr_ptr loss_ptr grad_f_ptr grad_x_ptr".split(), "*fp32")
POINTERS |= {"gram_ptr": "*fp64", "partial_ptr": "*fp64"}
TYPES = POINTERS | dict.fromkeys("n chunk splits groups tiles blocks".split(), "i32")
TYPES |= dict.fromkeys("blend loading target_loading shrink".split(), "fp64")
ALIGNED = (*POINTERS, "n")


def cases() -> list[AotCase]:
    """Every kernel with the factor alone, and with a sample factor and its gradient."""
    return [*_cases("", columns=0, gradients=1), *_cases("-everything", columns=6, gradients=2)]


def _cases(label: str, columns: int, gradients: int) -> list[AotCase]:
    shape = {"Q": 10, "X": columns}
    low = shape | {"K": 5, "TILES": triton.cdiv(15 + columns, 16)}
    width = 10 + columns * (gradients - 1)
    pulls = triton.cdiv(width, triton.cdiv(width, kernels.PULLS_AT_MOST[gradients]))
    apply = low | {"GRADIENTS": gradients, "BLOCK": kernels.APPLY_BLOCK}
    dense = {"GRADIENTS": gradients, "PULLS": pulls, "PACKED": True, "W": tl.float32, "TILE": kernels.DENSE_TILE}
    finish = shape | {"GRADIENTS": gradients, "SPAN": 16, "BLOCK": kernels.FINISH_BLOCK}
    return [
        aot_case(f"gram{label}", kernels.gram_kernel, TYPES, low, ALIGNED, 2),
        aot_case(f"apply{label}", kernels.apply_kernel, TYPES, apply, ALIGNED, 2),
        aot_case(f"dense{label}", kernels.dense_kernel, TYPES, shape | dense, ALIGNED, 2),
        aot_case(f"finish{label}", kernels.finish_kernel, TYPES, finish, ALIGNED, 4, wide=True),
    ]
