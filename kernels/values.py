"""Where a check may read the values of a tensor: where nothing has to wait for it, unless waiting is asked for."""

from __future__ import annotations

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
