"""Finds the first operation whose derivative is not finite, and the term of the loss that it belongs to.

Autograd's anomaly mode costs several times a step, so it runs around one step only: the failing one, replayed. A step
with a gradient that is not finite changes no weight, so the state of the run is still the last good one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.restore import preserve_state
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer

OUTSIDE = "outside the named terms"


@dataclass(frozen=True)
class Culprit:
    """The term that the bad gradient comes from, the operation that made it, and the line that called the operation."""

    term: str
    operation: str
    place: str

    def __str__(self) -> str:
        return f"term {self.term}: {self.operation} gives a gradient that is not finite; called at {self.place}"


def replay(trainer: Trainer) -> list[Culprit]:
    """The step that the run has just made, once more under anomaly mode, a term at a time; empty if all is finite."""
    state, before = trainer.state, trainer.state.epoch_scenes
    state.epoch_scenes = max(0, before - trainer.last_scenes)
    groups = trainer._groups()
    try:
        group = next(groups, None)
    finally:
        groups.close()
        state.epoch_scenes = before
    return [] if group is None else culprits(PreflightContext(trainer), group)


def culprits(context: PreflightContext, group: Sequence[Scenes]) -> list[Culprit]:
    """Terms of the loss with gradients that are not finite on these scenes, each with its first bad operation."""
    found: dict[str, Culprit] = {}
    with preserve_state(context.trainer), context.small():
        context.model.train()
        for scenes in group:
            for term in (*context.loss.weights, OUTSIDE):
                if term not in found and (term != OUTSIDE or not found) and (culprit := _first(context, scenes, term)):
                    found[term] = culprit
    return list(found.values())


def _first(context: PreflightContext, scenes: Scenes, term: str) -> Culprit | None:
    live = [parameter for parameter in context.parameters.values() if parameter.requires_grad]
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        total, terms, _ = context.run(scenes)
        value = total if term == OUTSIDE else terms.get(term)
        if value is None or not value.requires_grad:
            return None
        try:
            torch.autograd.grad(value, live, allow_unused=True)
        except RuntimeError as error:
            if "returned nan" not in str(error):
                raise
            return Culprit(term, _operation(str(error)), _place([str(each.message) for each in told]))
    return None


def _operation(message: str) -> str:
    match = re.search(r"Function '(\w+)'", message)
    return match.group(1) if match else message.splitlines()[0]


def _place(messages: Sequence[str]) -> str:
    """The innermost line outside of torch in the traceback of the forward call."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', "\n".join(messages))
    own = [(file, number, name) for file, number, name in lines if "/torch/" not in file]
    if not own:
        return "a line that was not recorded"
    file, number, name = own[-1]
    return f"{file.rpartition('/')[2]}:{number} in {name}"
