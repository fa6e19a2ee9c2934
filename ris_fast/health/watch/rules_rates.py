"""Rules of `watch` on learning rates and the other settings of an optimizer's groups, over all of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.histories import RateHistory
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, StepRecord

DECOUPLED = {"SGD", "AdamW", "FusedAdamW"}  # they and their kin take rate times decay of the weights off in each step
LONG, VERY_LONG = 32, 64  # steps in a row without a rate: of doubt, and of certainty
MEANT_SETTINGS = {"weight_decay", "momentum", "betas", "eps", "maximize", "dampening", "nesterov", "amsgrad", "alpha"}
GRADUAL = 16  # steps for each change: more changes than that are a schedule
RESTARTS = "Restarts may be meant: episodes and tasks in turn begin so."
SMALL, PASSED = 0.05, 0.9  # shares: of its base, of a rate at its peak; of its peak, of a rate that has passed it
UPHILL = "each step goes uphill"
FORGETS = 0.01  # share of the weights that a decay takes off in a step
BEYOND = 4.0  # times the weights' size
RISEN = 30.0  # times its base, that a rate has risen
WAITING = 100  # steps at a small share of its base rate after which a group is not warming up


def rate_findings(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    yield from zero_learning_rate(optimizer, loop.frozen)
    yield from stopped_rate(loop, optimizer)
    yield from negative_rate(optimizer)
    yield from learning_rate_too_small(optimizer.records)
    yield from rate_that_waits(optimizer)
    yield from rate_squared(optimizer)
    yield from rate_without_end(loop, optimizer)
    yield from rate_beside_weights(optimizer)
    yield from weight_decay_too_large(optimizer)
    yield from settings_changed(optimizer)
    yield from epsilon_swallows_signal(optimizer)
    yield from optimizer_state_lost(optimizer)


def zero_learning_rate(optimizer: OptimizerRecord, frozen: tuple[str, ...]) -> Iterator[Finding]:
    """Groups whose rate was zero in every step. A schedule may end there; one group of several may be meant to stand
    still."""
    records, groups = optimizer.records, optimizer.groups
    looked = [[record.rates[n] for record in records if n < len(record.rates)] for n in range(len(groups))]
    zero = [n for n, rates in enumerate(looked) if len(rates) > 1 and not any(rates) and not _ever(optimizer, n)]
    if names := [f"group {n}" for n in zero if not all(begins(t.name, frozen) for t in groups[n]["params"])]:
        yield finding(
            "zero_learning_rate",
            f"{len(names)}: {', '.join(names[:3])}, in all {optimizer.steps} steps so far.",
            records[-1].step + 1,
            "" if len(zero) == len(groups) else MAY_BE_MEANT,
        )


def _ever(optimizer: OptimizerRecord, group: int) -> bool:
    """Whether the group has had a rate in any step."""
    history = optimizer.plain.rates.get(group)
    return history is not None and (history.largest > 0 or history.negative > 0)


def stopped_rate(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """A rate that has fallen to nothing, and stays there for a good part of the run: a schedule that is shorter than
    the run, or that is advanced more often than it is planned."""
    stopped = {n: each for n, each in optimizer.plain.rates.items() if _stopped_for(each, optimizer) >= LONG}
    stopped = {n: each for n, each in stopped.items() if 4 * _stopped_for(each, optimizer) >= optimizer.steps}
    if not stopped:
        return
    number, history = next(iter(stopped.items()))
    count = _stopped_for(history, optimizer)
    everything = all(
        each.still_since is not None
        and _stopped_for(each, by) >= VERY_LONG
        and 4 * _stopped_for(each, by) > 3 * by.steps
        for by in loop.optimizers
        for each in by.plain.rates.values()
    )
    whole = len(stopped) == len(optimizer.groups)
    yield finding(
        "zero_learning_rate" if history.last == 0 else "learning_rate_too_small",
        f"{'the rate' if whole else f'the rate of group {number}'} has been {history.last:.3g} since step "
        f"{history.still_since + 1}, for {count} of {optimizer.steps} steps; it was {history.largest:.3g} before.",
        history.still_since + 1,
        "" if whole and everything and len(stopped) == len(optimizer.plain.rates) else MAY_BE_MEANT,
        "Give the schedule the number of steps that the run makes: it ends too early, or a schedule that is planned in "
        "epochs is advanced at every step.",
    )


def _stopped_for(history: RateHistory, optimizer: OptimizerRecord) -> int:
    """Steps in a row, up to now, at next to nothing of a rate that was there before."""
    since = history.still_since
    return 0 if since is None or history.largest <= 0 else optimizer.steps - since


def negative_rate(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Steps that go uphill."""
    for number, history in optimizer.plain.rates.items():
        since = history.negative_since
        if since is not None and optimizer.steps - since > 1 and not optimizer.groups[number].get("maximize"):
            before = f"; it was {history.largest:.3g} before" if history.largest > 0 else ""
            yield finding(
                "learning_rate_off_plan",
                f"the rate of group {number} is {history.last:.3g}, below zero, since step {since + 1}{before}: "
                f"{UPHILL}.",
                since + 1,
                "A linear schedule that runs on after its end does that; a sign in front of the loss would be "
                "loss_sign. " + MAY_BE_MEANT,
                "Stop the schedule where it reaches zero, e.g. `max(0.0, 1 - step / steps)`.",
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


def rate_that_waits(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """A scheduler holds the rate at a small share of its base: nothing advances it, or each epoch only."""
    for number, history in optimizer.plain.rates.items():
        group = optimizer.groups[number]
        base = group.get("max_lr", group.get("initial_lr"))
        small = isinstance(base, float) and 0 < history.last <= 0.1 * base
        if small and history.changes == 0 and optimizer.steps >= WAITING:
            yield finding(
                "schedule_per_epoch",
                f"a scheduler holds the rate of group {number} at {history.last:.3g}, {history.last / base:.2g} of its "
                f"base, for all {optimizer.steps} steps.",
                optimizer.steps,
                "An epoch of a warm-up in epochs may be that long.",
            )
            return


def rate_squared(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """The rate has risen and fallen again, and its peak was a small share of its base, which is its square."""
    for number, history in optimizer.plain.rates.items():
        group = optimizer.groups[number]
        base = group.get("max_lr", group.get("initial_lr"))
        if not isinstance(base, float) or not 0 < history.largest <= SMALL * base or optimizer.steps < WAITING:
            continue
        if (
            history.changes
            and history.last < PASSED * history.largest
            and 0.1 * base**2 < history.largest < 2 * base**2
        ):
            yield finding(
                "learning_rate_too_small",
                f"the rate of group {number} was at most {history.largest:.3g} and is falling:"
                f" {history.largest / base:.2g} of its base of {base:.3g}, and near the square of that.",
                optimizer.steps,
                "A cycle whose low end is the base would rise above it; a schedule of another size looks the same.",
                "Give `LambdaLR` a factor: a function that returns the rate itself makes the rate its square.",
            )
            return


def _has_lost(loop: LoopRecord) -> bool:
    """Whether the loss has been far lower than it is."""
    values = [float(each.value) for each in loop.met if each.value is not None]
    means = [sum(values[n : n + 4]) / 4 for n in range(0, len(values) - 3, 4)]
    return len(means) >= 4 and not sum(values[-2:]) / 2 < 2 * min(means)


def rate_without_end(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """A warm-up that has risen past its base in every step, and goes on. A search for the largest rate begins at its
    base."""
    for number, history in optimizer.plain.rates.items():
        base = optimizer.groups[number].get("max_lr", optimizer.groups[number].get("initial_lr"))
        rising = history.last == history.largest and history.changes >= 0.9 * (optimizer.steps - 2)
        if not isinstance(base, float) or optimizer.steps < WAITING or not rising:
            continue
        if history.first < 0.9 * base and history.last > 2 * base:
            yield finding(
                "learning_rate_off_plan",
                f"the rate of group {number} began at {history.first:.3g}, has risen in all {optimizer.steps} steps,"
                f" and is {history.last / base:.2g} times its base of {base:.3g}: nothing ends the warm-up.",
                optimizer.steps,
                MAY_BE_MEANT,
                "End a warm-up at its base, e.g. `min(1.0, (step + 1) / warmup)`.",
            )
            return
        put_back = optimizer.loads or loop.kept  # as a search for the largest rate does
        if history.last > RISEN * base and history.first >= 0.9 * base and _has_lost(loop) and not put_back:
            yield finding(
                "learning_rate_too_large",
                f"the rate of group {number} has risen in all {optimizer.steps} steps, from {history.first:.3g} to"
                f" {history.last:.3g}, and the loss has risen again.",
                optimizer.steps,
                "A search for the largest rate does that.",
                "A factor of a schedule that is above one, as gamma=1.01, makes the rate grow for ever.",
            )
            return


def rate_beside_weights(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Adam and its kin move each number by about the rate: one that is larger than most weights of its group takes
    these anywhere in a few steps."""
    first = optimizer.records[0]
    if not optimizer.denominators or optimizer.steps < LONG or first.closure:
        return
    sizes = {tensor.name: tensor.size for tensor in optimizer.tensors if len(tensor.shape) > 1 and tensor.size >= 16}
    begun = {
        name: float(norm) / sizes[name] ** 0.5
        for name, norm, usual in zip(first.names, first.weights_before, first.usual_norms)
        if name in sizes and float(norm) > 0.1 * usual
    }
    for number, group in enumerate(optimizer.groups):
        history = optimizer.plain.rates.get(number)
        some = [begun[tensor.name] for tensor in group["params"] if tensor.name in begun]
        rates = [record.rates[number] for record in optimizer.records if number < len(record.rates)]
        if history is not None and some and rates and median(rates) > BEYOND * max(some):
            yield finding(
                "learning_rate_too_large",
                f"the rate of group {number} is {median(rates):.3g}, and its weights began at a size of"
                f" {max(some):.2g}: {group_kind(optimizer)} moves each number by about the rate, so that few steps take"
                " them anywhere.",
                optimizer.steps,
                MAY_BE_MEANT,
            )
            return


def group_kind(optimizer: OptimizerRecord) -> str:
    """A name of its class that is torch's, where there is one."""
    known = sorted(optimizer.kinds & {"Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adamax"})
    return known[0] if known else "it"


def weight_decay_too_large(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Where every group takes rate times decay of the weights off in each step."""
    decoupled = optimizer.kinds & DECOUPLED or all(each.get("decoupled_weight_decay") for each in optimizer.groups)
    decay = max((float(each.get("weight_decay") or 0.0) for each in optimizer.groups if decoupled), default=0.0)
    share = min(max(record.rates) for record in optimizer.records) * decay
    if share >= 0.1:
        evidence = f"a decay of {decay:.3g} takes {share:.0%} off the weights in each step."
        yield finding("weight_decay_too_large", evidence, optimizer.records[-1].step + 1)
    elif share >= FORGETS:
        evidence = (
            f"a decay of {decay:.3g} takes {share:.1%} off the weights in each step, all in {1 / share:.0f} steps."
        )
        yield finding("weight_decay_too_large", evidence, optimizer.records[-1].step + 1, MAY_BE_MEANT)


def settings_changed(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Settings that jumped once or twice; what changes step by step has a schedule."""
    jumped = [
        each
        for each in optimizer.plain.settings
        if each.name in MEANT_SETTINGS and 0 < each.changes <= 2 and each.changes * GRADUAL <= optimizer.steps
    ]
    if jumped := [each for each in jumped if each.now != each.first]:
        first = jumped[0]
        yield finding(
            "settings_changed",
            f"{first.name} of group {first.group} is {first.now} since step {first.at + 1}; it was {first.first} at the"
            f" start.{f' {len(jumped) - 1} more have changed.' if len(jumped) > 1 else ''}",
            first.at + 1,
            MAY_BE_MEANT,
        )


def epsilon_swallows_signal(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """The epsilon beside the roots that it is added to, now and by the gradients of the first steps: a loop that has
    converged has small gradients at its end only."""
    sizes = {tensor.name: max(1, tensor.size) for tensor in optimizer.tensors}
    early = [
        {
            name: float(norm) / sizes[name] ** 0.5
            for name, norm in zip(record.names, record.grad_at_step)
            if name in sizes
        }
        for record in optimizer.records[:4]
    ]
    swallowed = {
        name: (eps, root)
        for name, (eps, root) in optimizer.denominators.items()
        if eps > 10 * root and all(0 < by.get(name, 1.0) < eps / 10 for by in early)
    }
    if optimizer.steps >= 4 and 2 * len(swallowed) > len(optimizer.denominators):
        eps, root = max(each for each, _ in swallowed.values()), median(root for _, root in swallowed.values())
        yield finding(
            "epsilon_swallows_signal",
            f"eps is {eps:.3g} and the root of the mean squared gradient beside it is {root:.2g} in {len(swallowed)} "
            "of "
            f"{len(optimizer.denominators)} tensors, from the first step on: steps are {root / eps:.1g} of what they"
            " would be without it.",
            optimizer.steps,
            "A large eps may be meant, to step in proportion to the gradient."
            if eps > 1e-6
            else "A loss that is divided too often makes gradients that small, too.",
        )


def optimizer_state_lost(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """State that was there is gone, or a new optimizer takes the place of the one before again and again."""
    if optimizer.plain.state_lost - optimizer.loads >= 3:
        evidence = f"the optimizer's state was empty again before {optimizer.plain.state_lost} steps."
        yield finding("optimizer_state_lost", evidence, optimizer.steps, RESTARTS)
    elif optimizer.reloads >= 3 and optimizer.plain.outside < optimizer.reloads:  # an episode resets weights too
        yield finding(
            "optimizer_state_lost",
            f"one and the same state was loaded into the optimizer {optimizer.reloads + 1} times, with steps between"
            " that it does not have; the weights went on.",
            optimizer.steps,
            RESTARTS,
            "Load the optimizer's part of a checkpoint once, before the loop.",
        )
    yield from built_anew(optimizer)


def built_anew(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """New optimizers of the same class take the tensors over, again and again."""
    keeps = any(group.get("momentum") for group in optimizer.groups) or "SGD" not in optimizer.kinds
    again = [each for each in optimizer.rivals if each.kind in optimizer.kinds and keeps]
    if len(again) >= 3:
        steps = median(each.steps for each in again)
        yield finding(
            "optimizer_state_lost",
            f"{len(again)} more optimizers of its class ({again[0].kind}) have stepped on its tensors, with {steps:g} "
            "steps each: it is built anew, and forgets its moments.",
            optimizer.steps,
            RESTARTS,
            "Build the optimizer once, before the loop.",
        )
