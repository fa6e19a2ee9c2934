"""Preflight of scenes that are mixed: what a scene's answer owes to the others of its batch, in both modes.

A normalisation over the batch mixes scenes in training by design, and not in evaluation.
Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.follow import parting
from ris_fast.health.preflight.measures import CLOSE, SAME, listed, relative_change
from ris_fast.health.preflight.modes import BATCH_NORM
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.models.modes import eval_mode
from ris_fast.physics.scenes import Scenes


def mixed(context: PreflightContext) -> Iterator[Finding]:
    """Answers stay as they are when other scenes of the batch are left out, and in training when they are replaced."""
    scenes = context.scenes
    half, allowed = scenes.batch // 2, context.tolerance(CLOSE, 0.1)
    answer = context.answer(scenes)
    halves = (slice(0, half), slice(half, scenes.batch))
    change = max(relative_change(answer[part], context.answer(scenes[part])) for part in halves)
    pair = _beside_others(context, scenes, half)
    if change > allowed and relative_change(answer, context.answer(scenes, 1)) > SAME:
        # Random numbers are at work, and another shape draws others.
        change = 0.0 if pair is None else relative_change(*(context.answer(each)[:half] for each in pair))
    if change > allowed and relative_change(answer, context.answer(scenes)) > 0.1 * change:
        return  # answers change from call to call, whatever scenes are there
    if change > allowed:
        yield from _in_evaluation(context, scenes, change, allowed)
    elif pair is not None:
        yield from _in_training(context, *pair, half, allowed)


def _in_evaluation(context: PreflightContext, scenes: Scenes, change: float, allowed: float) -> Iterator[Finding]:
    """Why answers of evaluation mode mix: not by modules that eval() leaves in training mode, which have a name of
    their own."""
    halves = (slice(0, scenes.batch // 2), slice(scenes.batch // 2, scenes.batch))
    with eval_mode(context.model):
        for module in context.model.modules():
            module.training = False
        whole = _trained(context, scenes)
        quiet = max(relative_change(whole[part], _trained(context, scenes[part])) for part in halves)
    if quiet <= allowed:
        return
    if (reason := _kept(context, scenes, allowed) or _of_the_first(context, scenes, allowed)) is not None:
        yield reason
        return
    without = [
        name
        for name, module in context.model.named_modules()
        if isinstance(module, BATCH_NORM) and module.running_mean is None
    ]
    last = halves[1]
    first, second = (lambda: context.answer(scenes)), (lambda: context.answer(scenes[last]))
    where = parting(context.model, first, second, last, slice(None))
    yield Finding(
        "scenes_mixed",
        f"answers change by {change:.2g} when other scenes of the batch are left out"
        f"{_beginning(where)}"
        f"{f'; {listed(without)} keeps no running statistics and uses those of the batch' if without else ''}.",
        certain=where not in without,
    )


def _kept(context: PreflightContext, scenes: Scenes, allowed: float) -> Finding | None:
    """Something made of the scenes of one call that answers the next: it is made anew where the batch has another
    size."""
    answers = []
    for before in (scenes[torch.arange(scenes.batch).roll(1)], scenes[: scenes.batch - 1]):
        context.answer(scenes[:2])
        context.answer(before)
        answers.append(context.answer(scenes))
    change = relative_change(*answers)
    if not change > allowed:
        return None
    return Finding(
        "stale_cache",
        f"the answers to {scenes.batch} scenes change by {change:.2g} with the call before: behind one with as many"
        " other scenes they are another's than behind one of another size. Something that is made of one batch is kept"
        " and used for the next.",
        advice="Look in forward for what is made once and kept, as `if self.cache is None or self.cache.shape !="
        " x.shape`: make it anew in every call, or keep it by the scenes it belongs to.",
    )


def _of_the_first(context: PreflightContext, scenes: Scenes, allowed: float) -> Finding | None:
    """All answers change with the first scene of the batch, and with no other one but their own."""
    rows = torch.arange(scenes.batch)
    first, others = rows.clone(), rows.clone()
    first[0] = scenes.batch - 1
    others[1 : scenes.batch // 2] = scenes.batch - 1
    answer, rest = context.answer(scenes), slice(scenes.batch // 2, None)
    by_first, by_others = (
        relative_change(answer[rest], context.answer(scenes[order])[rest]) for order in (first, others)
    )
    if not by_first > allowed > by_others:
        return None
    return Finding(
        "scenes_mixed",
        f"the answers to all scenes change by {by_first:.2g} with the first one of their batch, and by {by_others:.2g}"
        " with the others: something of the first scene is used for all.",
        advice="Look in forward for an index or a slice that takes the first of the batch, as x[0] or x[:1], with"
        " expand or broadcasting behind it, and for codes or a channel taken for one that all scenes share.",
    )


def _beside_others(context: PreflightContext, scenes: Scenes, half: int) -> tuple[Scenes, Scenes] | None:
    """The scenes, and the first half of them beside others: as many, so that dropout draws the same."""
    pool = all_scenes(context)
    new = pool[~torch.isin(pool.index, scenes.index)][: scenes.batch - half]
    if new.batch < scenes.batch - half:
        return None
    return scenes, Scenes.concatenate([scenes[:half], new])


def _in_training(context: PreflightContext, one: Scenes, other: Scenes, half: int, allowed: float) -> Iterator[Finding]:
    """Answers of the first half in training mode, beside two sets of others."""

    def gap() -> float:
        return relative_change(*(_trained(context, scenes)[:half] for scenes in (one, other)))

    context.model.train()
    change = gap()
    if not change > allowed or relative_change(_trained(context, one), _trained(context, one)) > 0.1 * change:
        return
    norms = _batch_statistics(context.model, lambda: _trained(context, one))
    for module in norms:
        module.training = False
    rest = gap() if norms else change
    context.model.train()
    if not rest > allowed:
        return  # a normalisation over the batch, as it is meant
    first, second = (lambda: _trained(context, one)), (lambda: _trained(context, other))
    where = parting(context.model, first, second, slice(0, half), slice(0, half))
    yield Finding(
        "scenes_mixed",
        f"in training mode the answers to {half} scenes change by {change:.2g} when the others of their batch are"
        f" replaced{_beginning(where)}, and in evaluation mode they do not:"
        " no running statistics explain it. A normalisation over the batch that evaluation leaves out may be meant; a"
        " wrong axis or reshape is not.",
        certain=False,
    )


def _trained(context: PreflightContext, scenes: Scenes) -> Tensor:
    """In the modes as they are."""
    torch.manual_seed(0)
    return context.step.predict(scenes).factor.detach().float().clone()


def _beginning(where: str) -> str:
    return f", beginning in '{where}'" if where else ""


def _batch_statistics(model: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """Modules that normalise over the batch: torch's, and any with buffers of its own that a training pass changes."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    run()
    moved = {
        name.rpartition(".")[0]
        for name, value in model.named_buffers()
        if not torch.allclose(value, before[name], 0.0, 0.0, equal_nan=True)
    }
    return [module for name, module in model.named_modules() if name in moved or isinstance(module, BATCH_NORM)]
