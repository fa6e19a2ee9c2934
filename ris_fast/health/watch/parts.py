"""What the parts of a model show in its first passes: the number format that autocast gives them, and which axis their
sequences run over."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

CALLS = 256  # that are looked at
SEQUENTIAL = (nn.RNNBase, nn.MultiheadAttention)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PartCalls:
    """Calls of a model's parts, counted.

    `formats`: by what a layer with weights made of autocast: "used", "ignored" where its output stays in float32,
    "left" where autocast is off within a region that it is on in.
    `sequences`: of this pass, layers that take time first, and the first two axes that each is given.
    """

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.sequences: list[tuple[str, int, int]] = []
        self.open: bool | None = None  # a region was seen to be open around one that is off

    def note(self, name: str, module: nn.Module, given: Tensor, output: Any) -> None:
        """One call."""
        if type(module) in WEIGHTED and sum(self.formats.values()) < CALLS:
            kind = _format(module, given, output)
            if kind == "left" and self.open is None:  # looked for once: it takes a while
                self.open = _is_open(given.device.type)
            self.formats[kind if kind != "left" or self.open else ""] += 1
        elif (
            isinstance(module, SEQUENTIAL)
            and not module.batch_first
            and given.ndim == 3
            and len(self.sequences) < CALLS
        ):
            self.sequences.append((name, given.shape[0], given.shape[1]))

    def by_format(self) -> dict[str, int]:
        """Calls by what became of autocast."""
        return {name: count for name, count in self.formats.items() if name}


def _format(module: nn.Module, given: Tensor, output: Any) -> str:
    """Empty where no autocast is about; "left" also within a region that is off itself."""
    device = given.device.type
    plain = isinstance(output, Tensor) and given.is_floating_point() and torch.amp.is_autocast_available(device)
    if not plain or getattr(getattr(module, "weight", None), "dtype", None) != torch.float32:
        return ""
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        return "" if narrow == torch.float32 else "used" if output.dtype == narrow else "ignored"
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return "left" if nesting > 2 and output.dtype == torch.float32 else ""


def _is_open(device: str) -> bool:
    """Whether there is an autocast region that is switched on and has been entered."""
    regions = [each for each in gc.get_objects() if type(each) is torch.autocast]
    return any(each._enabled and each.device == device and hasattr(each, "prev") for each in regions)
