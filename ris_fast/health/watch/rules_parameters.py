"""Rules of `watch` on parameters: which the optimizers hold and train, what steps make of them, and the options for
that: rates, decay, eps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import EARLY, LoopRecord, OptimizerRecord, StepRecord, TensorRecord, is_finite

DECOUPLED = {"SGD", "AdamW", "FusedAdamW"}  # they and their kin take rate times decay of the weights off in each step


def parameter_findings(loop: LoopRecord) -> list[Finding]:
    """What is frozen, missing, there twice, or nobody's."""
    held = Counter(tensor for optimizer in loop.optimizers for tensor in optimizer.tensors)
    trained = {tensor for optimizer in loop.optimizers for tensor in optimizer.trained}
    meant = {each for each in loop.parameters if each.name.startswith(loop.frozen)}
    missing = [each for each in loop.parameters if each.trainable and each not in held and each not in meant]
    return [
        *_frozen(loop, meant, held, trained),
        *_stale(loop, missing, trained),
        *_listed("missing_from_optimizer", missing, loop.steps),
        *_listed("duplicate_parameters", [tensor for tensor, count in held.items() if count > 1], loop.steps),
    ]


def _listed(cause: str, tensors: list[TensorRecord], step: int, doubt: str = "") -> Iterator[Finding]:
    if tensors:
        names = ", ".join(tensor.name or "?" for tensor in tensors[:3])
        yield finding(cause, f"{len(tensors)}: {names}.", step, doubt)


def _frozen(
    loop: LoopRecord, meant: set[TensorRecord], held: Counter[TensorRecord], trained: set[TensorRecord]
) -> Iterator[Finding]:
    """Not those that were free in the last step of their optimizer: what is frozen afterwards trains all the same.

    Uncertain where all have been trained, were frozen since the watch began and no step shows it, or have stood still
    from the beginning and no optimizer holds them or they are most of the model.
    """
    free = {each for by in loop.optimizers if by.steps for each in by.tensors if each not in by.frozen}
    still = [each for each in loop.parameters if not each.trainable and each not in free and each not in meant]
    frozen = [each for each in still if each not in trained] or still
    doubt = "They were trained before. " + MAY_BE_MEANT if trained.issuperset(frozen) else MAY_BE_MEANT
    yield from _listed("frozen_parameters", frozen, loop.steps, "" if _certain(loop, frozen, held, trained) else doubt)


def _certain(
    loop: LoopRecord, frozen: list[TensorRecord], held: Counter[TensorRecord], trained: set[TensorRecord]
) -> bool:
    most = 2 * sum(each.size for each in frozen) > sum(each.size for each in loop.parameters)
    meant = loop.frozen_at_start.issuperset(frozen) and (most or held.keys().isdisjoint(frozen))
    at_steps = {each for optimizer in loop.optimizers for each in optimizer.frozen}
    return not meant and not trained.issuperset(frozen) and (loop.frozen_at_start | at_steps).issuperset(frozen)


def _stale(loop: LoopRecord, missing: list[TensorRecord], trained: set[TensorRecord]) -> Iterator[Finding]:
    """Tensors that are not the model's. A criterion may have its own, which receive gradients.

    Certain where such a tensor receives none and the model has one of its shape that no optimizer holds, or after some
    steps.
    """
    shapes = {tensor.shape for tensor in missing if tensor.size}
    owner = {each: optimizer for optimizer in loop.optimizers for each in optimizer.tensors if not each.name}
    idle = [(each, by) for each, by in owner.items() if each not in trained or each not in by.with_grad]
    certain = all(
        each not in by.with_grad and (each.shape in shapes or (by.steps >= EARLY and each not in trained))
        for each, by in idle
    )
    if idle:
        yield finding(
            "stale_optimizer_parameters",
            f"{len(idle)} of the optimizer's tensors are not the model's, of shapes "
            f"{', '.join(str(tensor.shape) for tensor, _ in idle[:3])}.",
            loop.steps,
            "" if certain else "They may be a criterion's, or of another network that the loss reads.",
        )


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


def nonfinite_weights(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Weights as they are now: what happens in steps that are not looked at stays in them."""
    if lost := [name for name, norm in optimizer.weight_norms.items() if not math.isfinite(norm)]:
        how, count = _how_lost(optimizer, optimizer.records[-1], lost), f"{len(lost)} of {len(optimizer.weight_norms)}"
        evidence = f"the weights of {count} tensors are not finite now: {', '.join(lost[:3])}."
        if "eps" in how:
            doubt = "No step that was looked at shows it."
            yield finding("nonfinite_step", f"{evidence} {how}", optimizer.steps, doubt)
        else:
            yield finding("nonfinite_gradients", evidence, optimizer.steps)


def _how_lost(optimizer: OptimizerRecord, record: StepRecord, lost: list[str]) -> str:
    """Which of the optimizer's options makes a number that is not finite."""
    for eps, dtype in [(g.get("eps"), p.dtype) for g in optimizer.groups for p in g["params"] if p.name in lost]:
        if isinstance(eps, float) and float(torch.tensor(eps, dtype=dtype)) == 0.0:
            name, least = str(dtype).removeprefix("torch."), torch.finfo(dtype).tiny * torch.finfo(dtype).eps
            zero = f"eps of {eps:.3g} is zero in {name}, whose smallest number is {least:.2g}" if eps else "eps is zero"
            return f"The optimizer's {zero}: where the mean square of a gradient is zero too, the step divides by zero."
    return f"The rate is {max(record.rates):.3g}: look at the optimizer's options and at the weights' number format."


def zero_learning_rate(optimizer: OptimizerRecord, frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Groups whose rate was zero in every step that was looked at. A schedule may end there; one group of several may
    be meant to stand still."""
    records, groups = optimizer.records, optimizer.groups
    rates = [[record.rates[n] for record in records if n < len(record.rates)] for n in range(len(groups))]
    zero = [n for n, of_group in enumerate(rates) if len(of_group) > 1 and not any(rate > 0 for rate in of_group)]
    if names := [f"group {n}" for n in zero if not all(t.name.startswith(frozen) for t in groups[n]["params"])]:
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
    decoupled = optimizer.kinds & DECOUPLED or all(each.get("decoupled_weight_decay") for each in optimizer.groups)
    decay = max((float(each.get("weight_decay") or 0.0) for each in optimizer.groups if decoupled), default=0.0)
    share = min(max(record.rates) for record in optimizer.records) * decay
    if share >= 0.1:
        evidence = f"a decay of {decay:.3g} takes {share:.0%} off the weights in each step."
        yield finding("weight_decay_too_large", evidence, optimizer.records[-1].step + 1)
