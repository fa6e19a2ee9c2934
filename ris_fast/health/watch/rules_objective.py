"""Rules of `watch` on what is differentiated: losses that `seen.loss` was given, or that backward passes began from.

The graph between a loss and the outputs says which distance it is, in which units, and what has no derivative in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from statistics import mean

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.graph import MOVING
from ris_fast.health.watch.loss import REDUCING, WALKED
from ris_fast.health.watch.loss_records import LossRecord
from ris_fast.health.watch.operations import CUTTING, STEPWISE
from ris_fast.health.watch.records import EARLY, LoopRecord, OptimizerRecord

LOOKS = 4
DISTANCES = ("MseLoss", "SmoothL1Loss", "HuberLoss", "NllLoss", "BinaryCrossEntropy", "KlDiv", "CrossEntropy")
KEEPING = {"Mean", "Sum", "Div", "Mul", "Neg", "Sqrt", *MOVING}  # a number's sign, but for factors below zero
LOGARITHMS = {"LogSoftmax", "Log", "Logsumexp", "LogSigmoid", "Log1P", "Sub"}
PRODUCT = ["Sub", "Mul"]  # of targets with what should be a logarithm, in a divergence
ENDLESS = 20.0  # times its first size, below zero
FEW = 0.3  # share of scenes with a gradient beyond a clamp
STALLED, HARDLY, STEPS, VALUES = 0.97, 0.85, 120, 16  # of the first losses; steps and losses that show it
FEW_TERMS = 16  # that a loss has, each with a weight
TURNED, FALLEN = 0.999, 0.5  # cosine of gradients that are turned round; of its first size
RISEN = 0.92  # of the highest mean of a few losses in a row, below which the first and the last ones lie


def objective_findings(loop: LoopRecord) -> list[Finding]:
    """What the losses show."""
    losses = list(loop.losses or loop.met)
    if not losses:
        return []
    return [
        *wrong_units(losses),
        *loss_sign(loop, losses),
        *surrogate_raised(loop),
        *loss_without_end(loop, losses),
        *broadcast_in_backward(loop),
        *no_derivative(loop, loop.met),
        *zero_loss_weight(loop.losses),
        *summed_beside_mean(losses),
        *derivative_without_graph(loop, losses),
        *number_beside(loop, losses),
        *classes_on_another_axis(losses),
        *accumulation_not_divided(loop),
        *sanitised_on_the_way(loop),
        *stalled(loop),
    ]


def _distance(chain: Sequence[str]) -> int | None:
    """Where in the chain the distance is."""
    for number, name in enumerate(chain):
        if name.startswith(DISTANCES):
            return number
        if name in ("Pow", "Abs") and set(chain[number + 1 : number + 2]) & {"Sub", "Rsub"}:
            return number
        if name not in KEEPING:
            return None
    return None


def wrong_units(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Probabilities where their logarithm is asked for."""
    found = []
    for each in losses:
        at = next((n for n, name in enumerate(each.chain) if name.startswith(("NllLoss", "KlDiv"))), None)
        if at is not None:
            before = next((name for name in each.chain[at + 1 :] if name not in MOVING), "")
            found.append((each.chain[at], before))
    products = [each.chain for each in losses if "Softmax" in each.chain and each.value is not None]
    divergence = [chain for chain in products if chain[chain.index("Softmax") - 2 : chain.index("Softmax")] == PRODUCT]
    if len(divergence) == len(losses) >= LOOKS and all(float(each.value) < 0 for each in losses):
        found = [("KlDiv", "Softmax")] * len(losses)
    bad = [each for each in found if each[1] and each[1] not in LOGARITHMS]
    if len(found) >= LOOKS and len(bad) == len(found) == len(losses) and bad[0][1] in ("Softmax", "Sigmoid", "Addmm"):
        name, before = bad[0]
        what = "outputs of a layer" if before == "Addmm" else f"a {before.lower()}"
        yield finding(
            "wrong_units" if name.startswith("Nll") else "target_scale_differs",
            f"a {'negative log-likelihood' if name.startswith('Nll') else 'divergence'} is given {what}, in all"
            f" {len(found)} losses: it asks for logarithms of probabilities.",
            losses[0].step + 1,
            "A loss that is linear in the probabilities looks so.",
            "Use `log_softmax`, or a cross-entropy of the raw outputs.",
        )


def loss_sign(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A distance that is below zero, or one that the optimizer is told to make larger."""
    losses = [each for each in losses if each.value is None or isfinite(float(each.value))]  # it may end in NaN
    plain = [(each, at) for each in losses if (at := _distance(each.chain)) is not None]
    if len(plain) < LOOKS or len(plain) < len(losses):
        return
    values = [float(each.value) for each, _ in plain if each.value is not None]
    of_probabilities = [
        each
        for each, at in plain
        if each.chain[at].startswith(("NllLoss", "KlDiv")) and not LOGARITHMS.intersection(each.chain[at + 1 : at + 4])
    ]
    if (
        len(values) == len(plain)
        and all(value < 0 for value in values)
        and not of_probabilities
        and loop.uphill is False
        and not distance_falls(loop, losses)
    ):
        yield finding(
            "loss_sign",
            f"all {len(values)} losses are below zero ({values[0]:.3g} at first, {values[-1]:.3g} at last), and are"
            f" made of a distance, {losses[0].chain[plain[0][1]]}, which is not: its sign is turned, and steps make it"
            " larger.",
            losses[0].step + 1,
            MAY_BE_MEANT,
        )
    elif len(values) == len(plain) and all(value >= 0 for value in values):
        if loop.uphill and len(loop.optimizers) == 1:
            yield finding(
                "loss_sign",
                f"the optimizer has maximize=True, and the loss is a distance, {losses[0].chain[plain[0][1]]}"
                f" ({values[0]:.3g} at first, {values[-1]:.3g} at last), which its steps make larger.",
                losses[0].step + 1,
                MAY_BE_MEANT,
            )


def is_negated(loop: LoopRecord) -> bool:
    """Whether all losses are made of a distance and are below zero."""
    losses = [each for each in loop.losses or loop.met if each.value is not None]
    return bool(losses) and all(float(each.value) < 0 and _distance(each.chain) is not None for each in losses)


def distance_falls(loop: LoopRecord, losses: Sequence[LossRecord]) -> bool:
    """Whether the negative of a distance is made larger after all: gradients reach the optimizer turned round, or the
    distance has fallen far below what it was at first."""
    looks = [each for by in loop.optimizers for each in by.records if each.grad_change is not None]
    turned = bool(looks) and all(float(each.grad_change[0]) < -TURNED for each in looks)
    sizes = [abs(float(each.value)) for each in losses if each.value is not None]
    fallen = len(sizes) >= VALUES and mean(sizes[-len(sizes) // 4 :]) < FALLEN * mean(sizes[:4])
    return turned or fallen


def loss_without_end(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """The loss of a single optimizer falls below zero further and further, to many times what it was at first."""
    values = [float(each.value) for each in losses if each.value is not None]
    if (
        loop.uphill is not False
        or len(loop.optimizers) > 1
        or len(values) < 2 * EARLY
        or not all(map(isfinite, values))
    ):
        return
    quarter = len(values) // 4
    first, third, last = mean(map(abs, values[:4])), mean(values[-2 * quarter : -quarter]), mean(values[-quarter:])
    if last < -ENDLESS * max(1.0, first) and last < 1.2 * third:
        yield finding(
            "loss_sign",
            f"the loss was {values[0]:.3g} at first and is {values[-1]:.3g}, and falls faster and faster: it has no"
            " least value, as a distance or a likelihood whose sign is turned has none.",
            losses[0].step + 1,
            "A term that rewards without limit, such as a variance or a distance from negatives, does that too. "
            + MAY_BE_MEANT,
            "Look for a minus that is missing or too much, in the loss or in one of its terms.",
        )


def surrogate_raised(loop: LoopRecord) -> Iterator[Finding]:
    """A clipped objective of a policy, which is a bound from below of what is to grow, and which steps make smaller."""
    signs = [each.surrogate for each in loop.met[:WALKED]]
    if loop.uphill is False and len(signs) >= 2 and all(sign > 0 for sign in signs):
        yield finding(
            "loss_sign",
            "the loss is the smaller of two products of a ratio of probabilities, one of them clipped, which bounds"
            " from below what a policy is to gain: without a minus in front steps make it smaller.",
            loop.met[0].step + 1,
            "With costs in place of rewards it would be the larger one. " + MAY_BE_MEANT,
            "Give `backward()` the negative of it: `-torch.min(ratio * gain, clipped * gain).mean()`.",
        )


def broadcast_in_backward(loop: LoopRecord) -> Iterator[Finding]:
    """One column of outputs, and a difference of all pairs right behind it."""
    found, shape = [], ()
    for each in () if loop.losses else loop.met:
        made = each.outputs.shape if each.outputs is not None else ()
        plain = each.direct and set(each.chain[:-1]) <= REDUCING | {"Sub", "Rsub", "Pow", "Where"}
        if plain and len(made) == 2 and made[1] == 1 < made[0]:
            rows, shape = made[0], made
            found.append(any(shape == (rows, rows) for shape in each.chain_shapes))
    if len(found) >= LOOKS and all(found):
        yield finding(
            "shapes_broadcast",
            f"outputs have shape {shape}, and the loss has a matrix of all pairs of scenes right behind them: targets"
            " have one axis, and every output is compared with every target.",
            1,
            "A loss over all pairs looks like that.",
        )


def no_derivative(loop: LoopRecord, met: Sequence[LossRecord]) -> Iterator[Finding]:
    """A rounding, a comparison or a clamp between outputs and loss, and gradients that are zero, or are for most
    scenes."""
    if len(met) < LOOKS:
        return
    silent = [by for by in loop.optimizers if by.records and _no_gradient(by)]
    stepwise = [next((name for name in each.chain if name in STEPWISE), "") for each in met]
    cutting = [next((name for name in each.chain if name in CUTTING), "") for each in met if each.direct]
    if silent and all(stepwise):
        yield finding(
            "non_differentiable",
            f"a {stepwise[0].lower()} lies between the outputs and the loss in all {len(met)} losses that were looked"
            " at, and all gradients are exactly zero: its derivative is zero everywhere.",
            met[0].step + 1,
        )
    elif len(cutting) == len(met) and all(cutting):
        shares = (
            []
            if loop.forward is None
            else [
                float(each.rows.double().mean())
                for each in loop.forward.passes
                if each.training and each.reached and each.rows is not None and len(each.rows) >= EARLY
            ][:16]
        )
        if silent or (len(shares) >= EARLY and mean(shares) < FEW):
            share = "no scene has" if silent else f"{mean(shares):.0%} of the scenes have"
            yield finding(
                "clamped_loss",
                f"a clamp lies between the outputs and the loss, and in the first steps {share} a gradient at the"
                " output: beyond its bounds there is none.",
                met[0].step + 1,
                "A margin that scenes are within from the beginning looks so.",
                "Clamp what is printed, or the gradient's norm; for outliers take a Huber loss.",
            )


def _no_gradient(optimizer: OptimizerRecord) -> bool:
    looks = [each for each in optimizer.records if each.hooked and not each.closure]
    return len(looks) >= EARLY and all(sum(each.gradient_norms()) == 0 for each in looks)


def zero_loss_weight(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A term that is multiplied by zero in all losses. One zero among many factors is a number of the data."""
    found = [[float(factor) == 0 for factor in each.factors] for each in losses if each.factors]
    if len(found) >= LOOKS and all(FEW_TERMS * sum(each) >= len(each) for each in found):
        yield finding(
            "zero_loss_weight",
            f"a term of the loss is multiplied by exactly zero in all {len(found)} losses whose terms were looked at.",
            losses[0].step + 1,
            "A weight that a schedule raises later begins so.",
            "Print the weight of each term as it is used.",
        )


def summed_beside_mean(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A sum over scenes beside a mean over them, in all losses whose graph was walked."""
    found = [each for each in losses[:WALKED] if each.summed]
    if len(found) == len(losses[:WALKED]) >= LOOKS:
        scenes = found[0].outputs.shape[0] if found[0].outputs is not None and found[0].outputs.shape else 0
        yield finding(
            "dominating_term",
            f"the loss adds a sum over the {scenes} scenes of the batch, without a factor, to a mean over them: the"
            f" gradient of the one is {scenes} times as large as it is beside the other for one scene.",
            found[0].step + 1,
            MAY_BE_MEANT,
            "Reduce both terms in the same way, then weigh them.",
        )


def derivative_without_graph(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """Derivatives of inputs are taken, and a number that has no gradient is added to the loss."""
    calls = [each for of_layer in loop.forward.layers.calls.values() for each in of_layer] if loop.forward else []
    asked = {each.name for each in calls if each.leaf and each.enabled and each.training}
    found = [each for each in losses[:WALKED] if each.ungraphed]
    if asked and len(found) >= LOOKS // 2:
        yield finding(
            "dead_loss_term",
            f"`{min(asked)}` is given inputs of which a derivative is asked for, and {len(found)} of"
            f" {len(losses[:WALKED])} losses add a number that has no graph: a term made of that derivative trains"
            " nothing.",
            found[0].step + 1,
            "A constant that is added looks the same.",
            "Take the derivative with `torch.autograd.grad(..., create_graph=True)`.",
        )


def number_beside(loop: LoopRecord, losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A number without a gradient is added to what has one, and the loss stays what it was: the term that makes most of
    it trains nothing."""
    values = [float(each.value) for each in losses if each.value is not None]
    walked = losses[:WALKED]
    if len(loop.optimizers) > 1 or len(values) < VALUES or loop.steps < STEPS or not all(map(isfinite, values)):
        return
    if any(0 < each.with_grad < each.steps for by in loop.optimizers for each in by.histories.values()):
        return  # a term that has its turn now and then is a plain zero in between
    first, last = mean(values[:4]), mean(values[-8:])
    if all(each.ungraphed for each in walked) and first > 0 and last > HARDLY * first:
        yield finding(
            "dead_loss_term",
            f"the loss adds a number that has no graph to one that has, in all {len(walked)} losses whose graph was"
            f" looked at, and was {first:.3g} in the first steps and {last:.3g} in the last: what makes most of it"
            " trains nothing.",
            losses[0].step + 1,
            "A constant that is added looks the same.",
            "Look for a `detach()`, `.item()`, `.data` or `no_grad` on the way of each term.",
        )


def classes_on_another_axis(losses: Sequence[LossRecord]) -> Iterator[Finding]:
    """A softmax over one axis, and a likelihood that takes its classes from another."""
    walked = [each.axis_apart for each in losses[:WALKED]]
    if len(walked) >= LOOKS // 2 and all(walked):
        yield finding(
            "wrong_layout",
            f"the loss has {walked[0]}: what adds up to one are not the chances of the classes.",
            losses[0].step + 1,
            MAY_BE_MEANT,
            "Take the softmax over the axis of the classes, or give `cross_entropy` scores (B, C, ...).",
        )


def accumulation_not_divided(loop: LoopRecord) -> Iterator[Finding]:
    """Passes add up whole means, and nothing divides them."""
    for by in loop.optimizers:
        kinds = by.between.intervals
        several = sum(
            count for (passes, cleared, alike), count in kinds.items() if passes >= 3 and alike and not cleared
        )
        met = [each for each in loop.met if each.chain]
        means = [each for each in met if _whole_mean(each)]
        plain = [each for each in by.records if not each.closure and all(map(isfinite, each.gradient_norms()))]
        kept = [each for each in plain if _as_it_came(*each.gradient_norms())]
        if several >= LOOKS and several == sum(kinds.values()) and len(means) == len(met) >= LOOKS and kept == plain:
            count = max(passes for passes, *_ in kinds)
            yield finding(
                "accumulation_not_divided",
                f"each step adds up {count} backward passes of a loss that is a mean of its own batch, undivided:"
                f" gradients are {count} times those of one batch of that size.",
                by.steps,
                "A learning rate that allows for it, or an optimizer that does not mind the scale, makes up for that.",
            )
            return


def _whole_mean(loss: LossRecord) -> bool:
    """A loss without a factor in front of its distance, which is not a sum."""
    at = _distance(loss.chain)
    return at is not None and not {"Div", "Mul", "Sum"}.intersection(loss.chain[:at])


def _as_it_came(arrived: float, at_step: float) -> bool:
    return abs(at_step - arrived) <= 1e-4 * arrived


def sanitised_on_the_way(loop: LoopRecord) -> Iterator[Finding]:
    """The gradient at the output is not finite, and those of all tensors are."""
    if loop.forward is None:
        return
    bad = {
        each.step
        for each in loop.forward.passes
        if each.training and each.reached and each.grad_finite is not None and not bool(each.grad_finite)
    }
    for by in loop.optimizers if len(loop.optimizers) == 1 else ():
        looks = [each for each in by.records if each.step in bad and each.hooked]
        clean = [each for each in looks if bool(each.grad_after_backward.isfinite().all())]
        if len(clean) >= 2 and clean == looks:
            count = sum(sum(each.gradient_norms()) == 0 for each in clean)
            yield finding(
                "sanitised_gradients",
                f"the gradient at the output has NaN or infinities in {len(bad)} of the steps that were looked at, and"
                f" those of all tensors are finite{f', and zero in {count}' if count else ''}: a hook or an own"
                " function replaces them on the way.",
                clean[0].step + 1,
                "Rows that a mask leaves out afterwards may have them.",
            )


def stalled(loop: LoopRecord) -> Iterator[Finding]:
    """The loss of a single optimizer, which is a distance, is at the end what it was at first. Says that something is
    wrong where nothing else does, and what it is not."""
    losses = [each for each in loop.met if each.value is not None and _distance(each.chain) is not None]
    by = loop.optimizers[0]
    alone = (
        len(loop.optimizers) == 1 and len(losses) == len(loop.met) and not (by.rivals or by.loads or by.plain.outside)
    )
    if any(each.none_grads for each in by.records):
        return  # parts take turns, each with a loss of its own
    if not alone or len(losses) < VALUES or loop.steps < STEPS or (loop.forward and loop.forward.foreign_steps):
        return
    values = [float(each.value) for each in losses]
    first, last = mean(values[:4]), mean(values[-8:])
    peak = max(mean(values[at : at + 8]) for at in range(len(values) - 7))
    if all(value > 0 for value in values) and last > STALLED * first and not max(first, last) < RISEN * peak:
        yield finding(
            "stalled_at_baseline",
            f"the loss was {first:.3g} in the first steps and is {last:.3g} after {loop.steps}. Gradients arrive and"
            " steps move the weights: what is left are targets that do not follow from the inputs, a rate that does not"
            " fit, or a run that began where it ends.",
            loop.steps,
            "Weights that were trained before begin so.",
            harm=0.0,  # what names a cause comes before it
        )
