"""Leaves a trainer exactly as it was: weights, optimizer, averages, gradients, counters, modes, random numbers, and
what users attached."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.preflight.attachments import (
    GENERATORS,
    PLAIN,
    SCHEDULERS,
    attached,
    contents,
    global_names,
    is_users,
)
from ris_fast.health.preflight.measures import write
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.trainer import Trainer

Undo = Callable[[], None]


class TensorCopies:
    """A copy of every tensor that a trainer's network and optimizer hold, made once and written back as often as asked.

    A network of 16 million parameters holds a third of a gigabyte: a new copy before each of many checks would take
    longer than most of them. Tensors inside the memory of another one, as weights in flat buffers, are copied with it.
    """

    def __init__(self, trainer: Trainer) -> None:
        own = [tensor for module in modules_of(trainer) for tensor in (*module.parameters(), *module.buffers())]
        own += [tensor.grad for tensor in own if tensor.grad is not None]
        held = {id(tensor): tensor for tensor in [*own, *_held(trainer.optimizer)]}
        # A tensor, its copy, and its address if it lies in the memory of one before it, else 0.
        self.kept: list[tuple[Tensor, Tensor, int]] = []
        for tensor in sorted(held.values(), key=lambda each: each.nbytes, reverse=True):
            owners = (_inside(tensor, owner, copy) for owner, copy, address in self.kept if not address)
            part = next((copy for copy in owners if copy is not None), None)
            self.kept.append(
                (tensor, tensor.detach().clone(), 0) if part is None else (tensor, part, tensor.data_ptr())
            )

    @torch.no_grad()
    def write_back(self) -> None:
        """Every tensor has its numbers again, also where its memory is another one by now."""
        for tensor, copy, address in self.kept:
            with_owner = address and tensor.data_ptr() == address
            if tensor.dtype == copy.dtype and tensor.shape == copy.shape and not with_owner:
                write(tensor, copy)


def _held(optimizer: Any) -> list[Tensor]:
    """The tensors of the optimizer's flat buffers and of its state."""
    buckets = optimizer.buckets if isinstance(optimizer, FusedAdamW) else []
    owners = [bucket.__dict__ for bucket in buckets] + list(optimizer.state.values())
    return [value for owner in owners for value in owner.values() if isinstance(value, Tensor)]


def _inside(tensor: Tensor, owner: Tensor, copy: Tensor) -> Tensor | None:
    """The part of the owner's copy that is the tensor's, where the tensor lies in the memory of the owner, one row of
    numbers."""
    start = tensor.data_ptr() - owner.data_ptr()
    alike = (
        (owner.dtype, owner.device) == (tensor.dtype, tensor.device)
        and owner.is_contiguous()
        and tensor.is_contiguous()
    )
    if owner.dim() != 1 or not alike or not 0 <= start <= owner.nbytes - tensor.nbytes:
        return None
    return copy[start // owner.element_size() :][: tensor.numel()].view(tensor.shape)


def modules_of(trainer: Trainer) -> list[nn.Module]:
    """The network, and the loss where it is a module too: its weights may be learned."""
    return [each for each in (trainer.model, trainer.loss) if isinstance(each, nn.Module)]


def _all_modules(trainer: Trainer) -> list[nn.Module]:
    """Each once, also the module of the user's own that an adapted network is made of, which is no part of it."""
    parts = [part for each in modules_of(trainer) for part in (each.__dict__.get("net", each), *each.modules())]
    return list(dict.fromkeys(parts))


@contextmanager
def preserve_state(trainer: Trainer, numbers: TensorCopies | None = None) -> Iterator[None]:
    """Whatever happens to the trainer's numbers inside the block is undone at its end, bit for bit; so is what happens
    to schedulers, averages and counters that its hooks and replaced methods reach.

    `numbers`: a copy of them that was made before, since when nothing has changed.
    """
    numbers = numbers or TensorCopies(trainer)
    undo = [
        _gradients(trainer.model),
        _optimizer(trainer.optimizer),
        numbers.write_back,
        _random(trainer.device),
        *map(_module, _all_modules(trainer)),
        *map(_attributes, (trainer.step.telemetry, trainer.step, trainer.state, trainer.plan, trainer.source)),
        _elements(trainer.network.known),
        _plain(trainer),
        *_attached(trainer),
    ]
    try:
        yield
    finally:
        for back in undo:
            back()


def _gradients(model: nn.Module) -> Undo:
    kept = [(value, value.grad) for value in model.parameters()]

    def back() -> None:
        for value, grad in kept:
            value.grad = grad

    return back


def _optimizer(optimizer: Any) -> Undo:
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


def _random(device: torch.device) -> Undo:
    """The generators that a network, a loss or a data set may draw from."""
    host, python, numpy = torch.get_rng_state(), random.getstate(), sys.modules.get("numpy")
    chip = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    array = numpy.random.get_state() if numpy else None

    def back() -> None:
        torch.set_rng_state(host)
        random.setstate(python)
        if chip is not None:
            torch.cuda.set_rng_state(chip, device)
        if numpy:
            numpy.random.set_state(array)

    return back


def _plain(owner: Any) -> Undo:
    """The numbers and texts among an object's attributes: the mode of a module, a counter."""
    kept = {name: value for name, value in owner.__dict__.items() if isinstance(value, PLAIN)}
    return lambda: owner.__dict__.update(kept)


def _module(module: nn.Module) -> Undo:
    """A module's own attributes: its mode, its counters and caches, its hooks, and which tensors are its buffers."""
    kept = dict(module.__dict__)
    inner = [_elements(value) for value in kept.values() if isinstance(value, (dict, list, set))]
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


def _attributes(owner: Any) -> Undo:
    """The attributes of an object, and the elements of its lists, dictionaries and sets."""
    kept = dict(owner.__dict__)
    inner = [_elements(value) for value in kept.values() if isinstance(value, (dict, list, set))]

    def back() -> None:
        owner.__dict__.clear()
        owner.__dict__.update(kept)
        for each in inner:
            each()

    return back


def _elements(value: Any, depth: int = 3) -> Undo:
    """The elements of a list, a dictionary or a set, and those of such elements in turn."""
    kept = list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else set(value)
    held = kept.values() if isinstance(kept, dict) else kept
    inner = [_elements(each, depth - 1) for each in held if depth > 1 and isinstance(each, (dict, list, set))]

    def back() -> None:
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(kept)
        for each in inner:
            each()

    return back


# ---- what is not the trainer's own
# --------------------------------------------------------------------------------------


def _attached(trainer: Trainer) -> Iterator[Undo]:
    """Of everything that hooks and replaced methods reach. Tensors as long as they are no more than a few copies of the
    model."""
    room = 2**20 + 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    owners = [trainer, trainer.step, trainer.optimizer, trainer.loss, trainer.source, *_all_modules(trainer)]
    for value in attached(owners):
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.device.type != "meta" and value.numel() <= room:
                room -= value.numel()
                yield _numbers(value)
        elif isinstance(value, GENERATORS):
            yield _generator(value)
        elif isinstance(value, CellType):
            yield _cell(value)
        elif isinstance(value, FunctionType):
            yield _globals(value)
        elif isinstance(value, (dict, list, set)):
            yield _elements(value)
        elif isinstance(value, Optimizer):
            yield _optimizer(value)
        elif isinstance(value, nn.Module):
            yield _module(value)
        elif hasattr(value, "__dict__") and (isinstance(value, SCHEDULERS) or is_users(value)):
            yield _attributes(value)


def _numbers(value: Tensor) -> Undo:
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


def _globals(function: FunctionType) -> Undo:
    """Global numbers and texts that a user's function names."""
    kept = {name: value for name, value in global_names(function).items() if isinstance(value, PLAIN)}
    return lambda: function.__globals__.update(kept)
