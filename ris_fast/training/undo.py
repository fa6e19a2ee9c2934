"""Puts back what a call of somebody's own code changed: the attributes, elements, numbers and global names that it
keeps something in."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.training.attachments import (
    CONTAINERS,
    GENERATORS,
    SCHEDULERS,
    attached,
    class_attributes,
    contents,
    global_names,
    is_users,
)
from ris_fast.training.optim.fused_adamw import FusedAdamW

Undo = Callable[[], None]
ABSENT = object()


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """What a module keeps, and all that its functions and its objects of somebody's own reach, is afterwards as
    before."""
    undo = undo_of(module)
    try:
        yield
    finally:
        for back in undo:
            back()


def undo_of(module: nn.Module, trained: bool = True) -> list[Undo]:
    """`trained`: with tensors that are reached and trained, as those of a layer which a function holds."""
    attached = of_attached([module], module, trained)
    return [*map(of_numbers, module.buffers()), *map(of_module, module.modules()), *attached]


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Copies numbers into a tensor, also into one whose entries share memory, as those of an expanded one do."""
    shared = [stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())]
    once = tuple(slice(0, 1) if each else slice(None) for each in shared)
    tensor[once].copy_(values[once])


def of_optimizer(optimizer: Any) -> Undo:
    """Everything that the optimizer holds but the numbers in its tensors."""
    parts = optimizer.buffers.parts if isinstance(optimizer, FusedAdamW) else []
    owners = [(owner, _copied(owner.__dict__)) for owner in (optimizer, *parts)]
    state = {key: dict(value) for key, value in optimizer.state.items()}
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    def back() -> None:
        for owner, attributes in owners:
            owner.__dict__.clear()
            owner.__dict__.update(attributes)
        optimizer.state = defaultdict(dict, state)
        for group, options in groups:
            group.clear()
            group.update(options)

    return back


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in attributes.items()}


def of_module(module: nn.Module) -> Undo:
    """A module's own attributes: its mode, its counters and caches, its hooks, and which tensors are its buffers."""
    kept = dict(module.__dict__)
    inner = [of_elements(value) for value in kept.values() if isinstance(value, CONTAINERS)]
    flags = [(value, value.requires_grad) for value in module._parameters.values() if value is not None]

    def back() -> None:
        module.__dict__.clear()
        module.__dict__.update(kept)
        for each in inner:
            each()
        for value, required in flags:
            if value.requires_grad is not required:
                value.requires_grad_(required)

    return back


def of_attributes(owner: Any) -> Undo:
    """The attributes of an object, and the elements of its lists, dictionaries and sets."""
    kept = dict(owner.__dict__)
    inner = [of_elements(value) for value in kept.values() if isinstance(value, CONTAINERS)]

    def back() -> None:
        owner.__dict__.clear()
        owner.__dict__.update(kept)
        for each in inner:
            each()

    return back


def of_elements(value: Any, depth: int = 3) -> Undo:
    """The elements of a list, a dictionary, a set or a deque, and those of such elements in turn."""
    kept = dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)
    held = kept.values() if isinstance(kept, dict) else kept
    inner = [of_elements(each, depth - 1) for each in held if depth > 1 and isinstance(each, CONTAINERS)]

    def back() -> None:
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(kept)
        for each in inner:
            each()

    return back


def of_attached(owners: list[Any], model: nn.Module, trained: bool = True) -> Iterator[Undo]:
    """Of everything that hooks, replaced methods and own objects reach. Tensors and arrays as long as they are no more
    than a few copies of the model; `trained`: also those that require a gradient."""
    room = 2**24 + 4 * sum(parameter.numel() for parameter in model.parameters())
    for value in attached(owners):
        if isinstance(value, Tensor):
            if value.requires_grad and not trained:
                continue
            if value.layout == torch.strided and value.device.type != "meta" and value.numel() <= room:
                room -= value.numel()
                yield of_numbers(value)
        elif isinstance(value, numpy.ndarray):
            if value.size <= room and not value.dtype.hasobject:
                room -= value.size
                yield _array(value)
        elif isinstance(value, GENERATORS):
            yield _generator(value)
        elif isinstance(value, CellType):
            yield _cell(value)
        elif isinstance(value, FunctionType):
            yield _globals(value)
            yield of_attributes(value)
        elif isinstance(value, type):
            yield _class(value)
        elif isinstance(value, CONTAINERS):
            yield of_elements(value)
        elif isinstance(value, Optimizer):
            yield of_optimizer(value)
        elif isinstance(value, nn.Module):
            yield of_module(value)
        elif hasattr(value, "__dict__") and (isinstance(value, SCHEDULERS) or is_users(value)):
            yield of_attributes(value)


def of_numbers(value: Tensor) -> Undo:
    kept = value.detach().clone()

    @torch.no_grad()
    def back() -> None:
        if value.shape == kept.shape and not torch.equal(value, kept):
            write(value, kept)

    return back


def _generator(value: Any) -> Undo:
    """A generator of torch, of Python, or of numpy, whose state is a property."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state) and None
    if isinstance(value, random.Random):
        kept = value.getstate()
        return lambda: value.setstate(kept)
    bits = value.bit_generator.state

    def back() -> None:
        value.bit_generator.state = bits

    return back


def _cell(cell: CellType) -> Undo:
    held = contents(cell)

    def back() -> None:
        if held:
            cell.cell_contents = held[0]

    return back


def _array(value: Any) -> Undo:
    kept = value.copy()

    def back() -> None:
        if value.flags.writeable and value.shape == kept.shape:
            value[...] = kept

    return back


def _class(owner: type) -> Undo:
    """What a class keeps for all that are made of it."""
    kept = class_attributes(owner)

    def back() -> None:
        for name in class_attributes(owner).keys() - kept.keys():
            delattr(owner, name)
        for name, value in kept.items():
            if vars(owner).get(name, ABSENT) is not value:
                setattr(owner, name, value)

    return back


def _globals(function: FunctionType) -> Undo:
    """Global names that a user's function uses, also those that it makes."""
    kept = global_names(function)

    def back() -> None:
        for name in global_names(function).keys() - kept.keys():
            del function.__globals__[name]
        function.__globals__.update(kept)

    return back
