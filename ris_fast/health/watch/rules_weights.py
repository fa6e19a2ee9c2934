"""Rules of `watch` on weights and on the options that move them: rates, decay, eps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import OptimizerRecord, StepRecord, is_finite

DECOUPLED = {"SGD", "AdamW", "FusedAdamW"}  # they and their kin take rate times decay of the weights off in each step


def nonfinite_step(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """A step that makes weights that are not finite out of weights and gradients that are."""
    for record in optimizer.records:
        if not is_finite(record.weights_before) or not is_finite(record.grad_at_step):
            return
        lost = [name for name, norm in zip(record.names, record.weights_after) if not bool(norm.isfinite())]
        if lost and not record.closure:
            yield finding(
                "nonfinite_step",
                f"weights and gradients (norm {float(record.grad_at_step.norm()):.3g}) are finite before the step, and"
                f" after it the weights of {len(lost)} of {len(record.names)} tensors are not: {', '.join(lost[:3])}."
                f" {_how_lost(optimizer, record, lost)}",
                record.step + 1,
            )
            return


def nonfinite_weights(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Weights as they are now: what happens in steps that are not looked at stays in them."""
    lost = [name for name, norm in optimizer.weight_norms.items() if not math.isfinite(norm)]
    if not lost:
        return
    how = _how_lost(optimizer, optimizer.records[-1], lost)
    evidence = (
        f"the weights of {len(lost)} of {len(optimizer.weight_norms)} tensors are not finite now: "
        f"{', '.join(lost[:3])}."
    )
    if "eps" in how:
        doubt = "No step that was looked at shows it."
        yield finding("nonfinite_step", f"{evidence} {how}", optimizer.steps, doubt)
    else:
        yield finding("nonfinite_gradients", evidence, optimizer.steps)


def _how_lost(optimizer: OptimizerRecord, record: StepRecord, lost: Iterable[str]) -> str:
    """Which of the optimizer's options makes a number that is not finite."""
    names = set(lost)
    for group in optimizer.groups:
        eps = group.options.get("eps")
        for dtype in {tensor.dtype for tensor in group.tensors if tensor.name in names}:
            if isinstance(eps, float) and float(torch.tensor(eps, dtype=dtype)) == 0.0:
                return (
                    f"The optimizer's {_zero_eps(eps, dtype)}: where the mean square of a gradient is zero too, the"
                    " step divides by zero."
                )
    return f"The rate is {max(record.rates):.3g}: look at the optimizer's options and at the weights' number format."


def _zero_eps(eps: float, dtype: torch.dtype) -> str:
    name, least = str(dtype).removeprefix("torch."), torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return f"eps of {eps:.3g} is zero in {name}, whose smallest number is {least:.2g}" if eps else "eps is zero"


def zero_learning_rate(optimizer: OptimizerRecord, frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Groups whose rate was zero in every step that was looked at. A schedule may end there; one group of several may
    be meant to stand still."""
    records, groups = optimizer.records, optimizer.groups
    rates = [[record.rates[n] for record in records if n < len(record.rates)] for n in range(len(groups))]
    zero = [n for n, of_group in enumerate(rates) if len(of_group) > 1 and not any(rate > 0 for rate in of_group)]
    if names := [f"group {n}" for n in zero if not all(t.name.startswith(frozen) for t in groups[n].tensors)]:
        yield finding(
            "zero_learning_rate",
            f"{len(names)}: {', '.join(names[:3])}, in all {len(records)} steps that were looked at.",
            records[-1].step + 1,
            "" if len(zero) == len(groups) else MAY_BE_MEANT,
        )


def learning_rate_too_small(records: list[StepRecord]) -> Iterator[Finding]:
    """Updates that float32 does not see, at a rate that explains them and does not rise."""
    steps = [
        (max(record.rates), float(record.update_ratio))
        for record in records
        if record.update_ratio is not None and not bool(record.update_ratio.isnan()) and max(record.rates) > 0
    ]
    if len(steps) > 1 and steps[0][0] >= steps[-1][0] and all(rate < 1e-6 and ratio < 1e-8 for rate, ratio in steps):
        yield finding(
            "learning_rate_too_small",
            f"a step at a rate of {steps[-1][0]:.3g} moves the weights by no more than "
            f"{max(ratio for _, ratio in steps):.2g} of their size.",
            records[-1].step + 1,
        )


def weight_decay_too_large(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Where every group takes rate times decay of the weights off in each step."""
    decoupled = bool(optimizer.kinds & DECOUPLED)
    options = [group.options for group in optimizer.groups]
    if not all(decoupled or each.get("decoupled_weight_decay") for each in options):
        return
    decay = max((float(each.get("weight_decay") or 0.0) for each in options), default=0.0)
    share = min(max(record.rates) for record in optimizer.records) * decay
    if share >= 0.1:
        yield finding(
            "weight_decay_too_large",
            f"a decay of {decay:.3g} takes {share:.0%} off the weights in each step.",
            optimizer.records[-1].step + 1,
        )
