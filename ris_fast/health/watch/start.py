"""What tensors were before training: those of each optimizer, and those of the model that none is to train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ris_fast.health.watch.histories import NumbersRecord
from ris_fast.health.watch.samples import ParameterSample, few_numbers, has_norm, held_tensors, local_values
from ris_fast.training.telemetry.step_telemetry import norms

LEAST, MOST = 128, 2**24  # numbers of a matrix that is compared with how torch draws them


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


@torch.no_grad()
def as_drawn(model: nn.Module) -> set[int]:
    """Ids of frozen weights of layers that are even between the bounds within which torch draws those of a new layer,
    and reach them: what was trained has left them. Reads the device."""
    found = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not isinstance(weight, Tensor):
            continue
        if weight.requires_grad or not has_norm(weight) or weight.is_complex() or not LEAST <= weight.numel() <= MOST:
            continue
        bound = weight[0].numel() ** -0.5  # kaiming_uniform_ with a=sqrt(5)
        values = local_values(weight).float()
        ends, spread = float(values.abs().max()) / bound, float(values.square().mean().sqrt()) * 3**0.5 / bound
        if 1 - 16 / weight.numel() < ends <= 1 + 1e-6 and abs(spread - 1) < 2 * weight.numel() ** -0.5:
            found.add(id(weight))
    return found


class Origin:
    """What an optimizer's tensors and their moments were before the first step that saw them: those that differ later
    were trained.

    So training shows without a look at each step, whatever was frozen, freed or used in between.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.kept: dict[int, tuple[Tensor, Tensor | None]] = {}  # a few weights, norm of the moments
        self.noted: list[Tensor] = []

    def note(self, held: list[Tensor]) -> None:
        """Keeps tensors that are new, before a step; forgets those that are gone, whose id another may take. `held`:
        all of the optimizer's."""
        if held is self.noted and len(self.kept) == len(held):
            return
        self.noted = held
        now = {id(p): p for p in held if has_norm(p)}
        self.kept = {key: self.kept.get(key) or (few_numbers([p]), self._moments(p)) for key, p in now.items()}

    def _moments(self, tensor: Tensor) -> Tensor | None:
        """(), norm of what the optimizer keeps of it, without its count of steps, which zeros advance too."""
        kept = [
            local_values(value)
            for name, value in self.optimizer.state.get(tensor, {}).items()
            if name != "step" and isinstance(value, Tensor) and has_norm(value)
        ]
        return norms(kept).norm() if kept else None

    def trained(self) -> set[int]:
        """Ids of tensors whose moments differ; of those without moments whose weights do. Reads the device once."""
        flags = {id(p): self._differs(p) for p in held_tensors(self.optimizer) if id(p) in self.kept}
        return {key for key, flag in zip(flags, few_numbers(list(flags.values())).tolist()) if flag}

    def _differs(self, tensor: Tensor) -> Tensor:
        """(), whether a step has changed it."""
        (was, moments_before), moments = self.kept[id(tensor)], self._moments(tensor)
        if moments is not None:
            before = torch.zeros_like(moments) if moments_before is None else moments_before.to(moments.device)
            return (moments - before).abs() > 1e-6 * before  # another place in memory may be added up in another order
        now = few_numbers([tensor.detach()])
        return (now != was.to(now.device)).any() if now.shape == was.shape else torch.ones((), dtype=torch.bool)

    def numbers(
        self, parameters: dict[str, Tensor], live: Tensor | None, last: ParameterSample | None
    ) -> dict[str, NumbersRecord]:
        """Of the tensors in the last step that was looked at; `live`: which of its numbers have had a gradient. Reads
        the device."""
        if live is None or last is None:
            return {}
        found, flags = {}, live.cpu().split(last.samples.sizes) if sum(last.samples.sizes) == len(live) else ()
        for name, alive in zip(last.names, flags):
            parameter = parameters.get(name)
            was = self.kept.get(id(parameter), (torch.zeros(0), None))[0].cpu()
            now = few_numbers([parameter.detach()]).cpu() if parameter is not None else was
            if parameter is not None and len(now) == len(was) == len(alive):
                found[name] = _numbers(was, now, alive)
        return found


def _numbers(was: Tensor, now: Tensor, live: Tensor) -> NumbersRecord:
    held = now == was
    narrow = now.float().contiguous().view(torch.int32)
    return NumbersRecord(
        sampled=len(now),
        changed=int((~held).sum()),
        live=int(live.sum()),
        held=int((held & live).sum()),
        short=int(((narrow & 0x1FFF == 0) & now.isfinite()).sum()),
        distinct=len(now.unique()),
        size=float(now.float().abs().mean()) if len(now) else 0.0,
    )
