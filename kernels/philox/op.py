"""Counter-based random numbers as operators: value i of scene b depends on index[b], seed, stream and i, and on nothing
else.

Mapping: the four words of Philox4x32-10 with counter (j, stream, low, high 32 bits of index[b]) and key (low, high 32
bits of the seed) make values 4 j .. 4 j + 3 of row b. Integers have the same bits on every device; so have uniforms;
normals agree within 4 ulp. Not differentiable: nothing that a gradient could reach enters.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from functools import cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from ..registration import cpp_or, register, triton_function
from ..registry import Cost, Family, Operator, Sample
from . import reference

WORD_FLOPS, NORMAL_FLOPS = 20, 24  # integer operations of ten rounds a word; arithmetic of Box-Muller a normal


def philox_uniform(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """Uniform numbers in (0, 1]: (upper 24 bits of the word + 1) / 2^24.

    Args:
        index_B: (B,) int64 scene numbers; any bits.
        seed: the key, 0 <= seed < 2^64.
        stream: which of the independent sequences, 0 <= stream < 2^32.
        count: values a scene, 0 <= count <= 2^32.
    Returns: (B, count) float32 on the device of `index_B`, the same bits on every device.
    Raises: ValueError: an argument out of range.
    Cost: 4 bytes a value written; ten rounds of two 32 x 32 bit products a block of four.
    """
    _check("philox_uniform", index_B, seed, stream, count)
    return torch.ops.ris_fast.philox_uniform(index_B, signed(seed), stream, count)


def philox_normal(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """Standard normal numbers, Box-Muller on pairs of the uniforms u of `philox_uniform`.

    Formula: z[2p] = sqrt(-2 ln u[2p]) cos(2 pi u[2p+1]), z[2p+1] = sqrt(-2 ln u[2p]) sin(2 pi u[2p+1]); u[2p] at most
        1 - 2^-24, so that no pair is exactly zero.
    Args, Returns, Raises: as `philox_uniform`.
    Numerics: float32 polynomials, within 4 ulp of the exact value on every device; |z| <= sqrt(48 ln 2) = 5.77 (the
        normal law puts 8e-9 beyond that).
    """
    _check("philox_normal", index_B, seed, stream, count)
    return torch.ops.ris_fast.philox_normal(index_B, signed(seed), stream, count)


def _check(name: str, index_B: Tensor, seed: int, stream: int, count: int) -> None:
    if not isinstance(index_B, Tensor):
        raise TypeError(f"{name}: index is a {type(index_B).__name__}; pass scene numbers as (B,) torch.int64.")
    if index_B.ndim != 1 or index_B.dtype != torch.int64:
        raise ValueError(
            f"{name}: index is {tuple(index_B.shape)} {index_B.dtype}; pass scene numbers as (B,) torch.int64."
        )
    for what, value, end in (("seed", seed, 2**64), ("stream", stream, 2**32), ("count", count, 2**32 + 1)):
        if not isinstance(value, (Integral, torch.SymInt)):
            raise TypeError(f"{name}: {what} is {value!r}; it must be a whole number in 0 .. {end - 1}.")
        if not 0 <= value < end:
            raise ValueError(f"{name}: {what} is {value}; it must be in 0 .. {end - 1}.")


def signed(seed: int) -> int:
    """The same 64 bits as an int64, all that an operator's schema can carry."""
    return seed - 2**64 if seed >= 2**63 else seed


ARGUMENTS = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64]  # out, index, rows, count, seed, stream


@cache
def _native(name: str) -> Any:
    return loader.function(name, ARGUMENTS)


def _cpp(name: str, index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    out = torch.empty((index_B.numel(), count), dtype=torch.float32)
    index_B = index_B.contiguous()
    _native(name)(out.data_ptr(), index_B.data_ptr(), index_B.numel(), count, seed, stream)
    return out


_triton_uniform = triton_function(__package__, "uniform_numbers")
_triton_normal = triton_function(__package__, "normal_numbers")


def _fake(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    return index_B.new_empty((index_B.shape[0], count), dtype=torch.float32)


def _cost_of(flops_a_value: int) -> Any:
    """Bytes: indices read, values written. FLOPs: operations a value, integer ones included."""

    def cost(index_B: Tensor, seed: int, stream: int, count: int) -> Cost:
        values = index_B.numel() * count
        return Cost(4 * values + 8 * index_B.numel(), flops_a_value * values)

    return cost


def _sample(name: str, rows: int, count: int, seed: int, small: bool = False, stride: int = 1) -> Sample:
    """Scene numbers of every size, negative ones and numbers beyond 32 bits among them; no gradient anywhere."""

    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        index = torch.arange(rows * stride, device=device) * 0x2545F4914F6CDD1D
        return index[::stride], seed, 7, count

    return Sample(name, make, small=small)


_SAMPLES = (
    _sample("standard", 64, 4608, 20260101),
    _sample("few", 300, 20, 3),
    _sample("odd", 5, 1023, -1),
    _sample("one-scene", 1, 20001, 2**62),
    _sample("empty-batch", 0, 8, 1),
    _sample("no-values", 3, 0, 1),
    _sample("strided", 6, 33, 5, stride=3),
    _sample("small", 3, 37, 11, small=True),
    _sample("small-whole", 2, 64, 11, small=True),
)


def _register(name: str, definition: Any, triton: Any, flops: int, error_ratio: float) -> Operator:
    def cpp(*args: Any) -> Tensor:
        return _cpp(name, *args)

    def plain(*args: Any) -> Tensor:
        return definition(*args).float()

    return register(
        f"{name}(Tensor index, int seed, int stream, SymInt count) -> Tensor",
        cpu=cpp_or(plain, cpp),
        cuda=triton,
        fake=_fake,
        reference=definition,
        samples=_SAMPLES,
        cost=_cost_of(flops),
        backends={"cpp": cpp, "triton": triton},
        error_ratio=error_ratio,
        dtypes=(torch.float32,),
    )


FAMILY = Family(
    "philox",
    (
        _register("philox_uniform", reference.uniform, _triton_uniform, WORD_FLOPS, 0.0),
        _register("philox_normal", reference.normal, _triton_normal, WORD_FLOPS + NORMAL_FLOPS, 2.0),
    ),
)
