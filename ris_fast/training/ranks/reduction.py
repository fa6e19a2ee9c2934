"""The gradient of one step, summed over ranks between backward and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.ranks.group import Ranks


class GradientReduction:
    """One all-reduce over each flat gradient buffer of the optimizer.

    Model: every rank weights the loss of a micro-batch by its own scenes over those of the step on all ranks, so that
        the sum of their gradients is that of the mean over all scenes.

    The ranks need not agree on anything behind it: the engines give all of them the same bits, so that the norm, the
    clip factor, whether a step is skipped for a value that is not finite, and the loss scale are the same everywhere,
    as long as the states of the optimizers were. A value that is not finite on one rank is in the sum of all: every
    rank skips the step.

    Tensors without a gradient on all ranks keep none, as on one. The first call finds out which these are; a rank
    without scenes, in a ragged last group, gives zeros.
    """

    def __init__(self, ranks: Ranks, optimizer: FusedAdamW) -> None:
        self.ranks, self.optimizer = ranks, optimizer
        self.having: list[int] | None = None  # tensors that have a gradient on any rank

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """The flat buffers with this rank's own gradients; `.grad` of every tensor that has one anywhere is a view.

        Raises: RuntimeError where a tensor has its first gradient after the first step, of which the others know
            nothing.
        """
        parameters = self._parameters()
        here = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        if self.having is None:
            flags = [int(parameter.grad is not None) for parameter in parameters]
            self.having = [i for i, flag in enumerate(self.ranks.largest(flags)) if flag]
        if new := set(here) - set(self.having):
            raise RuntimeError(
                f"rank {self.ranks.rank}: '{self.optimizer.tensor_names[min(new)]}' has a gradient, and had none on any"
                " rank in the first step. With several ranks a tensor is trained from the first step on, or never."
            )
        return self.optimizer.flat_gradients(self.having)

    @torch.no_grad()
    def sum_(self, gradients: Sequence[Tensor]) -> None:
        """Sums the buffers over ranks, in place."""
        for buffer in gradients:
            self.ranks.sum_(buffer)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
