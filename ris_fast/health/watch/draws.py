"""Random numbers that a model draws in evaluation, and layers that call a dropout by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.health.watch.graph import modules_of

FUNCTIONS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_p"}


def random_state() -> list[Any]:
    """Where the generators stand, without a wait for a device."""
    state: list[Any] = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        state.append(torch.cuda.default_generators[torch.cuda.current_device()].get_offset())
    return state


def has_moved(one: list[Any], other: list[Any]) -> bool:
    """Whether numbers were drawn between two states."""
    return len(one) == len(other) and not all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other)
    )


def own_dropouts(model: nn.Module) -> list[str]:
    """Parts, not torch's own, that have a rate of dropout as a number or call a functional dropout."""
    return [path.removesuffix(".") for path, part in modules_of(model) if _is_own(part)]


def _is_own(part: nn.Module) -> bool:
    if type(part).__module__.partition(".")[0] == "torch":
        return False
    rates = (value for name, value in vars(part).items() if "drop" in name and isinstance(value, float))
    return any(0 < rate < 1 for rate in rates) or any(
        not isinstance(getattr(part, name, None), nn.Module) for name in _names_in(part) & FUNCTIONS
    )


def _names_in(part: nn.Module) -> set[str]:
    """Names and keywords in the code of its forward pass."""
    code = getattr(type(part).forward, "__code__", None)
    if code is None:
        return set()
    keywords = {word for each in code.co_consts if isinstance(each, tuple) for word in each if isinstance(word, str)}
    return {*code.co_names, *keywords}
