"""The parameters of a watched model as they are now, against those of its optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.parameter import is_lazy

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MEANT, found
from ris_fast.health.watch.records import EARLY

if TYPE_CHECKING:
    from ris_fast.health.watch.watch import Watch


def membership(watch: Watch) -> list[Finding]:
    """What is frozen, missing, there twice, or nobody's. Reads the device."""
    own = {id(p): name.replace("_orig_mod.", "") for name, p in watch.model.named_parameters()}
    held = Counter(id(p) for hooks in watch.all_hooks for p in hooks.held())
    trained = {key for hooks in watch.all_hooks for key in hooks.origin.trained()}
    missing = [
        p
        for p in watch.model.parameters()
        if p.requires_grad and id(p) not in held and not own[id(p)].startswith(watch.frozen)
    ]
    twice = [own.get(key, "?") for key, count in held.items() if count > 1]
    wrong = {"missing_from_optimizer": [own[id(p)] for p in missing], "duplicate_parameters": twice}
    return [
        *_frozen(watch, own, held, trained),
        *_stale(watch, own, missing, trained),
        *(
            found(cause, f"{len(names)}: {', '.join(names[:3])}.", watch.steps)
            for cause, names in wrong.items()
            if names
        ),
    ]


def _frozen(watch: Watch, own: dict[int, str], held: Counter[int], trained: set[int]) -> Iterator[Finding]:
    """Not those that were free in the last step that was theirs: what is frozen afterwards trains all the same.

    Uncertain where all have been trained, were frozen since the watch began and no step shows it, or have stood still
    from the beginning and no optimizer holds them or they are most of the model.
    """
    free = {id(p) for hooks in watch.all_hooks if hooks.steps for p in hooks.held() if id(p) not in hooks.frozen}
    still = {
        id(p): p
        for p in watch.model.parameters()
        if not p.requires_grad and id(p) not in free and not own[id(p)].startswith(watch.frozen)
    }
    keys = [key for key in still if key not in trained] or list(still)
    if not keys:
        return
    most = 2 * sum(_count(still[key]) for key in keys) > sum(map(_count, watch.model.parameters()))
    at_steps = {key for hooks in watch.all_hooks for key in hooks.frozen}
    meant = watch.still.issuperset(keys) and (most or held.keys().isdisjoint(keys))
    doubt = "They were trained before. " + MEANT if trained.issuperset(keys) else MEANT
    yield found(
        "frozen_parameters",
        f"{len(keys)}: {', '.join(own[key] for key in keys[:3])}.",
        watch.steps,
        doubt if meant or trained.issuperset(keys) or not (watch.still | at_steps).issuperset(keys) else "",
    )


def _stale(watch: Watch, own: dict[int, str], missing: list[Tensor], trained: set[int]) -> Iterator[Finding]:
    """Tensors that are not the model's. A criterion may have its own, which receive gradients.

    Certain where such a tensor receives none and the model has one of its shape that no optimizer holds, or after some
    steps.
    """
    shapes = {p.shape for p in missing}
    strangers = {id(p): (p, hooks) for hooks in watch.all_hooks for p in hooks.held() if id(p) not in own}
    idle = [(p, hooks) for key, (p, hooks) in strangers.items() if key not in trained or key not in hooks.fed]
    if idle:
        certain = all(
            id(p) not in hooks.fed and (p.shape in shapes or (hooks.steps >= EARLY and id(p) not in trained))
            for p, hooks in idle
        )
        yield found(
            "stale_optimizer_parameters",
            f"{len(idle)} of the optimizer's tensors are not the model's, of shapes "
            f"{', '.join(str(tuple(p.shape)) for p, _ in idle[:3])}.",
            watch.steps,
            "" if certain else "They may be a criterion's, or of another network that the loss reads.",
        )


def _count(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel()
