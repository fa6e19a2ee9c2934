"""What the micro-batches of one step leave behind: the gradient at the output scene by scene, and what each adds to the
gradient of every tensor. Only of a step that is read; all stays on the device.

Legend: B batch, T tensors, A micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LISTED = 8  # names or scenes in one entry
FEW_NUMBERS = 4096  # of the largest tensor, which show what all were rounded to
COARSE = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class MicroBatches:
    """Readings of the micro-batches of a step, in their order."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [each for _, each in named]
        self.expected = 0  # outputs that take part in a gradient
        self.at_output: list[Tensor] = []  # (B,) norms, of every micro-batch whose output was differentiated
        self.gathered: list[Tensor] = []  # (T,) norms of what had been added up before each micro-batch but the first
        self.shares: list[float] = []
        self.no_gradient: list[str] = []

    def shown(self, factor: Tensor) -> None:
        """The answer to a micro-batch, (B, N, Q, 2), before its loss."""
        if factor.requires_grad:
            self.expected += 1
            factor.register_hook(self._differentiated)

    def _differentiated(self, gradient: Tensor) -> None:
        self.at_output.append(torch.linalg.vector_norm(gradient.detach().flatten(1).float(), dim=1))

    def weighted(self, share: float) -> None:
        """Before the backward of a micro-batch whose loss counts for this share of the step's."""
        if self.shares:
            self.gathered.append(self._norms())
        self.shares.append(share)

    def differentiated(self) -> None:
        """After the backward of all."""
        if self.gathered:
            self.gathered.append(self._norms())
        self.no_gradient = [name for name, each in zip(self.names, self.parameters) if each.grad is None]

    def _norms(self) -> Tensor:
        """(T,) float32, zero where there is no gradient."""
        held = [index for index, each in enumerate(self.parameters) if each.grad is not None]
        device = self.parameters[0].device
        if not held:
            return torch.zeros(len(self.parameters), device=device)
        each = torch._foreach_norm([self.parameters[index].grad.detach() for index in held])
        found = torch.zeros(len(self.parameters), device=device)
        found[torch.tensor(held, device=device)] = torch.stack([norm.to(device, torch.float32) for norm in each])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What `read` takes, still on the device."""
        found = {}
        if self.at_output:
            found["at_output"] = torch.cat(self.at_output)
        if self.gathered:
            found["gathered"] = torch.stack(self.gathered)
        return found

    def facts(self) -> dict[str, Any]:
        """What the host knows of them already."""
        facts: dict[str, Any] = {"without_path": {"tensors": len(self.no_gradient)}} if self.no_gradient else {}
        if self.no_gradient:
            facts["without_path"]["names"] = self.no_gradient[:LISTED]
            lacking, named = set(self.no_gradient), dict(zip(self.names, self.parameters))
            numbers = sum(each.numel() for each in self.parameters)
            facts["without_path"]["share"] = sum(named[name].numel() for name in lacking) / max(1, numbers)
            facts["without_path"]["from_the_first"] = self.names[0] in lacking
        if self.expected and not self.at_output:
            facts["output_detached"] = True
        return facts | ({"share_of_losses": sum(self.shares)} if self.shares else {})


def read_micro_batches(names: Sequence[str], seen: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors of `MicroBatches.tensors`, on the host, in plain numbers."""
    reading: dict[str, Any] = {}
    if (norms := seen.get("at_output")) is not None and len(norms) > 1:
        silent = (norms == 0).nonzero().flatten().tolist()
        largest = float(norms.max())
        reading["at_output"] = {
            "scenes": len(norms),
            "without": len(silent),
            "first": silent[:LISTED],
            "largest_over_median": largest / max(float(norms.median()), 1e-30) if largest > 0 else None,
        }
    if (gathered := seen.get("gathered")) is not None and bool(gathered.isfinite().all()):
        parts = torch.cat([torch.zeros_like(gathered[:1]), gathered])
        received = parts[1:] != parts[:-1]
        ever = received.any(0)
        lacking = (~received & ever).sum(1).tolist()
        reading["micro_batches"] = {
            "tensors": int(ever.sum()),
            "without": lacking,
            # Another micro-batch has had its gradient, and before this one there is none again.
            "cleared_between": bool((gathered[:-1] == 0).all(1).any()) and bool((gathered[-1] > 0).any()),
        }
        if any(lacking):
            row = next(index for index, each in enumerate(lacking) if each)
            some = (~received[row] & ever).nonzero().flatten().tolist()
            reading["micro_batches"]["names"] = [names[index] for index in some[:LISTED]]
    return reading


@torch.no_grad()
def coarse_formats(weights: Tensor) -> Tensor:
    """(2,) bool: whether every number of the beginning of a float32 tensor is one of bfloat16, or of float16, and not
    all are zero."""
    weights = weights.flatten()[:FEW_NUMBERS]
    return torch.stack([(weights == weights.to(kind)).all() & weights.any() for kind in COARSE.values()])
