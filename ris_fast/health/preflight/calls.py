"""Preflight of what the step calls, a compiled graph or a replica: it is the network, and leaves its scenes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.compare_calls import (
    altered,
    compare,
    compare_compiled,
    compare_once,
    compare_others,
    compare_random,
    model_factor,
    noise,
    step_factor,
)
from ris_fast.health.preflight.measures import SAME, listed
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.modes import eval_mode
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import autocast, network_inputs

FEW = 8  # scenes on which a network that torch did not compile is compared


def inputs_kept(context: PreflightContext) -> Iterator[Finding]:
    """Network and loss read their scenes and do not write into them."""
    names = altered(context, context.scenes)
    if names:
        yield Finding(
            "scenes_altered",
            f"after one call of the network the {' and the '.join(names)} of its scenes are not what they were.",
        )
        return
    if places := _features_altered(context):
        yield Finding(
            "scenes_altered",
            f"the network writes into what its features() returned, tensor {listed(places)} of them: those of"
            " validation scenes are kept, so that each validation sees what the one before has made of them.",
            advice="Write x = x * y in place of x *= y, x.mul_(y) or x[...] = y in trunk(), or clone what is changed.",
        )
        return
    copy = context.scenes.apply(torch.clone, codes=True)
    prediction = context.guess
    for _ in range(2):  # one that writes what is there already is seen the second time
        context.loss(prediction, copy)
    names = [
        item.name
        for item in fields(copy)
        if (kept := getattr(context.scenes, item.name)) is not None
        and not torch.allclose(getattr(copy, item.name), kept, 0.0, 0.0, equal_nan=True)
    ]
    if names:
        yield Finding(
            "scenes_altered",
            f"after a call of the loss the {' and the '.join(names)} of its scenes are not what they were: it writes"
            " into"
            " them, and whoever reads them next, as validation does with scenes that it keeps, sees others.",
            advice="Write x = x + y in place of x += y or x.add_(y) in the loss, or clone what is changed.",
        )


@torch.no_grad()
def _features_altered(context: PreflightContext) -> list[str]:
    """Numbers of the tensors among a network's features that its trunk changes; empty where it has none."""
    if not getattr(context.model, "in_two", True):
        return []
    features = context.model.features(*network_inputs(context.scenes))
    kept = [each.clone() if isinstance(each, torch.Tensor) else None for each in features]
    with eval_mode(context.model), autocast(context.trainer.device, context.config.training.precision):
        context.model.trunk(features)
    return [
        str(number)
        for number, (now, before) in enumerate(zip(features, kept))
        if before is not None and not torch.allclose(now, before, 0.0, 0.0, equal_nan=True)
    ]


def compiles(context: PreflightContext) -> Iterator[Finding]:
    """Compiles what training will call, once for the checks that follow and for training; the note says how long it
    took."""
    context.trainer._compile()
    context.note = context.trainer.compile_note
    yield from ()


def same_network(context: PreflightContext) -> Iterator[Finding]:
    """What the step calls is the network: the same answers now, and after the weights have changed.

    Torch compiles anew for every mode, and training compiles one: what it compiled is called as training calls it.
    """
    if not context.compiled and "predict" not in context.step.__dict__:
        return
    few = context.scenes[:FEW]
    scenes = context.groups[0][0] if context.by_torch else few
    random = noise(context, few, model_factor) > 10 * SAME
    context.model.train(context.by_torch)
    if context.by_torch:
        finding = (compare_random if random else compare_compiled)(context, scenes)
    else:
        finding = compare(context, scenes, grad=True)
    finding = finding or (None if random else compare_others(context, scenes))
    context.model.eval()
    with torch.no_grad():
        finding = finding or compare(context, few, grad=False)
        whole = context.groups[0][0]
        if finding is None and not random and whole.batch > few.batch:  # what works on blocks has a last one
            finding = compare_once(context, whole)
    context.model.train()
    if finding is None and random:
        finding = _compare_modes(context, scenes)
    if finding is not None:
        yield finding


def _compare_modes(context: PreflightContext, scenes: Scenes) -> Finding | None:
    """A network with dropout is random in training; what the step calls must be as well."""
    if noise(context, scenes, step_factor) < SAME:
        return Finding(
            "eval_mode_in_training",
            "in training the network's dropout is at work, and what the step calls answers "
            "as in evaluation mode: it was compiled or copied in evaluation mode.",
        )
    return None


SMALL_BATCH = {"network and loss leave their scenes alone": inputs_kept}
COMPILING = {"the network is compiled": compiles}
WHOLE_STEP = {"the step calls the network itself": same_network}
