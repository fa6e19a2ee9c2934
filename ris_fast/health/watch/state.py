"""What an optimizer keeps of its gradients' squares, beside the epsilon that it adds to their root."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ris_fast.health.watch.samples import few_numbers

SQUARES = ("exp_avg_sq", "square_avg", "sum")  # of Adam and its kin, RMSprop, Adagrad


def denominators(optimizer: Optimizer, parameters: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By name of a tensor: the epsilon, and the median of the roots that it is added to, of entries that are not zero.

    Reads the device.
    """
    names = {id(p): name for name, p in parameters.items()}
    pairs = [(group, p) for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    found = {names[id(p)]: _denominator(group, optimizer.state.get(p, {})) for group, p in pairs}
    return {name: each for name, each in found.items() if each}


def _denominator(group: dict[str, Any], state: dict[str, Any]) -> tuple[float, float] | None:
    eps = group.get("eps")
    squares = next((state[key] for key in SQUARES if isinstance(state.get(key), Tensor)), None)
    if not isinstance(eps, float) or squares is None:
        return None
    values = few_numbers([squares]).double()
    values = values[values > 0]
    if not len(values):
        return None
    betas, step = group.get("betas"), state.get("step")
    decay = betas[1] if "exp_avg_sq" in state and betas else 0.0
    correction = 1.0 - float(decay) ** float(step) if step is not None and decay else 1.0
    return eps, math.sqrt(float(values.median()) / max(correction, 1e-12))


def steps_of(optimizer: Optimizer) -> int | None:
    """How many steps the state has behind it: 0 for an empty one, None where it does not say, or on a device."""
    if not optimizer.state:
        return 0
    step = next(iter(optimizer.state.values())).get("step")
    if isinstance(step, Tensor):
        return int(step) if step.device.type == "cpu" and step.numel() == 1 else None
    return int(step) if isinstance(step, (int, float)) else None
