"""What the rules of `watch` read: steps, optimizers and tensors as plain data.

Legend: T tensors, those of the model that one optimizer holds and that have a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ris_fast.health.watch.histories import GradientNumbers, NumbersRecord, Passes, PlainSteps, TensorHistory
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.pass_records import ForwardRecord

if TYPE_CHECKING:
    from ris_fast.health.watch.changes import OutsideChange
    from ris_fast.health.watch.rank_records import RanksRecord
    from ris_fast.health.watch.rivals import Rival
    from ris_fast.health.watch.schedulers import SchedulerRecord

EARLY = 8  # steps after which a gradient that has not come yet is no longer waited for


@dataclass
class StepRecord:
    """One optimizer step. Norms stay on their device until `on_host`.

    Args: names: (T,) of the tensors; usual_norms: (T,) what a layer's initial norm is, about; rates: learning rates of
        the groups; weights_before, weights_after: (T,) float32 norms,
        as they were read last: on the CPU not in each look after the first, while the weights seem finite;
        closure: gradients came within the step; scaled: a loss scaler takes care of gradients that are not finite;
        grad_after_backward, grad_at_step: (T,) float32 norms of the gradients as backward left them and as the
            optimizer found them; grad_after_step: (T,) as they are after the step, in the first steps;
        grad_change: (6,) of a few numbers of each gradient, as backward left them against what the optimizer found: the
            cosine of both, the share of negative zeros at the step, the spread over the size of each, and that of
            magnitudes. None where no hooked tensor had a gradient; 1, 0, 1, 1, 1, 1 where they are known to be the
            same;
        update_ratio: (), norm of the update over that of the weights, of a few numbers of each tensor, where there was
            a gradient;
        reset: (), whether the weights are bit for bit those of an earlier step, and were others in between;
        uncleared: (), whether one gradient of the step before was added to;
        hooked: tensors with a hook on their gradient; none_grads: those of them that no gradient came to;
        no_grad: tensors whose gradient is None at the step; earlier: those to which a backward pass came that was not
            the last;
        loss_scale: of the torch.amp.GradScaler that called the step; moved: (T,) how many of the sampled numbers of
            each tensor the step changed, of `sizes`.
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
    earlier: tuple[str, ...] = ()
    loss_scale: float | Tensor | None = None
    moved: Tensor | None = None
    sizes: list[int] = field(default_factory=list)

    def on_host(self) -> StepRecord:
        host = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        scale = None if self.loss_scale is None else float(self.loss_scale)
        return replace(self, **host | {"rates": [float(rate) for rate in self.rates], "loss_scale": scale})

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
        cleared: those that found the gradients of the pass before gone; histories: of its tensors over all steps;
        plain: what is known of every step; between: backward passes between two steps; numbers: of the tensors that
        have been in a step that was looked at, by name; outside: changes of weights between two steps; denominators:
        see there; rivals: optimizers that the watch was not given, which step on
        tensors of this one; loads: how often its state was loaded; reloads: with as many steps behind it as that
        loaded before, although steps were made since; span: its first and last step, counted in those of all
        optimizers; gradient: of the last look.
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
    histories: dict[TensorRecord, TensorHistory]
    plain: PlainSteps
    between: Passes
    numbers: dict[str, NumbersRecord]
    outside: list[OutsideChange]
    denominators: dict[str, tuple[float, float]]
    rivals: list[Rival]
    loads: int
    reloads: int
    span: tuple[int, int] | None
    gradient: GradientNumbers

    @property
    def tensors(self) -> list[TensorRecord]:
        """Of all groups; one that is in two groups comes twice."""
        return [tensor for group in self.groups for tensor in group["params"]]

    @property
    def of_torch(self) -> bool:
        """Whether its step is one of torch's own, or the fused one of this package."""
        return self.kinds - {"object", "FusedAdamW"} <= set(vars(torch.optim))


@dataclass(frozen=True)
class LoopRecord:
    """A model and its optimizers, at the report.

    Args: steps: made by the optimizer that has made most; frozen: beginnings of names of parameters that are not meant
        to be trained; added: parameters that came after the watch began; frozen_at_start: those without
        requires_grad when the watch began; rival_tensors: those that an optimizer which the watch was not given has
        stepped on; masters: the optimizers' tensors that never were the model's; moved_outside:
        those that no optimizer was to train and that have changed; with_gradient: those with one now; forward: the
        model's passes; losses: those that `seen.loss` was given; met: those that backward passes began from in steps
        that were looked at;
        schedulers: of its optimizers; kept: of states that were loaded into the model, whether all their tensors were
        its own; helpers: modules beside it; aliases: dicts and lists of its own numbers, with how many searches met
        them; as_drawn: weights of layers without requires_grad that lie as torch draws them for a new one; ranks: what
        is known of them, None for a loop of one process;
        scales: of torch.amp.GradScalers that are at work in the process.
    """

    parameters: list[TensorRecord]
    optimizers: list[OptimizerRecord]
    steps: int
    frozen: tuple[str, ...]
    added: set[TensorRecord]
    frozen_at_start: set[TensorRecord]
    rival_tensors: set[TensorRecord]
    masters: set[TensorRecord]
    moved_outside: set[TensorRecord]
    with_gradient: set[TensorRecord]
    forward: ForwardRecord | None = None
    losses: Sequence[LossRecord] = ()
    met: Sequence[LossRecord] = ()
    schedulers: Sequence[SchedulerRecord] = ()
    kept: Sequence[bool] = ()
    helpers: Sequence[HelperRecord] = ()
    aliases: Mapping[str, int] = field(default_factory=dict)
    as_drawn: frozenset[TensorRecord] = frozenset()
    ranks: RanksRecord | None = None
    scales: Sequence[float] = ()

    @property
    def uphill(self) -> bool | None:
        """Whether the optimizers make the loss larger (`maximize=True`); None where some groups do and others do
        not."""
        ways = {bool(group.get("maximize")) for each in self.optimizers for group in each.groups}
        return ways.pop() if len(ways) == 1 else None


@dataclass(frozen=True)
class HelperRecord:
    """A module beside the model, or weights in a dict or a list.

    Args: name: of the variable; of: the part of the model that it has the shapes of, None where there is none;
        as_begun: it had, about, the numbers that this part began with; training: the mode it was in, and dropouts:
        those of it that are on; trained: it has had a gradient; called: since it was found; steps: made when it was
        last looked at; looks: how often it was; still: looks at which it was what it was first; distances: after steps
        of which the one before was looked at too, how far it was from the part, now or before the step, in units of
        that step; rounded: of a copy in 16 bits, after each step that wrote to it, the shares of numbers that have
        changed, and that are the part's in its format; moved: the part has moved; way: share
        of its way from the first weights that the helper has come; buffers_still: running statistics are what they
        were first, though its weights moved and the part's statistics did; kept: it is no module;
        equal_shares: of a mean of equal shares, how many states it is of.
    """

    name: str
    of: str | None
    as_begun: bool
    training: bool
    dropouts: int
    trained: bool
    called: bool
    steps: int
    looks: int
    still: int
    distances: list[float]
    moved: bool
    way: float | None
    buffers_still: bool
    rounded: list[tuple[float, float]]
    kept: bool = False
    equal_shares: int = 0


def is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
