"""Sees every operation of torch that a piece of code makes, and which of them would make a host wait for its GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
    "repeat_interleave.Tensor",
    "_assert_async",
}
SOLVERS = (
    "linalg_",
    "cholesky",
    "svd",
    "eig",
    "qr",
    "inverse",
    "lu_",
    "triangular_solve",
    "lstsq",
    "geqrf",
    "ormqr",
    "logdet",
    "slogdet",
)
HARMLESS = ("linalg_vector_norm", "linalg_cross", "linalg_vecdot")


class Watch(TorchDispatchMode):
    """Counts operations, and notes those that read a value, index by truth, touch the CPU or solve by a library."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.names, self.waits, self.solvers = device, Counter(), [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.name().removeprefix("aten::")
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        self.names[name] += 1
        by_truth = name.startswith(("index.", "index_put")) and any(
            each.dtype == torch.bool for each in tree_leaves(args[1]) if each is not None
        )
        if name in READS or by_truth or any(each.device.type != self.device for each in tensors):
            self.waits.append(name)
        if name.lstrip("_").startswith(SOLVERS) and not name.startswith(HARMLESS):
            self.solvers.append(name)
        return out
