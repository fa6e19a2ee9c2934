"""Inputs on which cov_nmse is tested and measured, and what a call must cost at least.

Letters: B batch, N RIS elements, Q factor columns, K target columns, X sample columns; a last axis of 2 is (re, im).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import Cost, Sample
from .reference import Arguments, compute_dtype

Tensors = dict[str, Tensor | None]


def random_tensors(b: int, n: int, q: int, k: int, x: int, dense: bool, seed: int = 0) -> Tensors:
    """Factor, target of K unit-norm-like columns with powers over 20 dB, sample factor and SNR; float64 on CPU."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    target = normal(b, n, k, 2) * torch.logspace(0, -1, k, dtype=torch.float64)[:, None]
    out: Tensors = {"factor": normal(b, n, q, 2), "target_factor": target, "target_cov": None}
    out["sample_factor"] = normal(b, n, x, 2) if x else None
    out["snr_db"] = 12.5 * normal(b).tanh() + 7.5
    if dense:
        target_BNK = torch.view_as_complex(target)
        out["target_factor"], out["target_cov"] = None, torch.view_as_real(target_BNK @ target_BNK.mH)
    return out


def _arguments(
    tensors: Tensors, settings: dict[str, float], gradients: int, device: Any, dtype: torch.dtype
) -> tuple[Any, ...]:
    moved = [None if (x := tensors[name]) is None else x.to(device, dtype) for name in Arguments._fields[:5]]
    if not settings.get("shrink"):
        moved[4] = None
    values = {"blend": 0.0, "loading": 0.0, "target_loading": 0.0, "shrink": 0.0} | settings
    return *moved, *values.values(), gradients


def _sample(
    name: str,
    shape: tuple[int, ...],
    dense: bool,
    settings: dict[str, float] | None = None,
    *,
    edit: Callable[[Tensors], None] | None = None,
    strided: bool = False,
    small: bool = False,
    gradcheck: bool = False,
) -> Sample:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        tensors = random_tensors(*shape, dense=dense)
        if edit:
            edit(tensors)
        args = list(_arguments(tensors, settings or {}, 2 if shape[4] else 1, device, dtype))
        if strided:  # every second row of a transposed copy: same values, not contiguous
            args[0] = args[0].repeat_interleave(2, 1).transpose(1, 2).contiguous().transpose(1, 2)[:, ::2]
        return tuple(args)

    return Sample(f"{name}-{'dense' if dense else 'lowrank'}", make, (0, 3) if shape[4] else (0,), small, gradcheck)


def _zero_column(t: Tensors) -> None:
    for name in ("factor", "target_factor"):
        if t[name] is not None:
            t[name][:, :, -1] = 0


def _rank_deficient(t: Tensors) -> None:
    t["factor"][:, :, 1:] = t["factor"][:, :, :1]


def _zero_factor(t: Tensors) -> None:
    t["factor"][0] = 0


def _scale(factor: float, target: float) -> Callable[[Tensors], None]:
    def edit(t: Tensors) -> None:
        t["factor"] *= factor
        for name, power in (("target_factor", 1), ("target_cov", 2)):
            if t[name] is not None:
                t[name] *= target**power

    return edit


def _equal_sources(t: Tensors) -> None:
    if t["target_factor"] is not None:
        t["target_factor"][:, :, 1:] = t["target_factor"][:, :, :1]
    else:
        column = torch.view_as_complex(t["factor"][:, :, 0].contiguous() + 1)[:, :, None]
        t["target_cov"] = torch.view_as_real(2 * column @ column.mH)


ALL = {"blend": 0.3, "loading": 0.5, "target_loading": 0.5, "shrink": 1e-2}
ONE_SIDED = {"loading": 1.0, "target_loading": 0.0, "shrink": 1e-3}


def _both(dense: bool) -> list[Sample]:
    s = lambda name, shape, settings=None, **kw: _sample(name, shape, dense, settings, **kw)  # noqa: E731
    return [
        s("standard", (3, 144, 10, 5, 0)),
        s("blend", (2, 64, 10, 5, 16), {"blend": 0.3}),
        s("everything", (2, 49, 7, 3, 5), ALL),
        s("one-sided", (2, 36, 4, 2, 0), ONE_SIDED),
        s("odd", (3, 97, 3, 7, 0)),
        s("many-columns", (2, 40, 32, 16, 0)),
        s("batch-of-one", (1, 16, 1, 1, 0)),
        s("empty-batch", (0, 20, 4, 2, 0)),
        s("strided", (2, 25, 6, 4, 0), strided=True),
        s("zero-factor", (2, 24, 4, 2, 0), edit=_zero_factor),
        s("tiny", (2, 24, 4, 2, 0), edit=_scale(1e-12, 1e-9)),
        s("huge", (2, 24, 4, 2, 0), edit=_scale(1e12, 1e9)),
        s("small", (2, 18, 3, 2, 0), small=True, gradcheck=True),
        s("small-everything", (1, 17, 5, 3, 2), ALL, small=True, gradcheck=True),
        s("small-one-sided", (1, 16, 2, 1, 0), ONE_SIDED, small=True, gradcheck=True),
        s("rank-deficient", (1, 16, 4, 2, 0), edit=_rank_deficient, small=True, gradcheck=True),
        s("equal-sources", (1, 16, 3, 2, 0), edit=_equal_sources, small=True, gradcheck=True),
        s("zero-columns", (1, 16, 3, 3, 0), edit=_zero_column, small=True, gradcheck=True),
        s("one-source", (1, 16, 4, 1, 0), small=True, gradcheck=True),
        s("small-scales", (1, 16, 2, 2, 0), edit=_scale(1e-3, 1e3), gradcheck=True),
    ]


SAMPLES = (*_both(False), *_both(True))


def cost(*args: Any) -> Cost:
    """Least bytes and FLOPs of one call.

    Bytes: every input read once, loss and gradients written once. FLOPs, 8 per complex multiply-add: Gram matrix of
    P columns (half of it) and Z C for a low-rank target; R and D F over N x N for a dense one.
    """
    a = Arguments(*args)
    (b, n, q, _), x = a.factor.shape, a.sample_columns
    wide = compute_dtype(a.factor.dtype).itemsize
    inputs = sum(tensor.nbytes for tensor in a[:5] if tensor is not None)
    out = (0, q, q + x)[a.gradients]
    if a.target_cov is not None:
        flops = 8 * b * n * n * (q + x + out)
    else:
        p = q + x + a.target_factor.shape[2]
        flops = 4 * b * n * p * (p + 1) + 8 * b * n * p * out
    return Cost(inputs + b * wide + 2 * b * n * out * wide, flops)
