"""Preflight of a few steps in a row: rates follow their plan, weights keep their bits, averages follow the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.own_schedule import out_of_plan
from ris_fast.health.preflight.measures import all_finite, listed, rounded_to_16_bits, total_norm
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.step_probe import few_scenes, take_step
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.step import own_schedule

STEPS = 5
FROZEN = 1e-5  # of the raw weights' way; an average over ten thousand steps has gone more
# times the way of the weights, that no average of them goes; of the weights, more than steps that were taken back
BEYOND, FAR = 1.5, 0.01
SMALLER = 0.9  # times the first weights' norm, which an average that starts at zero does not reach in a few steps
NEARLY, SEARCHED = 0.03, 512  # of the last step; updates
SQUARED, LOST = 1e-15, 0.01  # a first moment whose square float32 can hold; share of the numbers
ROUNDING = 1e-6  # of the weights: a shorter way is lost in an average's rounding
LATE, LEAST_SHARE = 3, 2e-3  # weights of the last steps; of them in an average, more than rounding makes
ALIKE = 1e-3  # of the way: between an average and the mean of all weights so far
AHEAD_EPOCHS, MOST_AHEAD, SECONDS_AHEAD = 2, 48, 2.0  # of a schedule of the user's own: epochs, updates, seconds
PIECE, LONGEST, BEYOND_WARMUP = 256, 400, 2.0  # numbers of a tensor; updates; times the memory of the planned average


def several_steps(context: PreflightContext) -> Iterator[Finding]:
    """Over a few steps the rate follows its plan, weights move and keep their bits, and the average follows them."""
    first = {name: value.detach().clone() for name, value in context.parameters.items()}
    buffers = {name: value.detach().clone() for name, value in context.model.named_buffers()}
    rates, held, applied, planned = [], [], [], context.trainer.plan.planned
    before = context.optimizer.counters()
    furthest = last = 0.0
    idle = 0
    trail = [_pieces(context)]
    with context.optimizer.ema() if context.optimizer.ema_decay else nullcontext():
        start = _pieces(context)
    for number in range(STEPS):
        applied.append(context.optimizer.counters()["applied"])
        group = few_scenes(context.groups[number % len(context.groups)])
        previous = {name: value.detach().clone() for name, value in context.parameters.items()}
        taken = take_step(context, group, planned, number, gradients=False)
        rates.append(taken.rates)
        held.append([float(each["lr"]) for each in context.optimizer.param_groups])
        trail.append(_pieces(context))
        way = _way(context.parameters, first)
        idle += taken.attempted == 0 and way == last
        furthest, last = max(furthest, way), way
    after = context.optimizer.counters()
    if 0 < idle < STEPS:  # where all are, the gradient of one step says why
        yield Finding(
            "step_never_called",
            f"{idle} of {STEPS} calls of the step in a row made no optimizer step and moved no weight: what calls the"
            " optimizer does so in some steps only.",
            certain=idle > 1,
        )
    elif after["attempted"] - before["attempted"] < STEPS - 1 and after["attempted"] != before["attempted"]:
        yield Finding(
            "optimizer_state_lost",
            f"{STEPS} calls of the step made {after['attempted'] - before['attempted']} optimizer "
            "steps: its count starts over.",
        )
    if not own_schedule(context.step):
        yield from _rates(context, rates, held, applied, planned)
    yield from _second_moments(context)
    if rounded_to_16_bits(context.model.parameters()) and not rounded_to_16_bits(first.values()):
        yield Finding(
            "low_precision_weights",
            "after a few steps every weight is a number of 16 bits, kept in 32: they are rounded to bfloat16 or"
            " float16,"
            " and updates below its spacing are lost.",
        )
    moved = any(not torch.equal(value, first[name]) for name, value in context.parameters.items())
    if moved and context.optimizer.ema_decay and all_finite(context.parameters.values()):
        found = list(_average(context, first, furthest, previous)) or list(_statistics(context, buffers))
        yield from found or list(_outside(context, [start, *trail])) or _mean_of_all(context, trail)
    if own_schedule(context.step):  # last, since it goes on
        yield from _own_rates(context, rates, applied, planned)


def _pieces(context: PreflightContext) -> Tensor:
    """The first numbers of each tensor, in one row of float64."""
    return torch.cat([each.detach().flatten()[:PIECE].double() for each in context.parameters.values()])


def _mean_of_all(context: PreflightContext, trail: list[Tensor]) -> Iterator[Finding]:
    """The averaged weights forget: they are not the mean of all weights since the start, each as much as the last.

    An average that warms up is that mean at first. So where it is, the optimizer goes on by itself until a planned
    average would have forgotten.
    """
    weights, decay = trail[1:], context.optimizer.ema_decay or 0.0
    memory = 1.0 / (1.0 - decay) if decay < 1.0 else LONGEST
    updates = int(BEYOND_WARMUP * memory)
    if not STEPS < updates <= LONGEST or not _is_mean_of(context, weights):
        return
    generator = torch.Generator().manual_seed(61)
    while len(weights) < updates:
        for parameter in context.trainable.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        context.optimizer.step()
        weights.append(_pieces(context))
    if _is_mean_of(context, weights):
        yield Finding(
            "ema_cold",
            f"after {updates} updates the averaged weights are the mean of all weights since the first, each as much as"
            f" the last, though the run's average has a decay of {decay:g}, which is one over some {memory:.0f} steps:"
            " it forgets nothing, and the longer the run, the further it stays behind. Where all weights are to be"
            " averaged alike, that is meant.",
            advice="Average with a decay, as optimizer.ema_decay says; a mean over all weights is for the end of a run,"
            " from a step on at which they are good already.",
            certain=False,
        )


def _outside(context: PreflightContext, trail: list[Tensor]) -> Iterator[Finding]:
    """The averaged weights are made of what they began with and of the weights since then, each with a share that is
    not below zero: least squares find the shares."""
    rows = torch.stack(trail).cpu()
    with context.optimizer.ema():
        mean = _pieces(context).cpu()
    way = float((rows[-1] - rows[0]).norm())
    shares = torch.linalg.lstsq(rows.T, mean[:, None], driver="gelsd").solution[:, 0]
    if not way > 0 or float((rows.T @ shares - mean).norm()) > ALIKE * way:
        return  # it is made of something else, or began elsewhere
    early, late = float(shares[:-LATE].sum()), float(shares[-LATE:].sum())
    if late < -LEAST_SHARE:
        yield Finding(
            "ema_frozen",
            f"after {STEPS} steps the averaged weights are {early:.3f} times the first weights and"
            f" {late:.3f} times the last {LATE}: they go the other way than the weights. The difference of the two is"
            " added with the wrong sign.",
            advice="It is torch.lerp(average, weights, 1 - decay): average + (1 - decay) * (weights - average).",
            certain=False,
        )


def _is_mean_of(context: PreflightContext, weights: list[Tensor]) -> bool:
    rows = torch.stack(weights)
    with context.optimizer.ema():
        mean = _pieces(context)
    way = float((rows[-1] - rows[0]).norm())
    return way > 0 and float((mean - rows.mean(0)).norm()) < ALIKE * way


def _second_moments(context: PreflightContext) -> Iterator[Finding]:
    """Where an Adam's first moment is not zero its second is neither, unless the format has no number for it."""
    numbers, lost = 0, 0
    for state in context.optimizer.state.values():
        mean, square = state.get("exp_avg"), state.get("exp_avg_sq")
        if isinstance(mean, Tensor) and isinstance(square, Tensor) and mean.shape == square.shape:
            there = mean.abs() > SQUARED
            numbers, lost = numbers + int(there.sum()), lost + int((there & (square == 0)).sum())
    if lost > LOST * numbers:
        yield Finding(
            "gradient_underflow",
            f"after {STEPS} steps the second moments of {lost / numbers:.0%} of the optimizer's numbers are exactly"
            " zero, and their first moments are not: the squares of their gradients are below the smallest number of"
            " the format in which they are kept, and the step divides by eps alone.",
            advice="Keep the optimizer's second moments in float32 or bfloat16.",
        )


def _rates(
    context: PreflightContext, rates: list[list[float]], held: list[list[float]], applied: list[int], planned: int
) -> Iterator[Finding]:
    """Each step's rate against the planned one of its number among the applied steps.

    Args: held: what the groups say behind each step.
    """
    settings = context.config.optimizer

    def factor(step: int) -> float:
        return learning_rate_factor(step, planned, settings.warmup, settings.final_lr)

    for step, values, said in zip(applied, rates, held):
        for number, (group, rate) in enumerate(zip(context.optimizer.param_groups, values)):
            peak = group.get("peak_lr", 0.0)
            if peak > 0 and abs(rate / peak - factor(step)) > 1e-6:
                fits = _updates(rate / peak, factor)
                found = [_updates(each[number] / peak, factor) for each in rates]
                cause = "learning_rate_off_plan"
                if all(found):
                    least = [min(each) for each in found]
                    late = all(k <= at for k, at in zip(least, applied))
                    ahead = all(k > at for k, at in zip(least[1:], applied[1:])) and least[0] < least[1] < least[-1]
                    cause = "schedule_per_epoch" if late else "schedule_per_batch" if ahead else cause
                if abs(said[number] / peak - factor(step)) <= 1e-6 and said[number] != rate:
                    yield Finding(
                        "learning_rate_off_plan",
                        f"after {step} updates {group.get('name', 'a group')} has the planned rate {said[number]:.3g},"
                        f" and the optimizer makes its step with {rate:.3g}: what calls it has kept a rate of its own,"
                        " as a step that was captured or compiled with the rate as a constant.",
                        advice="Give the rate as a tensor to what is captured, or capture the step anew when it"
                        " changes.",
                    )
                    return
                yield Finding(
                    cause,
                    f"after {step} updates the rate of {group.get('name', 'a group')} is {rate:.3g} instead of "
                    f"{peak * factor(step):.3g}{f', that of update {min(fits)}' if fits else ''}.",
                    certain=bool(fits) or not 0 < rate <= peak,  # else it may be a schedule of one's own
                )
                return


def _own_rates(
    context: PreflightContext, rates: list[list[float]], applied: list[int], planned: int
) -> Iterator[Finding]:
    """Each step's rate where a schedule of the user's own sets it: what that does in the first epochs."""
    wanted, number, began = AHEAD_EPOCHS * context.trainer.epoch_steps + 1, len(rates), time.thread_time()
    rates, applied = list(rates), list(applied)
    while number < min(wanted, MOST_AHEAD, planned) and time.thread_time() - began < SECONDS_AHEAD:
        applied.append(context.optimizer.counters()["applied"])
        group = few_scenes(context.groups[number % len(context.groups)])
        rates.append(take_step(context, group, planned, number, gradients=False).rates)
        number += 1
    for place, group in enumerate(context.optimizer.param_groups):
        peak = group.get("peak_lr", 0.0)
        shares = [(update, each[place] / peak) for update, each in zip(applied, rates) if peak > 0]
        if seen := out_of_plan(shares, context.trainer.epoch_steps, planned):
            yield Finding(
                "learning_rate_off_plan",
                f"a schedule of your own sets the rates: that of {group.get('name', 'a group')} {seen}, of a run of"
                f" {planned} updates with a peak rate of {peak:.3g}.",
                advice="Print the rate of each update beside what is meant. A schedule counts either updates or epochs:"
                " its lengths are in the same unit as what it is given, and min(1, ...) ends a warm-up.",
                certain=False,
            )
            return


def _updates(share: float, factor: Callable[[int], float]) -> list[int]:
    """The updates, of the first ones, that have this share of the peak rate by the plan."""
    return [k for k in range(SEARCHED) if abs(share - factor(k)) < 1e-6 * max(share, 1e-9)]


def _average(
    context: PreflightContext, first: dict[str, Tensor], furthest: float, previous: dict[str, Tensor]
) -> Iterator[Finding]:
    """The averaged weights lie between the first ones and the present ones, and do not stay in the network.

    Args: furthest: the largest distance of the weights from the first ones behind any step; an average goes no further;
        previous: the weights before the last step.
    """
    raw = {name: value.detach().clone() for name, value in context.parameters.items()}
    with context.optimizer.ema():
        mean = {name: value.detach().clone() for name, value in context.parameters.items()}
    back = all(torch.equal(value, raw[name]) for name, value in context.parameters.items())
    moved = [name for name in raw if not torch.equal(raw[name], first[name])]
    if not back:
        yield Finding("ema_saved_over_raw", "after the averaged weights were used the raw ones do not come back.")
    if not all_finite(mean.values()) and all_finite(raw.values()):
        yield Finding("ema_nonfinite", f"after {STEPS} steps the averaged weights are not finite; the raw ones are.")
    elif (mean_way := _way(mean, first)) < FROZEN * (raw_way := _way(raw, first)):
        yield Finding(
            "ema_frozen",
            f"after {STEPS} steps the averaged weights have gone {mean_way / raw_way:.1e} of the "
            f"way of the raw ones, which moved in {len(moved)} tensors: {listed(moved)}.",
        )
    elif mean_way > BEYOND * furthest + FAR * total_norm(first.values()):
        sizes = [total_norm(values.values()) for values in (mean, first)]
        yield Finding(
            "ema_cold" if sizes[0] < SMALLER * sizes[1] else "ema_frozen",
            f"after {STEPS} steps the averaged weights are {mean_way:.3g} away from the first ones, and the weights"
            f" themselves were never further than {furthest:.3g} (norm of the average {sizes[0]:.3g}, of the first"
            " weights"
            f" {sizes[1]:.3g}): an average of weights lies between them. "
            + (
                "It is too small, as one that starts at zero and is not divided by 1 - decay^steps."
                if sizes[0] < SMALLER * sizes[1]
                else "It is made of something else than the weights, as of another layer's, or of parts that do not sum"
                " to one."
            ),
            advice="Start the average at the weights, or divide it by 1 - decay^steps where it starts at zero."
            if sizes[0] < SMALLER * sizes[1]
            else "Pair averages and weights by their full names, and look whether decay and 1 - decay sum to one.",
        )
    elif held := [name for name in moved if _held(raw[name], mean[name], first[name], mean_way / raw_way)]:
        yield Finding(
            "ema_frozen",
            f"after {STEPS} steps the average of {len(held)} of {len(moved)} tensors that moved is their first value,"
            f" bit for bit: {listed(held)}; that of the others follows them.",
        )
    elif raw_way > ROUNDING * total_norm(first.values()) and all(torch.equal(mean[name], raw[name]) for name in moved):
        yield Finding("ema_equals_raw", f"after {STEPS} steps all averaged weights are the raw ones, bit for bit.")
    elif (behind := _way(raw, mean)) < NEARLY * (last := _way(raw, previous)) and last > ROUNDING * total_norm(
        first.values()
    ):
        yield Finding(
            "ema_equals_raw",
            f"after {STEPS} steps the averaged weights are {behind / last:.1%} of the last step behind the raw ones:"
            " what is kept of the average and what is taken of the weights are exchanged, or the decay is far too"
            " small.",
            certain=False,
        )


def _statistics(context: PreflightContext, first: dict[str, Tensor]) -> Iterator[Finding]:
    """With the averaged weights in place, buffers that training has moved are not those of before the first step."""
    names = {
        name: value.detach().clone()
        for name, value in context.model.named_buffers()
        if name in first and value.is_floating_point() and not torch.equal(value, first[name])
    }
    with context.optimizer.ema():
        there = dict(context.model.named_buffers())
        left = [name for name in names if name in there and torch.equal(there[name], first[name])]
    if left:
        running = any("running" in name for name in left)
        yield Finding(
            "batchnorm_statistics" if running else "ema_frozen",
            f"after {STEPS} steps {len(left)} buffers have moved, and where the averaged weights are in place they are"
            f" as before the first step, bit for bit: {listed(left)}. The average is of parameters alone, and is"
            " validated with"
            f" {'statistics' if running else 'buffers'} of untrained weights.",
            advice="Let the average take over the buffers of the network, or average them too (use_buffers=True of"
            " torch.optim.swa_utils.AveragedModel), or compute them anew with update_bn before each validation.",
            certain=False,
        )


def _held(raw: Tensor, mean: Tensor, first: Tensor, share: float) -> bool:
    """Whether an average stayed at the start though its share of the way is more than rounding.

    Args: share: of the raw weights' way, that the averages of all tensors together have gone.
    """
    way = share / STEPS * (raw - first).abs()
    return torch.equal(mean, first) and bool((way > ROUNDING * first.abs()).any()) and bool(way.any())


def _way(weights: dict[str, Tensor], first: dict[str, Tensor]) -> float:
    return total_norm([weights[name] - first[name] for name in first])


CHECKS = {"a few steps keep their contracts": several_steps}
