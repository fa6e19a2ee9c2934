"""Checks that the operators share: shapes and dtypes, and where the values of a tensor may be read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def readable(x: Tensor, wait: bool = False) -> bool:
    """Whether values may be read here: on a CPU (`wait`: on any device), in a plain tensor, outside of torch.compile
    and torch.func."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(x) not in (Tensor, nn.Parameter)
    ):
        return False
    return wait or x.device.type == "cpu"


def check_shapes(
    owner: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    of: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Every tensor has its expected shape, and `dtype` where one is given.

    of: end of the message, what the shapes follow from and what to do; `{name}` in it is the tensor's name.
    Raises: ValueError.
    """
    for name, shape in expected.items():
        x = tensors[name]
        if x.shape != shape or (dtype is not None and x.dtype != dtype):
            given, wanted = ("", "") if dtype is None else (f" {x.dtype}", f" {dtype}")
            what = f"{owner}: {name} is {tuple(x.shape)}{given}, expected {shape}{wanted}"
            raise ValueError(f"{what} for {of.format(name=name)}")
