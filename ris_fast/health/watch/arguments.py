"""Checks the arguments of `watch`: one that means nothing is refused, with what to give instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def check_model(model: Any) -> None:
    """Raises: ValueError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"watch: model is {_shown(model)}. Give the torch.nn.Module that is trained, then its optimizer."
        )


def list_optimizers(optimizer: Any) -> list[Optimizer]:
    """One, or all of them, as a list. Raises: ValueError for anything else."""
    try:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    except TypeError:
        optimizers = [optimizer]
    wrong = [each for each in optimizers if not isinstance(each, Optimizer)]
    if wrong:
        within = "" if isinstance(optimizer, str) or wrong == [optimizer] else f", with {_shown(wrong[0])} in it"
        raise ValueError(
            f"watch: optimizer is {_shown(optimizer)}{within}. Give a torch.optim.Optimizer, or a list of them, e.g. "
            "watch(model, optimizer)."
        )
    return optimizers


def check_every(every: Any, optimizers: int) -> None:
    """Raises: ValueError for no optimizer, and for what is no number of steps."""
    if not optimizers or not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(
            f"watch: {optimizers} optimizers and every={every!r}. Give at least one optimizer, and a whole number of"
            " steps from 1 on."
        )


def list_beginnings(frozen: Any) -> tuple[str, ...]:
    """Beginnings of names. Raises: ValueError for anything but texts."""
    names = (frozen,) if isinstance(frozen, str) else frozen
    try:
        names = tuple(names)
    except TypeError:
        names = (None,)
    if any(not isinstance(name, str) for name in names):
        raise ValueError(
            f'watch: frozen={_shown(frozen)}. Give beginnings of parameters\' names, e.g. frozen=("encoder.",).'
        )
    return names


def _shown(value: Any) -> str:
    """Its repr where that is short, else its type."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
