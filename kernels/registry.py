"""The list of kernel families; tests, gradcheck and benchmarks iterate over it and over nothing else.

How to add a family NAME (twenty lines; copy the shape of kernels/cov_nmse):

 1. kernels/NAME/__init__.py      one docstring line (without the file the folder is not packaged).
 2. kernels/NAME/reference.py     the definition in plain torch, any device, float64; same arguments as the operator.
 3. kernels/NAME/native.cpp       `#include "native/simd.hpp"`, everything inside `namespace RIS_NS { }`, and
        RIS_EXPORT(void, NAME_f32)(const float* x, float* y, int64_t n) { ... RIS_NS::work(x, y, n); }
    CMake finds the file by itself (re-run `pip install -e . --no-build-isolation --no-deps`) and compiles it for
    baseline, AVX2 + FMA and AVX-512. Use Vec<float>, load, store, splat, lanes<float> of simd.hpp, and
    `#pragma omp parallel for schedule(static)` over fixed chunks with one partial sum each, added in order, so that
    the bits do not depend on the number of threads. NaN tests work (no fast-math). Only plain C types in arguments.
 4. kernels/NAME/triton_kernels.py  imported only where it is used (a CPU user need not pay for triton's import).
    Pointer arguments end in `_ptr`, strides in `_stride`; fixed numbers are `tl.constexpr` globals with a name.
    kernels/NAME/aot_cases.py       `cases()`: every Triton kernel at its tuned sizes, see `aot_case`.
 5. kernels/NAME/op.py            registers `ris_fast::OPERATOR` and ends with its record:
        OPERATOR = register("OPERATOR(Tensor x, float scale) -> Tensor", cpu=cpp_or(plain, cpp), cuda=triton, fake=fake,
                            reference=..., samples=..., cost=..., backends={"cpp": cpp, "triton": triton})
        FAMILY = Family("NAME", (OPERATOR,))
    A differentiable operator also gives `autograd=lambda *a: MyFunction.apply(*a)` with MyFunction a
    `torch.autograd.Function` whose forward calls the operator below autograd (`with
    torch._C._AutoDispatchBelowAutograd():`) and whose backward refuses `create_graph=True`: half the host cost of
    `register_autograd`. From C++: `f = loader.function("NAME_f32", [c_void_p, c_void_p, c_int64])` once, then
    `f(x.data_ptr(), y.data_ptr(), n)`; where `loader.available()` is false call the reference.
 6. Add the folder's name to FAMILIES below. Nothing else: tests/kernels, tests/gradcheck, `ris-fast gradcheck` and
    `ris-fast bench` pick the record up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch

FAMILIES = ("cov_nmse", "philox", "scenes", "pursuit", "fused_step", "attention", "field")


@dataclass(frozen=True)
class Cost:
    """Least work of one call: bytes that must move, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Sample:
    """Arguments of one operator call, made on demand so that a mutating operator gets fresh ones each time.

    make(device, dtype) returns the positional arguments, the same values for every device and dtype.
    differentiable: positions of the tensors whose gradient the tests check.
    small: at most a few hundred Triton programs, so that Triton's interpreter takes it.
    gradcheck: small enough for a numerical Jacobian.
    """

    name: str
    make: Callable[[torch.device | str, torch.dtype], tuple[Any, ...]]
    differentiable: tuple[int, ...] = ()
    small: bool = False
    gradcheck: bool = False


@dataclass(frozen=True)
class AotCase:
    """One Triton kernel at one tuned size, for compilation ahead of time.

    signature: type of every argument by name, "constexpr" where it is one; constexprs: their values;
    aligned: names of pointer or size arguments divisible by 16; wide: whether 128-bit loads are expected.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    wide: bool = False
    max_registers: int = 255


def aot_case(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    aligned: Iterable[str],
    num_warps: int,
    **limits: Any,
) -> AotCase:
    """The case whose signature follows from the kernel's own arguments.

    types: type of every argument that is no constexpr, those of other kernels too; aligned: likewise.
    """
    mine = kernel.arg_names
    signature = {arg: "constexpr" if arg in constexprs else types[arg] for arg in mine}
    return AotCase(name, kernel, signature, constexprs, tuple(a for a in aligned if a in mine), num_warps, **limits)


@dataclass(frozen=True)
class Operator:
    """One operator: how to call it, what it means, what it costs.

    call: `torch.ops.ris_fast.NAME.default`.
    reference: same arguments, same results, in plain torch (float64 on request).
    backends: name -> same call forced through that backend ("cpp", "triton"), whatever the device.
    results: how many leading results are compared with the reference (the rest is scratch).
    mutates: positions of arguments that the call writes; they are compared too.
    limits: backend -> what it serves and what happens beyond, for whoever asks what runs here.
    error_ratio: allowed error as a multiple of the error that the reference in eager float32 makes; 0: same bits.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    samples: tuple[Sample, ...]
    cost: Callable[..., Cost]
    backends: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    results: int = 1
    mutates: tuple[int, ...] = ()
    error_ratio: float = 2.0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Family:
    """One folder under kernels/ and its operators."""

    name: str
    operators: tuple[Operator, ...]

    def aot(self) -> list[AotCase]:
        """Its Triton kernels at their tuned sizes (aot_cases.py); empty without a Triton backend. Needs triton."""
        if not any("triton" in operator.backends for operator in self.operators):
            return []
        return import_module(f"ris_fast.kernels.{self.name}.aot_cases").cases()


@cache
def families() -> tuple[Family, ...]:
    """Every registered family, in the order of FAMILIES; importing one registers its operators with torch."""
    return tuple(import_module(f"ris_fast.kernels.{name}.op").FAMILY for name in FAMILIES)


def operators() -> tuple[Operator, ...]:
    """Every operator of every family."""
    return tuple(operator for family in families() for operator in family.operators)
