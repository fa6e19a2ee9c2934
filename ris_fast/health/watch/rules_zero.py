"""Rules of `watch` on gradients that arrive and are exactly zero: all of them, those of some tensors, of some units.

Certain is only that they are zero; what makes them so is told from which tensors they are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from ris_fast.health.watch.describe import describe_steps, describe_tensors, share_of
from ris_fast.health.watch.fixes import finding
from ris_fast.health.watch.histories import GradientNumbers
from ris_fast.health.watch.records import LoopRecord, OptimizerRecord, StepRecord, is_finite

LOOKS = 8  # of which none has another gradient
MANY, USUAL, RARE, OFTEN = 16, 0.75, 0.25, 3  # looks in all; shares of them with a gradient and without; how often
WHOLE = (
    "A rounding, a sign or an argmax in front of the loss does that (non_differentiable), an output unit that is off "
    "for "
    "every input (dead_units), or a clamp; print the outputs and their `grad_fn`."
)
PARTLY = "A rounding, a comparison or a factor of zero on the way does that, and so does a branch that is off for now."


def zero_findings(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    looks = [each for each in optimizer.records if each.hooked]
    heard = _heard(looks)
    zero = [name for name, norms in heard.items() if len(norms) >= LOOKS and not any(norms)]
    zero = [name for name in zero if not begins(name, loop.frozen)]
    if not zero or not all(_always_zero(name, looks) for name in zero):
        return
    at = looks[-1].step + 1
    others = [name for name, norms in heard.items() if name not in zero and any(norms)]
    nothing = _at_zero(zero, looks)
    if len(nothing) >= 2:
        yield _product(nothing, len(zero), at)
    elif not others and any(tensor.dtype == torch.float16 for tensor in optimizer.tensors):
        evidence = f"the gradients of all {len(zero)} tensors arrive and are zeros, in float16, which ends at 6e-08."
        yield finding("gradient_underflow", evidence, at, f"In another format they may be zero, too. {WHOLE}")
    elif not others:
        certain = min(map(len, heard.values())) >= LOOKS and looks[0].step == 0 and len(heard) == len(looks[-1].hooked)
        losses = [float(each.value) for each in (*loop.losses, *loop.met) if each.value is not None]
        if losses and not any(losses):
            yield finding(
                "vanishing_gradient",
                f"the loss is exactly 0 in all {len(losses)} steps in which it was seen, and so are all gradients: no"
                " scene violates the margin, so that there is nothing left to learn, or negatives are too easy.",
                at,
                "A factor of zero in front of the loss, or outputs that are the targets themselves, look so.",
                "Take harder negatives or a larger margin; if weights were trained before, this loss is done.",
            )
            return
        yield finding(
            "vanishing_gradient",
            f"the gradients of all {len(zero)} tensors arrive in each of {len(looks)} steps that were looked at, and "
            "every"
            f" number is zero.{'' if not certain else ' ' + WHOLE}",
            at,
            "" if certain else WHOLE,
        )
    else:
        yield from _partly(zero, others, at, {tensor.name: tensor.size for tensor in optimizer.tensors})


def _heard(looks: list[StepRecord]) -> dict[str, list[float]]:
    """By name: the norms of the gradients that came."""
    heard: dict[str, list[float]] = defaultdict(list)
    for look in looks:
        came = set(look.hooked) - set(look.none_grads)
        for name, norm in zip(look.names, look.grad_after_backward.tolist()):
            if name in came:
                heard[name].append(norm)
    return heard


def _always_zero(name: str, looks: list[StepRecord]) -> bool:
    """Also as the optimizer finds it: something else may give gradients by hand."""
    return all(float(look.grad_at_step[look.names.index(name)]) == 0 for look in looks if name in look.names)


def _at_zero(zero: list[str], looks: list[StepRecord]) -> list[str]:
    """Those whose weights are all zero at every look, and are no biases: as a LoRA pair that both start there."""
    weights = {
        name: max(float(each.weights_before[each.names.index(name)]) for each in looks if name in each.names)
        for name in zero
    }
    return [name for name, norm in weights.items() if norm == 0 and not name.endswith("bias")]


def _product(names: list[str], count: int, step: int) -> Finding:
    return finding(
        "zero_product_init",
        f"{len(names)} tensors are all zeros and their gradients arrive and are all zeros: {', '.join(names[:3])}. "
        "Each is"
        " a factor of the other's "
        f"gradient.{f' {count - len(names)} more tensors are cut off.' if count > len(names) else ''}",
        step,
    )


def _partly(zero: list[str], others: list[str], step: int, sizes: dict[str, int]) -> Iterator[Finding]:
    """Some tensors. A weight whose gradient is zero while its layer's bias has one has inputs that are all zero: units
    before it are off. A whole layer lies before something that has no derivative."""
    layers = defaultdict(set)
    for name in (*zero, *others):
        layers[name.rpartition(".")[0]].add(name)
    whole = [layer for layer, names in layers.items() if names <= set(zero)]
    fed_zeros = [f"{layer}.weight" for layer in layers if f"{layer}.weight" in zero and f"{layer}.bias" in others]
    said = f"the gradients of {len(zero)} of {len(zero) + len(others)} tensors arrive and are all zeros, at every look"
    if fed_zeros and whole:
        yield finding(
            "dead_units",
            f"{said}: {', '.join(zero[:3])}. The bias of {fed_zeros[0].removesuffix('.weight')} has a gradient and its"
            " weight has none, so that its inputs are all zero: the units before it are off for every input.",
            step,
            "A mask that is zero for now would look so, too.",
        )
    elif whole:
        still, numbers = {name: sizes.get(name, 0) for name in zero}, sum(sizes.values())
        evidence = f"{describe_tensors(still, numbers)}. Their gradients arrive and are all zeros, at every look."
        yield finding("vanishing_gradient", evidence, step, PARTLY, harm=share_of(still, numbers))
    elif weights := [name for name in fed_zeros if _others_before(name, [*zero, *others], others)]:
        yield finding(
            "zeroed_gradients",
            f"{said}: {', '.join(weights[:3])}, while the bias of the same layer has one: a hook sets it to zero, or "
            "the"
            " layer's inputs are zeros (constant_input).",
            step,
            "A forward hook that prints the layer's input tells the two apart.",
        )


def _others_before(name: str, names: list[str], others: list[str]) -> bool:
    return name in names and bool(others)


def dead_units(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Layers of which next to all units have had no gradient at any look."""
    if len(optimizer.records) < 2 * LOOKS:
        return
    for name, numbers in optimizer.numbers.items():
        layer, _, kind = name.rpartition(".")
        weight = optimizer.numbers.get(f"{layer}.weight")
        if kind != "bias" or weight is None or numbers.sampled < 8 or begins(name, loop.frozen):
            continue
        shares = [each.live / each.sampled for each in (numbers, weight)]
        if 0 < max(shares) <= 0.05 and math.isfinite(numbers.size):
            yield finding(
                "dead_units",
                f"{1 - shares[0]:.0%} of the units of {layer} have had no gradient in any of "
                f"{len(optimizer.records)} steps"
                " that were looked at.",
                optimizer.records[-1].step + 1,
                "A layer of which each input uses a small part, as an expert or a table, looks so, too.",
            )
            return


def gradient_underflow(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Many gradients are zero and the others lie on float16's grid, below its smallest normal number. In float32 the
    difference of two numbers near one lies there too, and is the whole gradient of a table: no other matrix has one."""
    some = optimizer.gradient
    if lies_where_float16_ends(some) and (some.narrow_matrices > 1 or _has_float16(loop)):
        yield finding(
            "gradient_underflow",
            f"{some.zero / some.sampled:.0%} of the gradients' numbers are zero, and most others are multiples of "
            "6e-08 below 6e-05, where float16 ends.",
            optimizer.records[-1].step + 1,
            "Scale the loss and look again: gradients that are small in truth do not lie on that grid.",
            "Multiply the loss with `torch.amp.GradScaler`, or use bfloat16.",
        )


def lies_where_float16_ends(some: GradientNumbers) -> bool:
    """Whether numbers of gradients are zero or on float16's grid below its smallest normal number."""
    others = some.sampled - some.zero
    return some.sampled >= 64 and some.zero >= 0.3 * some.sampled and 0 < 0.9 * others <= some.narrow


def _has_float16(loop: LoopRecord) -> bool:
    """Whether a tensor of the model, of an optimizer or of a pass is in float16."""
    tensors = [*loop.parameters, *(each for by in loop.optimizers for each in by.tensors)]
    made = loop.forward is not None and loop.forward.made_float16
    return made or any(each.dtype == torch.float16 for each in tensors)


def zeros_now_and_then(loop: LoopRecord, optimizer: OptimizerRecord) -> Iterator[Finding]:
    """In single steps all tensors up to one place of the network have a gradient of zeros, or one layer has inputs of
    zeros, always at that place: what passes there is lost now and then. Blocks that are dropped at random change."""
    looks = [each for each in optimizer.records if each.hooked and not each.closure]
    norms = [_norms_of(each) for each in looks]
    count = Counter(name for each in norms for name, norm in each.items() if norm > 0)
    usual = [name for name in (norms[-1] if norms else ()) if count[name] >= USUAL * len(looks)]
    lost = [tuple(name for name in usual if each.get(name) == 0) for each in norms]
    odd = [number for number, names in enumerate(lost) if names and len(names) < len(usual)]
    places = {_place(lost[number], usual) for number in odd}
    apart = all(later > number + 1 for number, later in pairwise(odd))
    if len(looks) < MANY or not OFTEN <= len(odd) <= RARE * len(looks) or not apart or len(places) != 1 or "" in places:
        return
    if any(begins(name, loop.frozen) for number in odd for name in lost[number]):
        return
    steps = describe_steps([looks[number].step + 1 for number in odd], len(looks))
    yield finding(
        "zeroed_gradients",
        f"now and then, {steps}, nothing passes in front of {places.pop()}: gradients of all tensors before it are"
        " exactly zero, or those of its weight while its bias has one. In other steps they are not.",
        looks[odd[0]].step + 1,
        "A copy between devices that loses its numbers, or is read before it is there, does that; so does an input"
        " that is masked for whole batches. A check for `(x == 0).all()` on both sides of that place tells.",
    )


def _norms_of(look: StepRecord) -> dict[str, float]:
    """Of the gradients that came."""
    came = set(look.hooked) - set(look.none_grads)
    return {name: norm for name, norm in zip(look.names, look.grad_after_backward.tolist()) if name in came}


def _place(lost: tuple[str, ...], usual: list[str]) -> str:
    """The layer in front of which it happens; empty where tensors are lost in another way."""
    layer, _, kind = lost[0].rpartition(".")
    if len(lost) == 1 and kind == "weight" and f"{layer}.bias" in usual and lost[0] != usual[0]:
        return layer
    return usual[len(lost)].rpartition(".")[0] if len(lost) > 1 and list(lost) == usual[: len(lost)] else ""


def symmetric_init(optimizer: OptimizerRecord) -> Iterator[Finding]:
    """Matrices of one shape whose weights and gradients have the same norms to the last bit at every look: copies that
    nothing tells apart. What is copied on purpose, such as a second critic, has gradients of its own."""
    looks = [each for each in optimizer.records if each.hooked and not each.closure and is_finite(each.grad_at_step)]
    looks = [each for each in looks if each.names == looks[-1].names and each.weights_after is not None]
    if len(looks) < LOOKS:
        return
    shapes = {each.name: each.shape for each in optimizer.tensors if each.trainable and each.size >= LOOKS}
    grads = torch.stack([each.grad_after_backward for each in looks]).T.tolist()
    weights = torch.stack([each.weights_after for each in looks]).T.tolist()
    alike = defaultdict(list)
    for name, gradient, weight in zip(looks[-1].names, grads, weights):
        if len(shapes.get(name, ())) > 1 and all(gradient) and all(weight) and len(set(weight)) > 1:
            alike[shapes[name], tuple(gradient), tuple(weight)].append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if groups:
        names = max(groups, key=len)
        yield finding(
            "symmetric_init",
            f"{len(names)} tensors ({', '.join(names[:3])}) have the same norms, and so have their gradients, bit for"
            f" bit, at each of {len(looks)} looks: they started as copies and stay so.",
            looks[-1].step + 1,
            "Copies that are trained side by side to be compared look the same.",
            "Draw the weights of each copy anew, e.g. build the layer again where it is copied with `deepcopy`.",
        )
