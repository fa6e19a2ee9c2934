"""What the rules of `watch` read: steps, optimizers and tensors as plain data.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

EARLY = 8  # steps after which a gradient that has not come yet is no longer waited for


@dataclass
class StepRecord:
    """One optimizer step. Norms stay on their device until `on_host`.

    Args: names: (T,) of the tensors; usual_norms: (T,) what a layer's initial norm is, about; rates: learning rates of
        the groups; weights_before, weights_after: (T,) float32 norms;
        closure: gradients came within the step; scaled: a loss scaler takes care of gradients that are not finite;
        grad_after_backward, grad_at_step: (T,) float32 norms of the gradients as backward left them and as the
            optimizer found them; grad_after_step: (T,) as they are after the step, in the first steps;
        grad_change: (4,) of a few numbers of each gradient, as backward left them against what the optimizer found: the
            cosine of both, the share of negative zeros at the step, and the spread over the size of each. None where no
            hooked tensor had a gradient;
        update_ratio: (), norm of the update over that of the weights, of a few numbers of each tensor, where there was
            a gradient;
        reset: (), whether the weights are bit for bit those of an earlier step, and were others in between;
        uncleared: (), whether one gradient of the step before was added to;
        hooked: tensors with a hook on their gradient; none_grads: those of them that no gradient came to;
        no_grad: tensors whose gradient is None at the step.
    """

    step: int
    names: list[str]
    usual_norms: list[float]
    rates: list[float | Tensor]
    weights_before: Tensor
    closure: bool
    scaled: bool
    weights_after: Tensor | None = None
    grad_after_backward: Tensor | None = None
    grad_at_step: Tensor | None = None
    grad_after_step: Tensor | None = None
    grad_change: Tensor | None = None
    update_ratio: Tensor | None = None
    reset: Tensor | None = None
    uncleared: Tensor | None = None
    hooked: tuple[str, ...] = ()
    none_grads: tuple[str, ...] = ()
    no_grad: tuple[str, ...] = ()

    def on_host(self) -> StepRecord:
        host = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, rates=[float(rate) for rate in self.rates], **host)

    def gradient_norms(self) -> tuple[float, float]:
        """Of all tensors: as backward left the gradients, and as the optimizer found them."""
        return float(self.grad_after_backward.norm()), float(self.grad_at_step.norm())


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor of the model or of an optimizer, at the report. A tensor has one record: they compare by identity.

    Args: name: empty where it is not the model's; shape, size: empty and 0 while a tensor is lazy.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class OptimizerRecord:
    """One optimizer, at the report.

    Args: kinds: names of its class and of those that it derives from; groups: its `param_groups`, with records for
        tensors; steps: made so far; records: of the steps that were looked at; weight_norms: of the tensors, by name,
        that are the model's and have a norm; trained: tensors that differ from what they were before the first step;
        frozen: those without requires_grad, and with_grad: those with a gradient, at the last step;
        arrived: norms of the gradients that came since the last step; passes: backward passes before the first step;
        cleared: those that found the gradients of the pass before gone.
    """

    kinds: frozenset[str]
    groups: list[dict[str, Any]]
    steps: int
    records: list[StepRecord]
    weight_norms: dict[str, float]
    trained: set[TensorRecord]
    frozen: set[TensorRecord]
    with_grad: set[TensorRecord]
    arrived: list[float]
    passes: int
    cleared: int

    @property
    def tensors(self) -> list[TensorRecord]:
        """Of all groups; one that is in two groups comes twice."""
        return [tensor for group in self.groups for tensor in group["params"]]


@dataclass(frozen=True)
class LoopRecord:
    """A model and its optimizers, at the report.

    Args: steps: made by the optimizer that has made most; frozen: beginnings of names of parameters that are not meant
        to be trained; frozen_at_start: those without requires_grad when the watch began.
    """

    parameters: list[TensorRecord]
    optimizers: list[OptimizerRecord]
    steps: int
    frozen: tuple[str, ...]
    frozen_at_start: set[TensorRecord]
    ranks: RanksRecord | None = None


def is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


# ---- several ranks ------------------------------------------------------------------------------------------------


@dataclass
class RankStep:
    """One optimizer step of one rank, of tensors whose gradient came from backward and is there at the step.

    Args: sizes: how many numbers are of each tensor; arrived, at_step, weights: (S,) those numbers, one tensor after
        the other, of gradients as backward left them on this rank and as the optimizer found them, and of the weights
        before the step; held_back: the model's DistributedDataParallel was told not to reduce (`no_sync`).
    """

    step: int
    names: list[str]
    sizes: list[int]
    arrived: Tensor
    at_step: Tensor
    weights: Tensor
    rates: list[float | Tensor]
    held_back: bool

    def on_host(self) -> RankStep:
        host = {name: getattr(self, name).cpu().double() for name in ("arrived", "at_step", "weights")}
        return replace(self, rates=[float(rate) for rate in self.rates], **host)


@dataclass(frozen=True)
class RankOptimizer:
    """One optimizer of one rank.

    Args: zero_steps, full_steps: of the last 1024, those in which backward left one small tensor a gradient of zeros
        only, and another one.
    """

    kinds: frozenset[str]
    steps: int
    records: list[RankStep]
    zero_steps: list[int]
    full_steps: list[int]


@dataclass(frozen=True)
class Wrapper:
    """A DistributedDataParallel.

    Args: given: it is what is watched, or part of it; managed: names of the tensors whose gradients it reduces;
        within: of those in the module that it wraps, but for those that it was told to leave alone; ranks: those it
        reduces over; own_reduction: a communication hook of the user reduces.
    """

    given: bool
    managed: list[str]
    within: list[str]
    ranks: list[int]
    own_reduction: bool


@dataclass(frozen=True)
class RankRecord:
    """One rank, at the report; of the tensors that it holds whole: names, shapes, whether they are trainable, and a
    hash of all their bits."""

    rank: int
    device: str
    names: list[str]
    shapes: list[tuple[int, ...]]
    trainable: list[bool]
    hashes: list[int]
    optimizers: list[RankOptimizer]
    wrapper: Wrapper | None

    @property
    def steps(self) -> int:
        return max(each.steps for each in self.optimizers)


@dataclass(frozen=True)
class RanksRecord:
    """Ranks that reported at the same step, this one among them.

    Args: size: how many there are; elsewhere: of ranks that reported at this time at another step, with other weights,
        which step.
    """

    mine: RankRecord
    ranks: list[RankRecord]
    size: int
    elsewhere: dict[int, int]
