"""Rules of `watch` on numbers of the weights: what changes them between two steps, and what a step does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.changes import OutsideChange
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.kinds_of_change import is_clip, kind_of_change
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, StepRecord, TensorRecord, is_finite
from ris_fast.health.watch.rules_zero import lies_where_float16_ends

EPISODE = 4  # steps, at least
STOPPED = 8  # looks in a row without effect, at the end
CONSTRAINED, SAME_NORM = 4, 0.05  # changes after which a tensor has one norm; how far a few of its numbers are from it
UPDATED = 16  # looks without effect that an optimizer which gathers several steps does not have
SPOKEN = {
    "other": "to other numbers",
    "again": "along the step before, as a second step does",
    "scaled": "by a factor far from one",
    "zeroed": "to zero",
    "nonfinite": "to numbers that are not finite",
    "constant": "to one number",
}
EPISODES = (
    "Episodic adaptation and learning-rate range tests do that, which put the optimizer's state back too; so do the"
    " half steps of an extragradient, rounds of federated averaging that begin from the server's weights, and samplers"
    " that reject a proposal."
)


def change_findings(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    kinds = [(change, _kinds(change, optimizer.tensors)) for change in optimizer.outside if not change.explained]
    yield from weights_reset(loop, optimizer, kinds)
    if loop.ranks is None:  # ranks average weights between steps, and step on shards
        yield from weights_changed_outside(optimizer, kinds)
        yield from tensors_without_effect(optimizer)
    yield from second_optimizer(optimizer)
    yield from low_precision_weights(optimizer, kinds)
    yield from step_without_effect(optimizer)
    yield from trained_although_frozen(loop, optimizer)


def _kinds(change: OutsideChange, tensors: list[TensorRecord]) -> dict[str, str]:
    """What happened to each trainable tensor that changed, by its name."""
    shapes, found = {tensor.name: tensor.shape for tensor in tensors if tensor.trainable}, {}
    gradient = change.gradient if len(change.gradient) == len(change.after) else torch.zeros_like(change.after)
    sides = (each.split(change.sizes) for each in (change.before, change.after, change.later, gradient))
    for name, *numbers in zip(change.names, *sides):
        if name in shapes and (kind := kind_of_change(*numbers, shapes[name])):
            found[name] = kind
    return found


Kinds = list[tuple[OutsideChange, dict[str, str]]]


def weights_reset(loop: LoopRecord, optimizer: OptimizerRecord, changes: Kinds) -> Iterator[Finding]:
    """Weights are again what they were before, bit for bit, while the optimizer's state goes on."""
    undone = [
        change.step + 1 for change, kinds in changes if not change.state_reset and _is_reset(change, kinds, changes)
    ]
    again = [record.step for record in optimizer.records if record.reset is not None and bool(record.reset)]
    held = {change.step + 1 for change, _ in changes if _at_bounds(change)}
    others = {*undone, *again} - held
    if held and not others & {change.step + 1 for change, _ in changes}:  # of some resets no numbers are kept
        return
    steps = sorted(others)
    if any(tried_again(last, now) for last, now in pairwise(optimizer.records)):
        return  # a line search
    stateless = "SGD" in optimizer.kinds and not any(group.get("momentum") for group in optimizer.groups)
    long = all(later - step >= EPISODE for step, later in pairwise(steps))
    if steps and stateless and long and len(loop.kept) >= len(steps):
        return  # no state goes on, and a state was loaded each time: episodes
    if steps and any(0 < each.changes == optimizer.plain.outside for each in optimizer.plain.rates.values()):
        return  # each time with another rate: back to the best, on purpose
    if steps:
        yield finding(
            "weights_reset",
            f"before {_steps(steps)} the weights are again, bit for bit, those of an earlier step; others came in"
            " between.",
            steps[0] + 1,
            EPISODES,
        )


def same_gradients(last: StepRecord, now: StepRecord) -> bool:
    """Whether `now` follows `last`, no hook heard a backward, and the gradients are those that `last` left."""
    return (
        now.step == last.step + 1
        and now.names == last.names
        and bool(now.hooked)
        and len(now.none_grads) == len(now.hooked)
        and not now.closure
        and last.grad_after_step is not None
        and torch.equal(now.grad_at_step, last.grad_after_step)
        and float(now.grad_at_step.norm()) > 0
    )


def tried_again(last: StepRecord, now: StepRecord) -> bool:
    """Whether `last` was taken back, and its gradients are used once more."""
    return now.reset is not None and bool(now.reset) and same_gradients(last, now)


def _is_reset(change: OutsideChange, kinds: dict[str, str], changes: Kinds) -> bool:
    """Whether the weights are those before the step, of the beginning, or those of another change."""
    others = [each.later for each, _ in changes if each is not change]
    return set(kinds.values()) == {"undone"} or any(torch.equal(change.later, each) for each in (change.first, *others))


def _at_bounds(change: OutsideChange) -> bool:
    """Whether each tensor that changed was brought back to one or two bounds by several numbers: once all that moves is
    at a bound, that gives the same weights after every step."""
    sides = zip(change.after.split(change.sizes), change.later.split(change.sizes))
    changed = [(after, later) for after, later in sides if not torch.equal(after, later)]
    return bool(changed) and all(is_clip(after, later) for after, later in changed)


def _steps(steps: list[int]) -> str:
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(str(step + 1) for step in steps[:3])}" + (
        f" and {len(steps) - 3} more" if len(steps) > 3 else ""
    )


def weights_changed_outside(optimizer: OptimizerRecord, changes: Kinds) -> Iterator[Finding]:
    """Changes that no constraint explains. Clips, masks, and factors near one after each step are constraints."""
    free = [(c, kinds) for c, kinds in changes if not c.state_reset and not _is_reset(c, kinds, changes)]
    kept = _of_one_norm([change for change, _ in changes])
    seen = [
        (c, {n: k for n, k in kinds.items() if k in SPOKEN and not (k == "scaled" and n in kept)}) for c, kinds in free
    ]
    seen = [(change, kinds) for change, kinds in seen if kinds]
    if any(0 < each.changes == optimizer.plain.outside for each in optimizer.plain.rates.values()):
        return
    climbs = not optimizer.of_torch  # its step may be one that climbs first
    if seen and ((climbs and all(_undone_within(c) for c, _ in seen)) or _interpolated([c for c, _ in changes])):
        return
    if not seen or (len(seen) == 1 and set(seen[0][1].values()) == {"scaled"}):  # a constraint, for the first time
        return
    change, kinds = max(seen, key=lambda each: len(each[1]))
    (kind, _), *_ = Counter(kinds.values()).most_common(1)
    writes = (
        f" Version counters tell of writes before {optimizer.plain.outside} steps." if optimizer.plain.outside else ""
    )
    of = Counter(name for each, _ in seen for name, flag in each.like.items() if bool(flag))
    if of and max(of.values()) > 1:
        name, count = of.most_common(1)[0]
        yield finding(
            "ema_saved_over_raw",
            f"before {_steps([each.step + 1 for each, _ in seen])} the weights are not what the step before left, and"
            f" {count} times they are, bit for bit, those of `{name}`: training goes on from there.",
            seen[0][0].step + 2,
            "Lookahead, rounds of averaging and a teacher that is put back on purpose do that.",
            "Evaluate the average in a model of its own, or keep the weights and put them back before training goes"
            " on.",
        )
        return
    yield finding(
        "weights_changed_outside",
        f"{len(kinds)} of {len(change.names)} tensors are not what the step before left, before "
        f"{_steps([each.step + 1 for each, _ in seen])}: {', '.join(list(kinds)[:3])} went {SPOKEN[kind]}.{writes}",
        seen[0][0].step + 2,
        "A copy of an average, weights loaded on purpose, noise and another process look the same: see what runs "
        "between"
        " these two steps. " + MAY_BE_MEANT,
    )


def _of_one_norm(changes: list[OutsideChange]) -> set[str]:
    """Tensors that have the same norm after each change, whatever factor that took: a constraint of any size."""
    found, names = set(), changes[-1].names if changes else []
    alike = [each for each in changes if each.names == names and each.sizes == changes[-1].sizes]
    if len(alike) < CONSTRAINED:
        return found
    norms = [
        [torch.stack([part.double().norm() for part in side.split(each.sizes)]) for side in (each.after, each.later)]
        for each in alike
    ]
    later = torch.stack([there for _, there in norms])
    factors = later / torch.stack([here for here, _ in norms])
    for name, norm, factor in zip(names, later.T, factors.T):
        spread = float(norm.max() / norm.min()) - 1
        if spread < SAME_NORM and 10 * spread < float(factor.max() / factor.min()) - 1:
            found.add(name)
    return found


def _undone_within(change: OutsideChange) -> bool:
    """Whether the next step takes the change back, as a step that climbs first does."""
    if change.settled is None or change.settled.shape != change.later.shape:
        return False
    back, went = (change.after - change.later).double(), (change.settled - change.later).double()
    return float((back * went).sum()) > 0.8 * float(back.square().sum())


def _interpolated(changes: list[OutsideChange]) -> bool:
    """Whether changes, some steps apart, go a part of the way back to a state known before: of the beginning, or of
    another change. Lookahead and Reptile do that."""
    steps = [each.step for each in changes]
    if len(changes) < 2 or any(later - step < 3 for step, later in pairwise(steps)):
        return False
    found = 0
    for number, each in enumerate(changes):
        known = [each.first, *(other.later for other in changes[:number])]
        found += any(_between(each, state) for state in known if state.shape == each.later.shape)
    return 2 * found > len(changes)


def _between(change: OutsideChange, state: torch.Tensor) -> bool:
    whole, part = (change.after - state).double(), (change.later - state).double()
    share = float((whole * part).sum()) / max(float(whole.square().sum()), 1e-30)
    return 0.02 < share < 0.98 and float((part - share * whole).norm()) <= 1e-3 * float(part.norm())


def second_optimizer(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """An optimizer that nobody named makes as many steps, on the same tensors."""
    for rival in optimizer.rivals:
        meets = optimizer.span is not None and rival.first < optimizer.span[1]
        if meets and rival.steps >= 8 and not rival.nested and 0.5 <= rival.steps / optimizer.steps <= 2:
            yield finding(
                "duplicate_parameters",
                f"a {rival.kind} that `watch` was not given has made {rival.steps} steps on {len(rival.shared)} of the "
                "same tensors.",
                optimizer.steps,
                MAY_BE_MEANT,
            )
            return


def low_precision_weights(optimizer: OptimizerRecord, changes: Kinds) -> Iterator[Finding]:
    """Numbers in 16 bits that rounding holds still, and numbers in 32 bits that are rounded to 16 after each step."""
    numbers, tensors = optimizer.numbers, {tensor.name: tensor for tensor in optimizer.tensors}
    half = [numbers[name] for name, tensor in tensors.items() if name in numbers and _is_half(tensor)]
    live, held = sum(each.live for each in half), sum(each.held for each in half)
    if (
        optimizer.steps >= 32
        and live >= 64
        and not lies_where_float16_ends(optimizer.gradient)
        and held >= 0.75 * live
        and _rate_moves(optimizer)
    ):
        yield finding(
            "low_precision_weights",
            f"{held / live:.0%} of the numbers that receive a gradient are the same bits after {optimizer.steps} "
            "steps: "
            "updates are smaller than half the spacing of the 16-bit format.",
            optimizer.steps,
            "" if optimizer.steps >= 100 and held >= 0.9 * live else "Later steps may be larger.",
        )
    full = {n: each for n, each in numbers.items() if n in tensors and tensors[n].dtype == torch.float32}
    moved = [each for each in full.values() if 2 * each.changed > each.sampled and each.distinct >= 16]
    if optimizer.steps >= 4 and moved and all(each.short == each.sampled for each in moved):
        yield finding(
            "low_precision_weights",
            f"all numbers of {len(moved)} float32 tensors that training has moved have a 16-bit format's values: "
            "something"
            " rounds them.",
            optimizer.steps,
            MAY_BE_MEANT,
        )


def _is_half(tensor: TensorRecord) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _rate_moves(optimizer: OptimizerRecord) -> bool:
    """Whether a rate was there in at least half of the steps."""
    rates = optimizer.plain.rates.values()
    return all(2 * (each.still + each.negative) < optimizer.steps for each in rates)


def step_without_effect(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Looks at steps with gradients and a rate, after which every number is the same."""
    looks = [each for each in optimizer.records if each.moved is not None and _should_move(optimizer, each)]
    idle = [each for each in looks if not float(each.moved.sum())]
    if len(looks) >= 4 and len(idle) == len(looks):
        unmoved = not any(each.changed for each in optimizer.numbers.values())
        yield finding(
            "step_without_effect",
            f"in all {len(idle)} steps that were looked at, gradients of norm "
            f"{float(idle[-1].grad_at_step.norm()):.3g} at a"
            f" rate of {max(idle[-1].rates):.3g} have changed no number of {len(idle[-1].names)} tensors.",
            idle[0].step + 1,
            "" if len(idle) >= UPDATED and unmoved else "An optimizer that gathers several steps does that.",
        )
        return
    since = max((number + 1 for number, each in enumerate(looks) if float(each.moved.sum())), default=0)
    if (at_rest := looks[since:]) and len(at_rest) >= STOPPED:
        yield finding(
            "step_without_effect",
            f"since step {at_rest[0].step + 1} no number of {len(at_rest[-1].names)} tensors has changed in any of "
            f"{len(at_rest)} steps that were looked at, with gradients of norm"
            f" {float(at_rest[-1].grad_at_step.norm()):.3g} at a rate of {max(at_rest[-1].rates):.3g}; steps before"
            " moved them.",
            at_rest[0].step + 1,
            "A compiled or captured step that no longer fits does that; so does an optimizer that stops by itself.",
        )


def tensors_without_effect(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Some tensors have gradients and never change."""
    looks = [each for each in optimizer.records if each.moved is not None and _should_move(optimizer, each)]
    still = [name for name in (looks[-1].names if looks else []) if _never_moves(name, looks)]
    if still and len(still) < len(looks[-1].names):
        yield finding(
            "step_without_effect",
            f"{len(still)} of {len(looks[-1].names)} tensors receive gradients and have not changed in any of "
            f"{len(looks)} "
            f"steps that were looked at: {', '.join(still[:3])}.",
            looks[-1].step + 1,
            MAY_BE_MEANT,
        )


def _should_move(optimizer: OptimizerRecord, record: StepRecord) -> bool:
    """Whether some update is large enough for float32: by the rate for Adam's kin, else by rate times gradient."""
    if (
        record.closure
        or not record.rates
        or not is_finite(record.grad_at_step)
        or not float(record.grad_at_step.norm())
    ):
        return False
    if not len(record.weights_before) or any(_is_half(tensor) for tensor in optimizer.tensors):
        return False
    size = record.weights_before.clamp_min(1e-12)
    gradient = record.grad_at_step / size if not optimizer.denominators else (record.grad_at_step > 0).float()
    rates = [rate for rate in record.rates if rate > 0]
    return bool(rates) and min(rates) * float(gradient.max()) > 1e-5


def _never_moves(name: str, looks: list[StepRecord]) -> bool:
    """Whether it has a gradient, and all of its numbers are the same after every look."""
    seen = [(look, look.names.index(name)) for look in looks if name in look.names]
    some = [(look, at) for look, at in seen if float(look.grad_at_step[at]) > 1e-6 * float(look.grad_at_step.norm())]
    large = [each for each in some if each[0].rates and min(each[0].rates) > 1e-6]
    return len(large) >= 8 and not any(float(look.moved[at]) for look, at in large if at < len(look.moved))


def trained_although_frozen(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Tensors that `frozen` names and a step moves."""
    moved = {
        name: record.step + 1
        for record in reversed(optimizer.records)
        if record.moved is not None
        for name, count in zip(record.names, record.moved.tolist())
        if count and begins(name, loop.frozen)
    }
    if moved:
        yield finding(
            "settings_changed",
            f"{len(moved)} tensors that are declared frozen are moved by the optimizer's steps: "
            f"{', '.join(sorted(moved)[:3])}.",
            min(moved.values()),
            advice="Call `requires_grad_(False)` on them and leave them out of the optimizer, or out of `frozen`.",
        )
