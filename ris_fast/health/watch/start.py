"""What the model's tensors were when the watch began, of those that no optimizer is to train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.watch.samples import few_numbers, has_norm, held_tensors


class Start:
    """Tensors by id: all of the model, those without requires_grad, and a few numbers of these and of all that no
    optimizer holds."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        held = {id(p) for each in optimizers for p in held_tensors(each)}
        self.ids = {id(p) for p in model.parameters()}
        self.frozen = {id(p) for p in model.parameters() if not p.requires_grad}
        self.numbers = {
            id(p): few_numbers([p.detach()])
            for p in model.parameters()
            if has_norm(p) and (id(p) not in held or not p.requires_grad)
        }

    def is_moved(self, parameter: Tensor) -> bool:
        """Whether something else than the optimizers moves it. Reads the device."""
        before = self.numbers.get(id(parameter))
        if before is None or not has_norm(parameter):
            return False
        now = few_numbers([parameter.detach()])
        return now.shape != before.shape or not torch.equal(now, before.to(now.device))
