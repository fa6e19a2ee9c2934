"""Leaves a trainer exactly as it was: weights, optimizer, averages, gradients, counters, modes and random numbers."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ris_fast.training.loop import Trainer

@contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Whatever happens to the trainer's numbers inside the block is undone at its end, bit for bit."""
    undo = [_tensors(trainer.model), _optimizer(trainer.optimizer), _modes(trainer.model), _random(trainer.device),
            _attributes(trainer.step.telemetry), _attributes(trainer.step), _attributes(trainer.state)]
    try:
        yield
    finally:
        for back in undo:
            back()


def _tensors(model: nn.Module) -> Any:
    values = {id(value): (value, value.detach().clone(), value.grad)
              for value in [*model.parameters(), *model.buffers()]}

    @torch.no_grad()
    def back() -> None:
        for value, kept, grad in values.values():
            if value.dtype == kept.dtype and value.shape == kept.shape:
                value.copy_(kept)
            value.grad = grad
    return back


def _optimizer(optimizer: Any) -> Any:
    """Everything that the optimizer holds, and the tensors of its flat buffers and of its state."""
    kept = {name: list(value) if isinstance(value, list) else value for name, value in optimizer.__dict__.items()}
    buckets = [(bucket, dict(bucket.__dict__)) for bucket in getattr(optimizer, "_buckets", [])]
    state = {key: dict(value) for key, value in optimizer.state.items()}
    tensors = [value for _, values in buckets for value in values.values() if isinstance(value, Tensor)]
    tensors += [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    values = [tensor.detach().clone() for tensor in tensors]
    rates = [group["lr"] for group in optimizer.param_groups]

    @torch.no_grad()
    def back() -> None:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(kept)
        for bucket, attributes in buckets:
            bucket.__dict__.clear()
            bucket.__dict__.update(attributes)
        for tensor, value in zip(tensors, values):
            tensor.copy_(value)
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
