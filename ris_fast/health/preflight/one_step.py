"""Preflight of one optimizer step: made once, on the gradient of all its micro-batches, which nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import all_finite, listed, on_a_grid, rounded_to_16_bits, total_norm
from ris_fast.health.preflight.parameters import changed_by_a_pass
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.schedule import DECAY_PER_STEP
from ris_fast.health.preflight.step_probe import StepTrace, few_scenes, take_step
from ris_fast.health.preflight.tensor_scales import clipped_apart, one_by_one
from ris_fast.physics.scenes import Scenes
from ris_fast.training.attachments import attached
from ris_fast.training.telemetry.step_window import median

SCALER_STEPS = 24  # a dynamic loss scale halves its way to one that fits in fewer
FOREIGN = 0.3  # share of the step's gradient that no sum of its parts explains, from which shares say nothing
VISIBLE = 1e-6  # of a weight: a step that rounding does not swallow
ALIKE = 0.999  # cosine of two gradients, above which no sum tells them apart
OF_BOTH, LEAST_OLD = 1e-3, 0.05  # of a gradient: what two do not explain; share of an earlier one in it
TINY = 1e-20  # below which a norm is lost in float32
SHORT = 0.1  # of the way that the optimizer reports
EXACT = 0.02  # of a norm: more than rounding and the order of sums


def one_step(context: PreflightContext) -> Iterator[Finding]:
    """One call steps once, on the gradient of all its micro-batches, which nothing touches on its way."""
    group = context.groups[0]
    expected = parts_of(context, group) if len(group) > 1 or context.optimizer.loss_scale is not None else []
    before = [parameter.detach().clone() for parameter in context.model.parameters()]
    first = take_step(context, group, context.trainer.plan.planned)
    if first.attempted == 1 and first.skipped == 0:
        yield from _moved_otherwise(context, before, first)
    own = {id(p) for g in context.optimizer.param_groups for p in g["params"]}
    raw = [g for p, g in zip(context.model.parameters(), first.raw) if g is not None and id(p) in own]
    norm = total_norm(raw)
    if first.attempted < 1:
        yield from _no_step(first.reached, norm)
        return
    if first.attempted > 1:
        yield Finding("step_called_twice", f"one call of the step made {first.attempted} optimizer steps.")
    if not raw:
        return
    yield from _on_the_way(context, first, norm, expected)
    if first.skipped == 0 and 0 < norm < math.inf:
        yield from _shares(context, group, first, expected)
    few = few_scenes(group)
    alone = parts_of(context, few) if 0 < norm < math.inf else []
    second = take_step(context, few, context.trainer.plan.planned)
    if second.residual_grad_norm > 1e-3 * max(norm, 1e-30) and math.isfinite(second.residual_grad_norm):
        yield Finding(
            "gradients_never_cleared",
            "at the start of the second step the gradients still have norm "
            f"{second.residual_grad_norm:.3g} of the first one's {norm:.3g}.",
        )
    elif first.skipped == second.skipped == 0 and (found := _of_both(first, second)) is not None:
        yield found
    elif first.skipped == second.skipped == 0:
        shares = [scenes.batch / sum(each.batch for each in few) for scenes in few]
        yield from one_by_one(context, second, alone, shares)


def _of_both(first: StepTrace, second: StepTrace) -> Finding | None:
    """How much of the first step's gradient is in what the second was given, where it is made of the two."""
    pairs = [
        (a, b, c)
        for a, b, c in zip(first.raw, second.raw, second.given)
        if a is not None and b is not None and c is not None
    ]
    if all(torch.equal(now, given) for _, now, given in pairs):
        return None
    if not all(map(all_finite, (first.raw, second.raw, second.given))):
        return None
    before, now, given = (torch.cat([pair[side].double().flatten() for pair in pairs]) for side in range(3))
    before, now, given = before / first.scale, now / second.scale, given / second.scale
    sizes, product = (float(before @ before), float(now @ now)), float(before @ now)
    if not min(sizes) > 0 or abs(product) > ALIKE * math.sqrt(sizes[0] * sizes[1]):
        return None
    sides, rest = (float(before @ given), float(now @ given)), sizes[0] * sizes[1] - product**2
    old, new = ((sizes[1 - k] * sides[k] - product * sides[1 - k]) / rest for k in (0, 1))
    left = float((given - old * before - new * now).norm())
    if left > OF_BOTH * float(given.norm()) or not abs(old) > LEAST_OLD:
        return None
    seen = (
        f"the gradient that the second step is given is {old:.2f} times that of the first step and {new:.2f} times its"
        " own"
    )
    if abs(old - 1) < LEAST_OLD and abs(new - 1) < LEAST_OLD:
        return Finding("gradients_never_cleared", f"{seen}: those of earlier steps are added up outside of .grad.")
    late = " It steps one batch late, or again and again on one gradient." if abs(new) < LEAST_OLD else ""
    return Finding(
        "wrong_backward",
        f"{seen}.{late} Where gradients are exchanged with a delay, or smoothed over steps, that is meant.",
        certain=False,
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


def _on_the_way(
    context: PreflightContext, taken: StepTrace, raw: float, expected: list[list[Tensor | None]]
) -> Iterator[Finding]:
    """The gradient that the optimizer measured is the one that backward left, but for the loss scale."""
    seen = taken.seen_norm * taken.scale
    if not all_finite(taken.raw):
        nonfinite = sum(not all_finite([part]) for part in taken.raw)
        where = f"backward leaves {nonfinite} of {len(taken.raw)} tensors with values that are not finite"
        if math.isfinite(seen) and taken.skipped == 0:
            yield Finding(
                "sanitised_gradients", f"{where}, and the optimizer receives a finite gradient of norm {seen:.3g}."
            )
        elif expected and all(all_finite(part) for part in expected):
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
    elif raw > 0 and seen < (1 - EXACT) * raw and (factors := clipped_apart(list(context.parameters), taken)):
        yield Finding(
            "clipped_apart",
            f"between backward and the optimizer the gradients of {len(factors)} tensors are multiplied by factors of"
            f" their own, from {min(factors.values()):.2g} to {max(factors.values()):.2g}, and have one norm then:"
            f" {listed(list(factors))}. Each is clipped by itself, which turns the whole gradient.",
            advice="Clip all together: clip_grad_norm_(model.parameters(), limit), once before the step.",
            certain=False,
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


def _moved_otherwise(context: PreflightContext, before: list[Tensor], taken: StepTrace) -> Iterator[Finding]:
    """Weights are finite where the gradients were, and have moved by as much as the optimizer reports."""
    names = {id(p): name for name, p in context.parameters.items()}
    reported = dict(zip(context.optimizer.tensor_names, context.optimizer.telemetry()[:, 2].tolist()))
    broken, wrong, still, moving = [], [], [], False
    by_passes = changed_by_a_pass(context)
    shares: dict[str, float] = {}
    for parameter, kept in zip(context.model.parameters(), before):
        name, way = names[id(parameter)], total_norm([parameter - kept])
        if name in by_passes:
            continue  # which has a check of its own, that lets a first pass set weights by its scenes
        if not math.isfinite(way):
            broken += [name] if all_finite([kept]) else []
        elif name in reported and way > 1.05 * reported[name] + 1e-5 * float(kept.norm()) + TINY:
            wrong.append((name, parameter, f"{name} by {way:.3g} instead of {reported[name]:.3g}"))
        elif name in reported and reported[name] > VISIBLE * float(kept.norm()) > 0:
            still += [name] if way == 0.0 else []
            moving = moving or way > 0.0
            shares[name] = way / reported[name]
    if broken and all_finite(taken.given or taken.raw):
        eps = min(group.get("eps", 0.0) for group in context.optimizer.param_groups)
        yield Finding(
            "nonfinite_step",
            f"one step makes {len(broken)} of {len(before)} tensors NaN or infinite, first {broken[0]}, from gradients"
            f" that are finite (Adam's epsilon is {eps:.2g}).",
        )
    elif still and not moving and not rounded_to_16_bits(context.model.parameters()):
        yield Finding(
            "step_without_effect",
            f"the optimizer reports that it moved {len(still)} tensors, first {still[0]} by {reported[still[0]]:.2g},"
            " and none of the network's weights has changed.",
        )
    elif len(shares) > 1 and not wrong and max(shares.values()) < SHORT:
        most = max(shares, key=shares.__getitem__)
        yield Finding(
            "step_without_effect",
            f"weights move by at most {shares[most]:.1%} of what the optimizer reports, in {most}: something puts"
            " them back,"
            " or another rule than the optimizer's makes the step. Where slow weights follow fast ones, that is meant.",
            certain=False,
        )
    elif wrong and (grids := [name for name, each, _ in wrong if on_a_grid(each)]) and 2 * len(grids) > len(wrong):
        tensor = context.parameters[grids[0]]
        yield Finding(
            "low_precision_weights",
            f"after one step the {tensor.numel()} numbers of {grids[0]} have {len(tensor.detach().unique())} different"
            f" values, and so it is in {len(grids)} tensors: something rounds the weights to a few levels, and"
            " updates below"
            " their spacing are lost.",
        )
    elif wrong and (share := _shrunk(wrong, dict(zip(map(id, context.model.parameters()), before)), reported)):
        yield Finding(
            "weight_decay_too_large",
            f"beside what the optimizer reports, one step takes {share:.1%} of the weights of {len(wrong)} tensors:"
            f" {listed([name for name, _, _ in wrong])}. A decay or a shrinkage of its own does, in every step.",
            certain=False,
        )
    elif wrong and not rounded_to_16_bits(context.model.parameters()):
        yield _moved_twice(context, [each for _, each, _ in wrong], [said for _, _, said in wrong])


def _shrunk(
    moved: Sequence[tuple[str, Tensor, str]], before: dict[int, Tensor], reported: dict[str, float]
) -> float | None:
    """The share of the weights that one step took away from most of all tensors alike, beside what the optimizer
    reports; None where it did something else, or little."""
    shares = []
    for name, parameter, _ in moved:
        kept, way = (each.detach().double() for each in (before[id(parameter)], parameter - before[id(parameter)]))
        share = -float((way * kept).sum() / kept.square().sum().clamp_min(1e-300))
        if float((way + share * kept).norm()) <= 1.05 * reported[name] + 1e-5 * float(kept.norm()):
            shares.append(share)
    usual = median(shares) if 2 * len(shares) > len(before) else 0.0
    return (
        usual if DECAY_PER_STEP < usual < 1.0 and median([abs(each - usual) for each in shares]) < usual / 4 else None
    )


def _moved_twice(context: PreflightContext, tensors: list[Tensor], said: list[str]) -> Finding:
    """Tensors that moved further than the optimizer moved them: by another optimizer that holds them, or by what else
    reaches them."""
    mine = {id(each) for each in tensors}
    seen = f"in one step {len(said)} tensors moved further than the optimizer moved them: {listed(said)}"
    trainer = context.trainer
    owners = [trainer, trainer.step, trainer.optimizer, trainer.loss, trainer.source, trainer.model]
    for other in attached(owners):
        if isinstance(other, Optimizer) and other is not context.optimizer:
            shared = [each for group in other.param_groups for each in group["params"] if id(each) in mine]
            if shared:
                kind = type(other).__name__
                return Finding("duplicate_parameters", f"{seen}; {len(shared)} of them are in another {kind} too.")
    return Finding(
        "weights_changed_outside",
        f"{seen}; something else changes them in the same step. The two likeliest: a second optimizer that holds the"
        " same tensors, and code in a hook that writes into them, as an average or a constraint does.",
        advice="Print p._version before and after each call in the step to find who writes. Where a second optimizer"
        " does, give each tensor to one of them; where a constraint does, write it as a parametrization.",
        certain=len(said) == len(context.parameters),
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
        found.append(derivatives(total, live))
    return found


def _shares(
    context: PreflightContext, group: Sequence[Scenes], taken: StepTrace, expected: list[list[Tensor | None]]
) -> Iterator[Finding]:
    """How much of each micro-batch is in the step's gradient: its share of the scenes, or the sum is wrong."""
    if len(group) < 2 or not expected or not all(all_finite(part) for part in expected):
        return
    live = [g for p, g in zip(context.model.parameters(), taken.raw) if p.requires_grad]
    zero = [torch.zeros_like(g) if g is not None else torch.zeros(()) for g in live]
    columns = torch.stack(
        [torch.cat([(g if g is not None else z).flatten().double() for g, z in zip(part, zero)]) for part in expected]
    )
    target = torch.cat([(g if g is not None else z).flatten().double() for g, z in zip(live, zero)]) / taken.scale
    found = torch.linalg.lstsq(columns.T.cpu(), target[:, None].cpu()).solution[:, 0]
    if float((columns.T.cpu() @ found - target.cpu()).norm()) > FOREIGN * float(target.norm()):
        return  # no sum of the parts: clipped entry by entry, or with something added
    total = sum(scenes.batch for scenes in group)
    right = torch.tensor([scenes.batch / total for scenes in group], dtype=torch.float64)
    if bool(((found - right).abs() < 0.1 * right).all()):
        return
    shown = ", ".join(f"{value:.2f}" for value in found.tolist())
    seen = f"the parts of a step enter its gradient with weights {shown}; their shares are {right[0]:.2f}"
    gone = found.abs() < 0.1 * right
    if bool(gone.all()):
        left = float(found.sum())
        yield Finding(
            "clip_too_small" if abs(left) < 1e-3 else "zeroed_gradients",
            f"the parts of a step enter its gradient with weights that sum to {left:.2g} in place of 1: something"
            " makes the"
            " gradient of each smaller before they are added, as a clip of every micro-batch does.",
            certain=False,
        )
    elif bool(gone[:-1].all()) and not bool(gone[-1]):
        yield Finding("last_micro_batch_only", f"{seen}.")
    elif bool(gone.any()):
        yield Finding("rank_gradient_missing", f"{seen}.")
    else:
        yield Finding("accumulation_not_divided", f"{seen}.")


CHECKS = {"one call makes one step, on an untouched gradient": one_step}
