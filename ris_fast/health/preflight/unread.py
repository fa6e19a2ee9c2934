"""Preflight of what the network's first layers make of a scene: something behind them reads it.

Attention under a mask that is the wrong way round, or a pooling that takes one place of a sequence, answers from the
rest of the network, and every tensor has a gradient all the same.

Legend: B batch, T positions along an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.measures import SAME, relative_change
from ris_fast.health.preflight.persistent import persistent
from ris_fast.health.preflight.probe import SMALL, PreflightContext, layer_calls
from ris_fast.models.modes import eval_mode
from ris_fast.models.own import OwnNetwork
from ris_fast.physics.scenes import Scenes

DIFFERS = 1e-2  # relative, between scenes: what a layer answers to them
NO_PLACE = 1e-3  # of the change that another scene makes
DRAWS = 8  # of random numbers, each with other scenes
MOST = 0.5  # of the positions of a sequence that nothing reads
ADVICE = (
    "Print what the layer behind it is given for two scenes. A mask of attention may be the wrong way round (true means"
    " 'leave out' in key_padding_mask and in a boolean attn_mask of nn.MultiheadAttention, and 'take part' in"
    " scaled_dot_product_attention); a causal mask leaves the first position only itself; output[:, 0] of a recurrent"
    " layer has seen one step."
)


def read_by_something(context: PreflightContext) -> Iterator[Finding]:
    """What each layer that is given the scenes themselves makes of them has a part in the answer."""
    first = _first_layers(context)
    for name, (value, slope) in first.items():
        told = _tells_scenes_apart(value)
        if told is None:
            continue
        unread = told & _flat(slope, told)
        if not bool(unread.any()) or not _has_no_part(context, name, unread) or _read_at_times(context, name, told):
            continue
        count, all_of = int(unread.sum()), int(told.sum())
        if count == all_of:
            yield Finding(
                "ignored_input",
                f"what {name} makes of the scenes has no part in the answer, which stays the same to {SAME:g} when each"
                " scene is given that of another, with other weights too: nothing behind it reads it, and the answer is"
                " made of the rest. The two likeliest reasons: a mask, or an index, that leaves out what it is meant to"
                " take; and a branch that is multiplied by zero.",
                advice=ADVICE,
                certain=False,
            )
        elif told.dim() == 1 and count > MOST * all_of:
            read = (told & ~unread).nonzero()[:3, 0].tolist()
            yield Finding(
                "ignored_input",
                f"of the {all_of} positions of what {name} makes of the scenes {count} have no part in the answer, with"
                f" other weights too: it reads position {', '.join(map(str, read))}"
                f"{' and others' if all_of - count > 3 else ''} alone. The two likeliest reasons: one place of a"
                " sequence is taken that has not seen the others, and a mask that leaves out what it is meant to take.",
                advice=ADVICE,
                certain=False,
            )
        else:
            continue
        return


def _read_at_times(context: PreflightContext, name: str, told: Tensor) -> bool:
    """Whether some scenes and draws of training read all of what the layer makes, as those that a router gives it."""
    batches = [scenes[:SMALL] for group in context.groups for scenes in group]
    for seed in range(1, DRAWS + 1):
        value, slope = _first_layers(context, batches[seed % len(batches)], seed).get(name, (None, None))
        if value is not None and not bool((told & _flat(slope, told)).any()):
            return True
    return False


def _first_layers(
    context: PreflightContext, scenes: Scenes | None = None, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Layers that are given what no weight has touched: name -> (answer, its gradient of a random sum of outputs).

    In evaluation mode, or of some other scenes as in training.
    """
    found: dict[str, Tensor] = {}
    mode, scenes = (eval_mode(context.model), context.scenes) if scenes is None else (nullcontext(), scenes)

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        given = [each for each in inputs if isinstance(each, Tensor)]
        if isinstance(output, Tensor) and output.requires_grad and given and not any(x.requires_grad for x in given):
            if output.dim() > 1 and len(output) == scenes.batch:
                found.setdefault(name, output)

    context.rewind()  # which makes a pass of its own when it is called first
    with mode, context.full_precision(), layer_calls(context.model, keep):
        prediction = context.predict(scenes, seed)
    outputs = [each for each in prediction if each is not None and each.requires_grad]
    if not found or not outputs:
        return {}
    generator = torch.Generator().manual_seed(67)
    sides = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
    slopes = derivatives(outputs, list(found.values()), sides)
    return {name: (value.detach(), slope) for (name, value), slope in zip(found.items(), slopes)}


def _tells_scenes_apart(value: Tensor) -> Tensor | None:
    """Where an answer differs between scenes: (T,) along the axis behind the batch of a sequence, () for one row each;
    None where it does nowhere."""
    rows = value.float().flatten(2) if value.dim() > 2 else value.float()[:, None]
    if not bool(rows.isfinite().all()):
        return None
    apart = (rows - rows[:1]).square().sum((0, 2)).sqrt() > DIFFERS * rows.square().sum((0, 2)).sqrt()
    apart = apart if value.dim() > 2 else apart[0]
    return apart if bool(apart.any()) else None


def _flat(slope: Tensor | None, told: Tensor) -> Tensor:
    """Where a gradient is exactly zero for all scenes, in the shape of `told`."""
    if slope is None:
        return torch.ones_like(told)
    return (slope == 0).flatten(2).all(2).all(0) if told.dim() else (slope == 0).all()


@torch.no_grad()
def _has_no_part(context: PreflightContext, name: str, unread: Tensor) -> bool:
    """Whether the answer stays as it is when each scene is given what the layer made of another, at those positions:
    a path without a derivative, as through an argmax, is one too."""
    module = dict(context.model.named_modules())[name]

    def others(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        mask = unread.view(1, -1, *[1] * (output.dim() - 2)) if unread.dim() else unread
        return torch.where(mask, output.roll(1, 0), output)

    with context.full_precision():
        here = context.answer(context.scenes)
        hook = module.register_forward_hook(others)
        try:
            there = context.answer(context.scenes)
        finally:
            hook.remove()
    return relative_change(here, there) < SAME


# ---- where on the surface
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def knows_places(context: PreflightContext) -> Iterator[Finding]:
    """What a network of the user's own learns of a picture or a sequence of the surface's elements or directions
    depends on which number is where."""
    if not isinstance(context.model, OwnNetwork) or context.scenes.batch < 2:
        return
    first, last = _ends(context)
    for name, given in first.items():
        axes = _places(context, given)
        if not axes or _says_where(given, axes):
            continue
        here = _last_answer(context, last, name, given.shape, lambda value: value)
        there = _last_answer(
            context, last, name, given.shape, lambda value, axes=axes: value.roll([1] * len(axes), axes)
        )
        others = _last_answer(context, last, name, given.shape, lambda value: value.roll(1, 0))
        if here is None or there is None or others is None:
            continue
        moved, other = relative_change(here, there), relative_change(here, others)
        if other > DIFFERS and moved < NO_PLACE * other:
            size = " x ".join(str(given.shape[axis]) for axis in axes)
            yield Finding(
                "inputs_withhold_answer",
                f"{name} is given numbers for {size} places of each scene, and {last}, the last layer, answers the"
                f" same when they are moved by one place (a change of {moved:.1g}, beside {other:.2g} for another"
                " scene): what lies between takes a mean or a sum over the places, or a layer that treats all alike,"
                " so that the network does not know where on the surface, or in which direction, something is.",
                advice="Flatten the places in place of a mean over them, or add an embedding of the place to each"
                " before the first layer that mixes them. Where the answer is the same for all places, that is meant.",
                certain=False,
            )
            return


def _ends(context: PreflightContext) -> tuple[dict[str, Tensor], str]:
    """What the layers are given that see no weight before them, by name; and the name of the last layer."""
    first: dict[str, Tensor] = {}
    order: list[str] = []

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        order.append(name)
        if inputs and isinstance(inputs[0], Tensor) and not inputs[0].requires_grad:
            first.setdefault(name, inputs[0].detach())

    context.rewind()
    with eval_mode(context.model), layer_calls(context.model, keep), torch.enable_grad():
        context.predict(context.scenes)
    return first, order[-1] if order else ""


def _places(context: PreflightContext, given: Tensor) -> list[int]:
    """The axes along which an input goes over the elements of the surface, or as many directions; none of a row."""
    task = context.config.task
    if given.dim() < 3 or len(given) != context.scenes.batch:
        return []
    sizes = list(given.shape)
    if given.dim() == 4 and set(sizes[2:]) <= {task.ris_vertical, task.ris_horizontal}:
        return [2, 3]
    return [
        axis for axis in (1, 2) if given.dim() == 3 and sizes[axis] == task.elements and sizes[3 - axis] != sizes[axis]
    ]


def _says_where(given: Tensor, axes: list[int]) -> bool:
    """Whether some of the numbers are the same for all scenes and differ from place to place: they tell which it is."""
    fixed = (given == given[:1]).all(0)
    apart = (given[0] != given[0].roll([1] * len(axes), [axis - 1 for axis in axes])) & fixed
    return bool(apart.any())


def _last_answer(
    context: PreflightContext, last: str, first: str, shape: torch.Size, change: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """What the last layer answers when what a first one is given, of this shape, has gone through `change`."""
    modules, found = dict(context.model.named_modules()), []

    def changed(layer: nn.Module, inputs: tuple) -> tuple | None:
        given = inputs[0] if inputs else None  # a layer may be called again with something else
        return (change(given), *inputs[1:]) if isinstance(given, Tensor) and given.shape == shape else None

    handles = [
        modules[first].register_forward_pre_hook(changed),
        modules[last].register_forward_hook(lambda layer, inputs, output: found.append(output)),
    ]
    try:
        context.answer(context.scenes)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1].detach().float() if found and isinstance(found[-1], Tensor) else None


CHECKS = {
    "what the first layers make of scenes is read": persistent(read_by_something, "ignored_input"),
    "the network knows which place is which": persistent(knows_places, "inputs_withhold_answer"),
}
