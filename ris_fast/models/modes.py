"""Training and evaluation mode of a network, put back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module has the mode that it had, also where they differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_dropout(model: nn.Module) -> bool:
    """Whether a module drops outputs in training: one of torch's dropout layers, or one that has a share `dropout`."""
    shares = [
        getattr(module, "p" if "Dropout" in type(module).__name__ else "dropout", 0) for module in model.modules()
    ]
    return any(isinstance(share, float) and share > 0 for share in shares)
