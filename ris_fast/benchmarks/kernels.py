"""Every registered operator on its largest sample: this machine's kernel against plain torch, eager."""

from __future__ import annotations

from typing import Any

import torch

from ris_fast.kernels.registry import Operator, Sample, operators
from ris_fast.timing import alternate, keeping


def largest(operator: Operator, device: torch.device) -> Sample:
    """The sample that moves the most bytes."""
    return max(operator.samples, key=lambda sample: operator.cost(*sample.make(device, torch.float32)).bytes)


def compare_kernels(device: torch.device, *, quiet: int = 5, seconds: float = 3.0) -> list[dict[str, Any]]:
    """A row for each operator: medians of ours and of the reference, bytes a second. Values only, float32."""
    rows: list[dict[str, Any]] = []
    with keeping(lambda: rows):
        for operator in operators():
            rows.append(_compared(operator, device, quiet, seconds))
    return rows


def _compared(operator: Operator, device: torch.device, quiet: int, seconds: float) -> dict[str, Any]:
    sample = largest(operator, device)
    args, plain = sample.make(device, torch.float32), sample.make(device, torch.float32)
    calls = {"ours": lambda: operator.call(*args), "plain": lambda: operator.reference(*plain)}
    with torch.no_grad():
        found = alternate(calls, device, quiet=quiet, seconds=seconds, warm=1)
    moved = operator.cost(*args).bytes
    return {
        "operator": operator.name,
        "sample": sample.name,
        "bytes": moved,
        "variants": found,
        "bytes_per_s": moved / found["ours"]["s"],
        "times_faster": found["plain"]["s"] / found["ours"]["s"],
    }
