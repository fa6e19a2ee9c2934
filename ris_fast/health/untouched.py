"""Leaves a trainer exactly as it was: weights, optimizer, averages, gradients, counters, modes and random numbers."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ris_fast.training.loop import Trainer


class Numbers:
    """A copy of every tensor that a trainer's network and optimizer hold, made once and written back as often as asked.

    A network of 16 million parameters holds a third of a gigabyte: a new copy before each of many checks would take
    longer than most of them. Tensors inside the memory of another one, as weights in flat buffers, are copied with it.
    """

    def __init__(self, trainer: Trainer) -> None:
        held = {id(tensor): tensor for tensor in [*trainer.model.parameters(), *trainer.model.buffers(), *_held(trainer.optimizer)]}
        self.kept: list[tuple[Tensor, Tensor, int]] = []      # tensor, its copy, and where it was if its owner stands before it, else 0
        for tensor in sorted(held.values(), key=lambda each: each.nbytes, reverse=True):
            owners = (_inside(tensor, owner, copy) for owner, copy, place in self.kept if not place)
            part = next((copy for copy in owners if copy is not None), None)
            self.kept.append((tensor, tensor.detach().clone(), 0) if part is None else (tensor, part, tensor.data_ptr()))

    @torch.no_grad()
    def write_back(self) -> None:
        """Every tensor has its numbers again, also where its memory is another one by now."""
        for tensor, copy, place in self.kept:
            if tensor.dtype == copy.dtype and tensor.shape == copy.shape and not (place and tensor.data_ptr() == place):
                tensor.copy_(copy)


def _held(optimizer: Any) -> list[Tensor]:
    """The tensors of the optimizer's flat buffers and of its state."""
    owners = [bucket.__dict__ for bucket in getattr(optimizer, "_buckets", [])] + list(optimizer.state.values())
    return [value for owner in owners for value in owner.values() if isinstance(value, Tensor)]


def _inside(tensor: Tensor, owner: Tensor, copy: Tensor) -> Tensor | None:
    """The part of the owner's copy that is the tensor's, where the tensor lies in the memory of the owner, one row of numbers."""
    start = tensor.data_ptr() - owner.data_ptr()
    alike = (owner.dtype, owner.device) == (tensor.dtype, tensor.device) and owner.is_contiguous() and tensor.is_contiguous()
    if owner.dim() != 1 or not alike or not 0 <= start <= owner.nbytes - tensor.nbytes:
        return None
    return copy[start // owner.element_size():][:tensor.numel()].view(tensor.shape)


@contextmanager
def untouched(trainer: Trainer, numbers: Numbers | None = None) -> Iterator[None]:
    """Whatever happens to the trainer's numbers inside the block is undone at its end, bit for bit.

    `numbers`: a copy of them that was made before, since when nothing has changed.
    """
    numbers = numbers or Numbers(trainer)
    undo = [_gradients(trainer.model), _optimizer(trainer.optimizer), numbers.write_back, _modes(trainer.model), _random(trainer.device),
            _attributes(trainer.step.telemetry), _attributes(trainer.step), _attributes(trainer.state)]
    try:
        yield
    finally:
        for back in undo:
            back()


def _gradients(model: nn.Module) -> Any:
    kept = [(value, value.grad) for value in model.parameters()]

    def back() -> None:
        for value, grad in kept:
            value.grad = grad
    return back


def _optimizer(optimizer: Any) -> Any:
    """Everything that the optimizer holds but the numbers in its tensors."""
    kept = {name: list(value) if isinstance(value, list) else value for name, value in optimizer.__dict__.items()}
    buckets = [(bucket, dict(bucket.__dict__)) for bucket in getattr(optimizer, "_buckets", [])]
    state = {key: dict(value) for key, value in optimizer.state.items()}
    rates = [group["lr"] for group in optimizer.param_groups]

    def back() -> None:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(kept)
        for bucket, attributes in buckets:
            bucket.__dict__.clear()
            bucket.__dict__.update(attributes)
        optimizer.state = defaultdict(dict, state)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
    return back


def _modes(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]

    def back() -> None:
        for module, mode in modes:
            module.training = mode
    return back


def _random(device: torch.device) -> Any:
    host = torch.get_rng_state()
    chip = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def back() -> None:
        torch.set_rng_state(host)
        if chip is not None:
            torch.cuda.set_rng_state(chip, device)
    return back


def _attributes(owner: Any) -> Any:
    kept = dict(owner.__dict__)

    def back() -> None:
        owner.__dict__.clear()
        owner.__dict__.update(kept)
    return back
