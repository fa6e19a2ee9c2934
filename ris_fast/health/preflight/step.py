"""Preflight of the step: real optimizer steps through the trainer's own objects, watched from inside, then undone.

Legend: T tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.parameters import listed, rounded_to_16_bits
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.physics.scenes import Scenes
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.telemetry.step_telemetry import Telemetry

STEPS = 5
FEW = 4  # scenes of a micro-batch where a step matters and not what it learns
SCALER_STEPS = 24  # a dynamic loss scale halves its way to one that fits in fewer
STANDS_STILL = 1e-5  # of the raw weights' way; an average over ten thousand steps has gone more
ROUNDING = 1e-6  # of the weights: a shorter way is lost in an average's rounding
EXACT = 0.02  # of a norm: more than rounding and the order of sums


@dataclass
class Taken:
    """What one step did, measured between its parts. Lists are in the order of the model's parameters."""

    residual_grad_norm: float = math.nan  # gradient norm after the gradients were cleared
    raw: list[Tensor | None] = field(default_factory=list)
    scale: float = 1.0  # of the loss
    attempted: int = 0
    skipped: int = 0
    seen_norm: float = math.nan  # of the gradient that the optimizer measured
    rates: list[float] = field(default_factory=list)
    reached: bool = False  # the optimizer's own step was called


class StepProbe(Telemetry):
    """In place of telemetry, which then measures nothing: keeps the gradients themselves, where `gradients` are asked
    for."""

    def __init__(self, context: PreflightContext, gradients: bool) -> None:
        super().__init__(context.model, context.optimizer, 1)
        self.taken, self.gradients, self.enabled = Taken(), gradients, False

    def cleared(self) -> None:
        if self.gradients:
            self.taken.residual_grad_norm = _norm([p.grad for p in self.model.parameters()])

    def shown(self, scenes: Scenes, factor: Tensor) -> None:
        """Nothing: the scenes are known."""

    def differentiated(self) -> None:
        if self.gradients:
            self.taken.raw = [None if p.grad is None else p.grad.detach().clone() for p in self.model.parameters()]


def take_step(
    context: PreflightContext, group: Sequence[Scenes], planned: int, seed: int = 0, *, gradients: bool = True
) -> Taken:
    """One optimizer step over `group`, and what happened in it."""
    kept, probe = context.step.telemetry, StepProbe(context, gradients)
    before = context.optimizer.counters()
    context.step.telemetry = probe
    torch.manual_seed(seed)
    context.model.train()

    def reached(*_: Any) -> None:
        """The rates of this update: a scheduler of the user's may set those of the next behind it."""
        probe.taken.reached, probe.taken.rates = True, [float(group["lr"]) for group in context.optimizer.param_groups]

    hook = context.optimizer.register_step_pre_hook(reached)
    try:
        context.step(group, planned)
    finally:
        hook.remove()
        context.step.telemetry = kept
    after, taken = context.optimizer.counters(), probe.taken
    taken.attempted, taken.skipped = after["attempted"] - before["attempted"], after["skipped"] - before["skipped"]
    taken.scale, taken.seen_norm = float(before.get("loss_scale") or 1.0), float(after["grad_norm"])
    return taken


# ---- one step
# ---------------------------------------------------------------------------------------------------------


def one_step(context: PreflightContext) -> Iterator[Finding]:
    """One call steps once, on the gradient of all its micro-batches, which nothing touches on its way."""
    group = context.groups[0]
    expected = parts_of(context, group) if len(group) > 1 or context.optimizer.loss_scale is not None else []
    before = [parameter.detach().clone() for parameter in context.model.parameters()]
    first = take_step(context, group, context.trainer.plan.planned)
    if first.attempted == 1 and first.skipped == 0:
        yield from _moved_otherwise(context, before)
    own = {id(p) for g in context.optimizer.param_groups for p in g["params"]}
    raw = [g for p, g in zip(context.model.parameters(), first.raw) if g is not None and id(p) in own]
    if first.attempted < 1:
        yield from _no_step(first.reached, _norm(raw))
        return
    if first.attempted > 1:
        yield Finding("step_called_twice", f"one call of the step made {first.attempted} optimizer steps.")
    if not raw:
        return
    yield from _on_the_way(context, first, _norm(raw), expected)
    if first.skipped == 0 and math.isfinite(_norm(raw)) and _norm(raw) > 0:
        yield from _shares(context, group, first, expected)
    second = take_step(context, _few(group), context.trainer.plan.planned)
    if second.residual_grad_norm > 1e-3 * max(_norm(raw), 1e-30) and math.isfinite(second.residual_grad_norm):
        yield Finding(
            "gradients_never_cleared",
            "at the start of the second step the gradients still have norm "
            f"{second.residual_grad_norm:.3g} of the first one's {_norm(raw):.3g}.",
        )


def _no_step(reached: bool, raw: float) -> Iterator[Finding]:
    """Nothing called the optimizer, or it found no gradient where there had been one."""
    if not reached:
        yield Finding("step_never_called", "one call of the step made 0 optimizer steps.")
    elif raw > 0:
        yield Finding(
            "gradients_cleared_before_step",
            f"backward leaves a gradient of norm {raw:.3g} and the optimizer finds none.",
        )


def _norm(parts: Sequence[Tensor | None]) -> float:
    norms = [torch.linalg.vector_norm(part.detach(), dtype=torch.float64) for part in parts if part is not None]
    return float(torch.stack(norms or [torch.zeros(())]).norm())


def _few(group: Sequence[Scenes]) -> list[Scenes]:
    return [scenes[:FEW] for scenes in group]


def _finite(parts: Sequence[Tensor | None]) -> bool:
    return all(bool(part.isfinite().all()) for part in parts if part is not None)


def _on_the_way(
    context: PreflightContext, taken: Taken, raw: float, expected: list[list[Tensor | None]]
) -> Iterator[Finding]:
    """The gradient that the optimizer measured is the one that backward left, but for the loss scale."""
    seen = taken.seen_norm * taken.scale
    if not _finite(taken.raw):
        broken = sum(1 for part in taken.raw if part is not None and not bool(part.isfinite().all()))
        where = f"backward leaves {broken} of {len(taken.raw)} tensors with values that are not finite"
        if math.isfinite(seen) and taken.skipped == 0:
            yield Finding(
                "sanitised_gradients", f"{where}, and the optimizer receives a finite gradient of norm {seen:.3g}."
            )
        elif expected and all(_finite(part) for part in expected):
            if context.optimizer.loss_scale != "dynamic" or _never_applies(context):
                yield Finding(
                    "scaler_skips_all",
                    f"{where}; without the loss scale of {taken.scale:g} all are finite, and no step is applied.",
                )
        else:
            yield Finding("nonfinite_gradients", f"{where}, and the step is skipped.")
    elif raw > 0 and seen == 0:
        yield Finding(
            "gradients_cleared_before_step",
            f"backward leaves a gradient of norm {raw:.3g} and the optimizer finds zero.",
        )
    elif raw > 0 and seen < (1 - EXACT) * raw:
        cause = (
            "clip_before_unscale" if taken.scale > 1 else "clip_too_small" if seen < 1e-3 * raw else "zeroed_gradients"
        )
        yield Finding(
            cause,
            f"between backward and the optimizer the gradient's norm falls from {raw:.3g} to {seen:.3g}, "
            f"at a loss scale of {taken.scale:g}.",
        )


def _never_applies(context: PreflightContext) -> bool:
    return all(
        take_step(context, context.groups[0], context.trainer.plan.planned, gradients=False).skipped
        for _ in range(SCALER_STEPS)
    )


# ---- what the step's gradient is made of ---------------------------------------------------------------------------


def parts_of(context: PreflightContext, group: Sequence[Scenes]) -> list[list[Tensor | None]]:
    """The gradient of each micro-batch's mean loss by itself, with the random numbers that the step will use."""
    live = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
    context.model.train()
    torch.manual_seed(0)
    found = []
    for scenes in group:
        total = context.loss(context.step.predict(scenes), scenes)[0]
        if not total.requires_grad or not live:
            return []
        found.append(list(torch.autograd.grad(total, live, allow_unused=True)))
    return found


def _shares(
    context: PreflightContext, group: Sequence[Scenes], taken: Taken, expected: list[list[Tensor | None]]
) -> Iterator[Finding]:
    """How much of each micro-batch is in the step's gradient: its share of the scenes, or the sum is wrong."""
    if len(group) < 2 or not expected or not all(_finite(part) for part in expected):
        return
    live = [g for p, g in zip(context.model.parameters(), taken.raw) if p.requires_grad]
    zero = [torch.zeros_like(g) if g is not None else torch.zeros(()) for g in live]
    columns = torch.stack(
        [torch.cat([(g if g is not None else z).flatten().double() for g, z in zip(part, zero)]) for part in expected]
    )
    target = torch.cat([(g if g is not None else z).flatten().double() for g, z in zip(live, zero)]) / taken.scale
    found = torch.linalg.lstsq(columns.T.cpu(), target[:, None].cpu()).solution[:, 0]
    total = sum(scenes.batch for scenes in group)
    right = torch.tensor([scenes.batch / total for scenes in group], dtype=torch.float64)
    if bool(((found - right).abs() < 0.1 * right).all()):
        return
    shown = ", ".join(f"{value:.2f}" for value in found.tolist())
    seen = f"the parts of a step enter its gradient with weights {shown}; their shares are {right[0]:.2f}"
    gone = found.abs() < 0.1 * right
    if bool(gone[:-1].all()) and not bool(gone[-1]):
        yield Finding("last_micro_batch_only", f"{seen}.")
    elif bool(gone.any()):
        yield Finding("rank_gradient_missing", f"{seen}.")
    else:
        yield Finding("accumulation_not_divided", f"{seen}.")


# ---- several steps
# ------------------------------------------------------------------------------------------------------


def several_steps(context: PreflightContext) -> Iterator[Finding]:
    """Over a few steps the rate follows its plan, weights move and keep their bits, and the average follows them."""
    first = {name: value.detach().clone() for name, value in context.parameters.items()}
    rates, applied, planned = [], [], context.trainer.plan.planned
    before = context.optimizer.counters()
    for number in range(STEPS):
        applied.append(context.optimizer.counters()["applied"])
        taken = take_step(context, _few(context.groups[number % len(context.groups)]), planned, number, gradients=False)
        rates.append(taken.rates)
    after = context.optimizer.counters()
    if after["attempted"] - before["attempted"] < STEPS - 1 and after["attempted"] != before["attempted"]:
        yield Finding(
            "optimizer_state_lost",
            f"{STEPS} calls of the step made {after['attempted'] - before['attempted']} optimizer "
            "steps: its count starts over.",
        )
    yield from _rates(context, rates, applied, planned)
    if rounded_to_16_bits(context.model) and not _rounded(first.values()):
        yield Finding(
            "low_precision_weights",
            "after a few steps the last 16 bits of every weight are zero: they are rounded to "
            "bfloat16, and updates below its spacing are lost.",
        )
    moved = any(not torch.equal(value, first[name]) for name, value in context.parameters.items())
    if moved and context.optimizer.ema_decay:
        yield from _average(context, first)


def _rounded(values: Any) -> bool:
    return all(
        not bool((v.contiguous().view(torch.int32) & 0xFFFF).any())
        for v in values
        if v.dtype == torch.float32 and v.numel() > 64
    )


def _rates(context: PreflightContext, rates: list[list[float]], applied: list[int], planned: int) -> Iterator[Finding]:
    """Each step's rate against the one that its number among the applied steps stands for."""
    settings = context.config.optimizer

    def factor(step: int) -> float:
        return learning_rate_factor(step, planned, settings.warmup, settings.final_lr)

    for step, values in zip(applied, rates):
        for group, rate in zip(context.optimizer.param_groups, values):
            peak = group.get("peak_lr", 0.0)
            if peak > 0 and abs(rate / peak - factor(step)) > 1e-6:
                fits = [k for k in range(0, 64) if abs(rate / peak - factor(k)) < 1e-6 * max(rate / peak, 1e-9)]
                cause = (
                    "learning_rate_off_plan"
                    if not fits
                    else "schedule_per_batch"
                    if min(fits) > step
                    else "schedule_per_epoch"
                )
                yield Finding(
                    cause,
                    f"after {step} updates the rate of {group.get('name', 'a group')} is {rate:.3g} instead of "
                    f"{peak * factor(step):.3g}{f', that of update {min(fits)}' if fits else ''}.",
                )
                return


def _average(context: PreflightContext, first: dict[str, Tensor]) -> Iterator[Finding]:
    """The averaged weights lie between the first ones and the present ones, and do not stay in the network."""
    raw = {name: value.detach().clone() for name, value in context.parameters.items()}
    with context.optimizer.ema():
        mean = {name: value.detach().clone() for name, value in context.parameters.items()}
    back = all(torch.equal(value, raw[name]) for name, value in context.parameters.items())
    moved = [name for name in raw if not torch.equal(raw[name], first[name])]
    if not back:
        yield Finding("ema_saved_over_raw", "after the averaged weights were used the raw ones do not come back.")
    if any(not bool(value.isfinite().all()) for value in mean.values()) and all(
        bool(v.isfinite().all()) for v in raw.values()
    ):
        yield Finding("ema_nonfinite", f"after {STEPS} steps the averaged weights are not finite; the raw ones are.")
    elif _way(mean, first) < STANDS_STILL * _way(raw, first):
        yield Finding(
            "ema_frozen",
            f"after {STEPS} steps the averaged weights have gone {_way(mean, first) / _way(raw, first):.1e} of the "
            f"way of the raw ones, which moved in {len(moved)} tensors: {listed(moved)}.",
        )
    elif all(torch.equal(mean[name], raw[name]) for name in moved) and _way(raw, first) > ROUNDING * _norm(
        list(first.values())
    ):
        yield Finding("ema_equals_raw", f"after {STEPS} steps all averaged weights are the raw ones, bit for bit.")


def _way(weights: dict[str, Tensor], first: dict[str, Tensor]) -> float:
    return _norm([weights[name] - first[name] for name in first])


def _moved_otherwise(context: PreflightContext, before: list[Tensor]) -> Iterator[Finding]:
    """Weights have moved by what the optimizer says that it moved them by."""
    names = {id(p): name for name, p in context.parameters.items()}
    told = dict(zip(context.optimizer.tensor_names, context.optimizer.telemetry()[:, 2].tolist()))
    wrong = []
    for parameter, kept in zip(context.model.parameters(), before):
        name, way = (
            names[id(parameter)],
            float(torch.linalg.vector_norm(parameter.detach() - kept, dtype=torch.float64)),
        )
        if name in told and way > 1.05 * told[name] + 1e-5 * float(kept.norm()):
            wrong.append(f"{name} by {way:.3g} instead of {told[name]:.3g}")
    if wrong and not rounded_to_16_bits(context.model):
        yield Finding(
            "duplicate_parameters",
            f"in one step {len(wrong)} tensors moved further than the optimizer moved them: "
            f"{listed(wrong)}; something else updates them too.",
        )


CHECKS = {
    "one call makes one step, on an untouched gradient": one_step,
    "a few steps keep their contracts": several_steps,
}
