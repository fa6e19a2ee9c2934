"""What one optimizer step reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw; tensors stay on the device until somebody reads them.

    With several ranks `loss` and `terms` are this rank's part of the mean over the scenes of all: their sum over ranks
    is the mean.
    """

    scenes: int  # of all ranks
    loss: Tensor  # (), mean over the step's scenes
    terms: dict[str, Tensor]  # name -> (), raw, mean over the step's scenes
