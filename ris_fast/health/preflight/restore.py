"""Leaves a trainer exactly as it was: weights, optimizer, averages, gradients, counters, modes, random numbers, and
what users attached."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.training.attachments import PLAIN
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.trainer import Trainer
from ris_fast.training.undo import (
    Undo,
    of_attached,
    of_attributes,
    of_elements,
    of_module,
    of_optimizer,
    undo_of,
    write,
)


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


def _owners(trainer: Trainer) -> list[Any]:
    return [trainer, trainer.step, trainer.optimizer, trainer.loss, trainer.source, *_all_modules(trainer)]


@contextmanager
def preserve_state(trainer: Trainer, numbers: TensorCopies | None = None) -> Iterator[None]:
    """Whatever happens to the trainer's numbers inside the block is undone at its end, bit for bit; so is what happens
    to schedulers, averages and counters that its hooks and replaced methods reach.

    `numbers`: a copy of them that was made before, since when nothing has changed.
    """
    numbers = numbers or TensorCopies(trainer)
    undo = [
        _gradients(trainer.model),
        of_optimizer(trainer.optimizer),
        numbers.write_back,
        _random(trainer.device),
        *map(of_module, _all_modules(trainer)),
        *map(of_attributes, (trainer.step.telemetry, trainer.step, trainer.state, trainer.plan, trainer.source)),
        of_elements(trainer.network.known),
        _plain(trainer),
        *of_attached(_owners(trainer), trainer.model),
    ]
    try:
        yield
    finally:
        for back in undo:
            back()


@contextmanager
def term_of_one_state(loss: Any) -> Iterator[None]:
    """Inside, every call of the user's own term begins with what it keeps now, as a queue or a running mean: calls can
    be compared, and nothing of another precision or of other scenes stays in it."""
    own = getattr(loss, "own", None)
    if own is None:
        yield
        return
    holder = nn.Module()
    holder.own = own
    undo = undo_of(holder, trained=False)  # a layer that it shares with the network is the check's to move

    def called(*given: Any) -> Any:
        for back in undo:
            back()
        return own(*given)

    loss.__dict__["own"] = called  # also before a submodule of this name
    try:
        yield
    finally:
        if isinstance(own, nn.Module):
            del loss.__dict__["own"]
        else:
            loss.own = own


def _gradients(model: nn.Module) -> Undo:
    kept = [(value, value.grad) for value in model.parameters()]

    def back() -> None:
        for value, grad in kept:
            value.grad = grad

    return back


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
