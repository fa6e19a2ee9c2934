"""Rules of `watch` on parameters: which the optimizers hold and train, and steps that make them numbers no more."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.describe import describe_tensors, share_of
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.loss import WALKED
from ris_fast.health.watch.records import EARLY, LoopRecord, OptimizerRecord, StepRecord, TensorRecord, is_finite

SEVERAL = 3  # losses that were looked at
COPY = (
    "Keep a copy: `[p.detach().clone() for p in model.parameters()]`, or `copy.deepcopy(model)` for a teacher;"
    " `detach()`, `data` and `state_dict()` go on with the same memory."
)
AT_RANDOM = re.compile(r"target|random|fixed|teacher|reservoir|project", re.IGNORECASE)  # parts that are meant to be
LAYERS = ("weight", "bias")  # last names of a layer's tensors; a table that is no layer has another


def parameter_findings(loop: LoopRecord) -> list[Finding]:
    """What is frozen, missing, there twice, or nobody's."""
    held = Counter(tensor for optimizer in loop.optimizers for tensor in optimizer.tensors)
    trained = {tensor for optimizer in loop.optimizers for tensor in optimizer.trained}
    meant = {each for each in loop.parameters if begins(each.name, loop.frozen)}
    missing = [each for each in loop.parameters if each.trainable and each not in held and each not in meant]
    missing = [each for each in missing if 0 not in each.shape and each not in loop.added - loop.with_gradient]
    return [
        *_frozen(loop, meant, held, trained),
        *_stale(loop, missing, trained),
        *_missing(loop, missing),
        *_twice(loop, held),
        *_differs_from_itself(loop),
        *_of_inputs_alone(loop),
    ]


def _of_inputs_alone(loop: LoopRecord) -> Iterator[Finding]:
    """A term of the loss that has a gradient at the inputs and at no weight."""
    looks = loop.met[:WALKED]
    if len(looks) >= SEVERAL and all(each.of_inputs for each in looks) and loop.steps >= EARLY:
        yield finding(
            "dead_loss_term",
            f"in all {len(looks)} steps that were looked at a term of the loss depends on the model's inputs and on no"
            " weight: it is the same whatever is trained.",
            loop.steps,
            MAY_BE_MEANT,
            "Print the derivatives that it is made of: the second derivative of a network of ReLUs is zero everywhere,"
            " and one that is taken of something detached is None. A tanh, a SiLU or a sine has all derivatives.",
        )


def _differs_from_itself(loop: LoopRecord) -> Iterator[Finding]:
    """A distance between weights and those that they are to stay near, or between two outputs, is exactly zero in each
    step: both are one. Or what is at hand to compare weights with has the model's own numbers."""
    kept = [name for name, searches in loop.aliases.items() if searches > 1]
    others = any(each.kept for each in loop.helpers) or any(not bool(zero) for each in loop.met for zero in each.still)
    if kept and not others and any(each.compares_weights for each in loop.met):
        yield finding(
            "dead_loss_term",
            f"a term of the loss compares weights with something that has no gradient, and `{kept[0]}` has the model's"
            " own numbers, no copies of them: what is compared is one and the same.",
            loop.steps,
            MAY_BE_MEANT,
            COPY,
        )
        return
    for losses, what in ((loop.met, "weights and what they are compared with"), (loop.losses, "the two sides of it")):
        looks = [each.still for each in losses if each.still and each.step]
        if len(looks) < SEVERAL or len({len(each) for each in looks}) > 1 or loop.steps < EARLY:
            continue
        zero = [all(map(bool, each)) for each in zip(*looks)]
        if all(zero) if losses is loop.met else 0 < sum(zero) < len(zero):
            yield finding(
                "dead_loss_term",
                f"{sum(zero)} of {len(zero)} differences in the loss are exactly zero in all {len(looks)} steps that"
                f" were looked at, while the weights move: {what} are one and the same, so that the term has no"
                " gradient.",
                loop.steps,
                MAY_BE_MEANT,
                COPY,
            )
            return


def _missing(loop: LoopRecord, missing: list[TensorRecord]) -> Iterator[Finding]:
    """Not those that another optimizer steps on, or that have copies which are trained: masters in another precision.
    The larger part of a network may be meant to stand still, and what backward never reaches as well."""
    served = {each for by in loop.optimizers for each, history in by.histories.items() if history.with_grad}
    copies = {each.shape for each in loop.masters & served}
    missing = [each for each in missing if each not in loop.rival_tensors | loop.moved_outside]
    missing = [each for each in missing if each.shape not in copies]
    sizes, whole = {each.name: each.size for each in missing}, sum(each.size for each in loop.parameters)
    share = share_of(sizes, whole)
    if missing:
        yield finding(
            "missing_from_optimizer",
            f"{describe_tensors(sizes, whole)}.",
            loop.steps,
            ""
            if share < 0.5 and loop.with_gradient.intersection(missing)
            else "They may be meant to stand still, or an optimizer that is not built yet will hold them.",
            harm=share,
        )


def _twice(loop: LoopRecord, held: Counter[TensorRecord]) -> Iterator[Finding]:
    """In two groups of one optimizer, which cannot be meant, or in two optimizers, which may step in turn."""
    spans = sorted(by.span for by in loop.optimizers if by.span)
    in_phases = bool(spans) and all(last < first for (_, last), (first, _) in pairwise(spans))
    twice = [] if in_phases else [tensor for tensor, count in held.items() if count > 1 and not _in_turn(tensor, loop)]
    within = [tensor for by in loop.optimizers for tensor, count in Counter(by.tensors).items() if count > 1]
    twice = twice or ([] if in_phases else _wholly_within(loop))
    doubt = "" if within else "Two optimizers hold them: they may be meant to step in turn."
    if within or twice:
        names = ", ".join(tensor.name or "?" for tensor in (within or twice)[:3])
        yield finding("duplicate_parameters", f"{len(within or twice)}: {names}.", loop.steps, doubt)


def _wholly_within(loop: LoopRecord) -> list[TensorRecord]:
    """All that one optimizer holds, where another that holds more steps on it as often, as one that holds a judge and
    those whom it judges."""
    for by in loop.optimizers:
        for other in loop.optimizers:
            inner, outer = set(by.tensors), set(other.tensors)
            often = 2 * min(by.steps, other.steps) > max(by.steps, other.steps)
            served = all(
                tensor in each.histories and 2 * each.histories[tensor].with_grad > each.steps
                for tensor in inner
                for each in (by, other)
            )
            if inner and inner < outer and often and min(by.steps, other.steps) >= EARLY and served:
                return by.tensors
    return []


def _in_turn(tensor: TensorRecord, loop: LoopRecord) -> bool:
    """Whether each of its optimizers has stepped, with gradients of its own: never one that another stepped with."""
    seen: set[float] = set()
    for by in loop.optimizers:
        if tensor in by.tensors:
            looks = [each for each in by.records if tensor.name in each.names]
            norms = {float(each.grad_at_step[each.names.index(tensor.name)]) for each in looks} - {0.0}
            if not norms or norms & seen:
                return False
            seen |= norms
    return True


def _frozen(
    loop: LoopRecord, meant: set[TensorRecord], held: Counter[TensorRecord], trained: set[TensorRecord]
) -> Iterator[Finding]:
    """Frozen now and in the last step of their optimizer: what is frozen afterwards trains all the same.

    Nothing tells a base that is kept from a layer that was forgotten, so it is never certain. Left alone are, if frozen
    from the start, tensors of no layer, those in no optimizer unless others are declared, and what something else
    moves, such as a teacher.
    """
    free = {each for by in loop.optimizers if by.steps for each in by.tensors if each not in by.frozen}
    in_turn = {each for by in loop.optimizers for each, history in by.histories.items() if history.turns > 1}
    still = [
        each
        for each in loop.parameters
        if not each.trainable and each not in free | meant | in_turn | loop.rival_tensors
    ]
    loose = [each for each in loop.frozen_at_start if each not in held and not loop.frozen]
    apart = {*loose, *(each for each in loop.frozen_at_start if each.name.rpartition(".")[2] not in LAYERS)}
    yield from _never_trained(loop)
    still = [each for each in still if each not in apart | (loop.moved_outside & loop.frozen_at_start)]
    frozen = [each for each in still if each not in trained]
    if frozen or (since := [each for each in still if each in trained]):
        ends = [
            by.histories[each].last_free for by in loop.optimizers for each in frozen or since if each in by.histories
        ]
        when = f", since step {max(ends) + 2}" if ends and max(ends) >= 0 else ""
        sizes, whole = {each.name: each.size for each in frozen or since}, sum(each.size for each in loop.parameters)
        yield finding(
            "frozen_parameters",
            f"{describe_tensors(sizes, whole)}{when}.",
            loop.steps,
            MAY_BE_MEANT if frozen else "They were trained before. " + MAY_BE_MEANT,
            harm=share_of(sizes, whole),
        )


def _never_trained(loop: LoopRecord) -> Iterator[Finding]:
    """A part that is frozen from the beginning, whose numbers are still those that torch draws for a new layer, and
    behind which one layer alone is trained. Adapters are trained on anything."""
    free = [each.name for each in loop.parameters if each.trainable]
    if len({name.rpartition(".")[0] for name in free}) != 1 or any(n.rpartition(".")[2] not in LAYERS for n in free):
        return
    drawn = {each for each in loop.as_drawn - loop.moved_outside if not AT_RANDOM.search(each.name)}
    drawn = {each for each in drawn if not begins(each.name, loop.frozen)}
    sizes, whole = {each.name: each.size for each in drawn}, sum(each.size for each in loop.parameters)
    if loop.steps >= EARLY and 10 * sum(sizes.values()) > whole:
        yield finding(
            "frozen_parameters",
            f"{describe_tensors(sizes, whole)}, from the beginning, and their numbers lie as torch draws them for a new"
            " layer: nothing has trained them before, nor were other weights loaded.",
            loop.steps,
            "Random features may be meant.",
            "Look at what `load_state_dict` returns: with strict=False it leaves out names that do not fit, as those"
            " that begin with 'module.'. What is new has to be trained.",
            harm=share_of(sizes, whole),
        )


def _stale(loop: LoopRecord, missing: list[TensorRecord], trained: set[TensorRecord]) -> Iterator[Finding]:
    """Tensors that are not the model's. A criterion may have its own, which receive gradients, if not in every step.

    Certain where such a tensor has had none in any step and the model has one of its shape that no optimizer holds.
    """
    shapes = {tensor.shape for tensor in missing if tensor.size}
    owner = {each: optimizer for optimizer in loop.optimizers for each in optimizer.tensors if not each.name}
    served = {each for by in loop.optimizers for each, history in by.histories.items() if history.with_grad}
    idle = [
        (each, by)
        for each, by in owner.items()
        if (each not in trained and each not in served and by.steps)
        or (each not in by.with_grad and each.shape in shapes)
    ]
    certain = all(each not in by.with_grad and each.shape in shapes for each, by in idle)
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
