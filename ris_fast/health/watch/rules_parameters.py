"""Rules of `watch` on the parameters of a model against those of its optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ris_fast.health.finding import Finding
from ris_fast.health.watch.fixes import MAY_BE_MEANT, finding
from ris_fast.health.watch.records import EARLY, LoopRecord, TensorRecord


def parameter_findings(loop: LoopRecord) -> list[Finding]:
    """What is frozen, missing, there twice, or nobody's."""
    held = Counter(tensor for optimizer in loop.optimizers for tensor in optimizer.tensors)
    trained = {tensor for optimizer in loop.optimizers for tensor in optimizer.trained}
    missing = [
        each
        for each in loop.parameters
        if each.trainable and each not in held and not each.name.startswith(loop.frozen)
    ]
    twice = [tensor for tensor, count in held.items() if count > 1]
    return [
        *_frozen(loop, held, trained),
        *_stale(loop, missing, trained),
        *_listed("missing_from_optimizer", missing, loop.steps),
        *_listed("duplicate_parameters", twice, loop.steps),
    ]


def _listed(cause: str, tensors: list[TensorRecord], step: int, doubt: str = "") -> Iterator[Finding]:
    if tensors:
        names = ", ".join(tensor.name or "?" for tensor in tensors[:3])
        yield finding(cause, f"{len(tensors)}: {names}.", step, doubt)


def _frozen(loop: LoopRecord, held: Counter[TensorRecord], trained: set[TensorRecord]) -> Iterator[Finding]:
    """Not those that were free in the last step of their optimizer: what is frozen afterwards trains all the same.

    Uncertain where all have been trained, were frozen since the watch began and no step shows it, or have stood still
    from the beginning and no optimizer holds them or they are most of the model.
    """
    stepped = [optimizer for optimizer in loop.optimizers if optimizer.steps]
    free = {each for optimizer in stepped for each in optimizer.tensors if each not in optimizer.frozen}
    still = [
        each
        for each in loop.parameters
        if not each.trainable and each not in free and not each.name.startswith(loop.frozen)
    ]
    frozen = [each for each in still if each not in trained] or still
    doubt = "They were trained before. " + MAY_BE_MEANT if trained.issuperset(frozen) else MAY_BE_MEANT
    yield from _listed("frozen_parameters", frozen, loop.steps, "" if _certain(loop, frozen, held, trained) else doubt)


def _certain(
    loop: LoopRecord, frozen: list[TensorRecord], held: Counter[TensorRecord], trained: set[TensorRecord]
) -> bool:
    most = 2 * sum(each.size for each in frozen) > sum(each.size for each in loop.parameters)
    meant = loop.frozen_at_start.issuperset(frozen) and (most or held.keys().isdisjoint(frozen))
    at_steps = {each for optimizer in loop.optimizers for each in optimizer.frozen}
    return not meant and not trained.issuperset(frozen) and (loop.frozen_at_start | at_steps).issuperset(frozen)


def _stale(loop: LoopRecord, missing: list[TensorRecord], trained: set[TensorRecord]) -> Iterator[Finding]:
    """Tensors that are not the model's. A criterion may have its own, which receive gradients.

    Certain where such a tensor receives none and the model has one of its shape that no optimizer holds, or after some
    steps.
    """
    shapes = {tensor.shape for tensor in missing if tensor.size}
    owner = {each: optimizer for optimizer in loop.optimizers for each in optimizer.tensors if not each.name}
    idle = [(each, by) for each, by in owner.items() if each not in trained or each not in by.with_grad]
    certain = all(
        each not in by.with_grad and (each.shape in shapes or (by.steps >= EARLY and each not in trained))
        for each, by in idle
    )
    if idle:
        yield finding(
            "stale_optimizer_parameters",
            f"{len(idle)} of the optimizer's tensors are not the model's, of shapes "
            f"{', '.join(str(tensor.shape) for tensor, _ in idle[:3])}.",
            loop.steps,
            "" if certain else "They may be a criterion's, or of another network that the loss reads.",
        )
