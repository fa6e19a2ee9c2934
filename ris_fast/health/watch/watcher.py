"""A watched loop: hooks on its optimizers, and the report on what they recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ris_fast.health.finding import Finding
from ris_fast.health.names import check_beginnings
from ris_fast.health.watch.arguments import check_every, check_model, list_beginnings, list_optimizers
from ris_fast.health.watch.hooks import OptimizerHooks, plain_name
from ris_fast.health.watch.records import LoopRecord, StepRecord, TensorRecord
from ris_fast.health.watch.rules import find_mistakes


class Watcher:
    """Watches a model and its optimizers from outside; see `ris_fast.health.watch` for the arguments.

    Parameters may be frozen, freed, added and replaced on the way. With a closure, what happens to gradients between
    backward and the update is not seen. A torch.amp.GradScaler may skip steps and divide by powers of two.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], every: int, frozen: Sequence[str]
    ) -> None:
        check_model(model)
        self.model, self.optimizers, self.frozen = model, list_optimizers(optimizer), list_beginnings(frozen)
        check_every(every, len(self.optimizers))
        check_beginnings(self.frozen, [name for name, _ in model.named_parameters()], "watch: frozen")
        self.hooks = [OptimizerHooks(model, each, every) for each in self.optimizers]
        self.frozen_at_start = {id(p) for p in model.parameters() if not p.requires_grad}

    @property
    def steps(self) -> int:
        """Steps made, by the optimizer that has made most."""
        return max(hooks.steps for hooks in self.hooks)

    @property
    def records(self) -> list[StepRecord]:
        """Steps that were looked at, one optimizer after the other."""
        return [record for hooks in self.hooks for record in hooks.records]

    def close(self) -> None:
        """Takes every hook away."""
        for hooks in self.hooks:
            hooks.close()

    def report(self) -> list[Finding]:
        """Findings on the steps so far, most certain first. Reads the device."""
        return find_mistakes(self._record())

    def _record(self) -> LoopRecord:
        parameters = {id(p): _record_of(p, plain_name(name)) for name, p in self.model.named_parameters()}
        others = {id(p): _record_of(p) for hooks in self.hooks for p in hooks.tensors() if id(p) not in parameters}
        return LoopRecord(
            parameters=list(parameters.values()),
            optimizers=[hooks.record(parameters | others) for hooks in self.hooks],
            frozen=self.frozen,
            frozen_at_start={parameters[key] for key in self.frozen_at_start & parameters.keys()},
        )


def _record_of(tensor: Tensor, name: str = "") -> TensorRecord:
    shape, size = ((), 0) if is_lazy(tensor) else (tuple(tensor.shape), tensor.numel())
    return TensorRecord(name, shape, size, tensor.dtype, tensor.requires_grad)
