"""Registers an operator with torch and makes its record: the one place that calls `torch.library`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from .native import loader
from .registry import Operator

LIBRARY = torch.library.Library("ris_fast", "FRAGMENT")  # torch unregisters the operators when this is collected


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    elsewhere: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    **record: Any,
) -> Operator:
    """Defines `ris_fast::NAME` and returns its record.

    Args:
        schema: "NAME(Tensor x, float scale) -> Tensor".
        cpu, cuda, elsewhere: the implementation on each device; elsewhere: on every other one.
        fake: results of the right shape, dtype and device, without values (torch.compile).
        autograd: only for a differentiable operator: calls a `torch.autograd.Function`.
        vmap: only for an operator that `torch.vmap` runs in one call.
        record: the other fields of `Operator`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    implementations = {"CPU": cpu, "CUDA": cuda, "CompositeExplicitAutograd": elsewhere, "Autograd": autograd}
    for key, implementation in implementations.items():
        if implementation is not None:
            LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"ris_fast::{name}", fake, lib=LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"ris_fast::{name}", vmap, lib=LIBRARY)
    return Operator(name, call=getattr(torch.ops.ris_fast, name).default, **record)


def cpp_or(plain: Callable[..., Any], cpp: Callable[..., Any]) -> Callable[..., Any]:
    """The C++ implementation where the library is there, else the plain torch one."""

    def run(*args: Any) -> Any:
        return cpp(*args) if loader.available() else plain(*args)

    return run


def triton_function(package: str, name: str) -> Callable[..., Any]:
    """A function of the package's triton_kernels.py, imported at the first call: a CPU user does not pay for triton."""

    @cache
    def found() -> Callable[..., Any]:
        return getattr(import_module(f"{package}.triton_kernels"), name)

    def run(*args: Any) -> Any:
        return found()(*args)

    return run
