"""Preflight of the two places that compute the loss: training and validation give the same scenes the same number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.compare_calls import COSTS
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes
from ris_fast.training.validation import validate

DRIFTS = 0.1  # of the gap
EXACT, LOW_PRECISION = 1e-4, 0.05  # relative, of a loss


def same_loss(context: PreflightContext) -> Iterator[Finding]:
    """A few scenes in evaluation mode through the step and through `validate`; the step's update is undone with the
    rest.

    What torch compiled runs as written here: the two are compared elsewhere, and evaluation mode would be compiled
        anew.
    """
    scenes = context.scenes
    context.step.telemetry.enabled = False
    with context.small():
        score = validate(context.model, context.step.predict, context.loss, [scenes])
        own = _as_written(context)
        context.model.eval()
        with _versions_met(context) as met:
            trained = float(context.step([scenes], context.trainer.plan.planned).loss)
    if len(set(met)) > 1:
        context.note = "not compared: the step changes the weights before its forward pass, as SAM does"
        return
    if not (math.isfinite(trained) and math.isfinite(score.loss)):
        context.note = "not checked: the loss is not finite"
    gap = abs(trained - score.loss) / max(abs(trained), abs(score.loss), 1e-30)
    allowed = context.tolerance(EXACT, LOW_PRECISION)
    # A gap that rounding may make, of what evaluates in the network's place: the network itself has none.
    engine = gap <= LOW_PRECISION and own is not None and abs(trained - own) <= allowed * max(abs(trained), abs(own))
    if engine and allowed < gap <= COSTS:
        context.note = (
            f"what evaluates in the network's place changes {gap:.2g} of the loss, the network itself nothing"
        )
        return
    if math.isfinite(trained) and math.isfinite(score.loss) and gap > allowed and not _drifts(context, gap):
        yield Finding(
            "losses_differ",
            f"the same {scenes.batch} scenes in evaluation mode have a loss of {trained:.6g} in the training "
            f"step and {score.loss:.6g} in validation.",
            certain=not engine,
        )


def _as_written(context: PreflightContext) -> float | None:
    """The loss that validation has of the network itself, where the step calls something else."""
    if not context.compiled:
        return None
    with context.as_written():
        return validate(context.model, context.step.predict, context.loss, [context.scenes]).loss


@contextmanager
def _versions_met(context: PreflightContext) -> Iterator[list[int]]:
    """How often the weights have been written to: now, and at each forward pass of the step meanwhile."""

    def written() -> int:
        return sum(parameter._version for parameter in context.parameters.values())

    met, predict = [written()], context.step.predict

    def noted(scenes: Scenes) -> Prediction:
        met.append(written())
        return predict(scenes)

    own = vars(context.step).get("predict")  # where somebody has put another in its place
    context.step.predict = noted
    try:
        yield met
    finally:
        del context.step.predict
        if own is not None:
            context.step.predict = own


def _drifts(context: PreflightContext, gap: float) -> bool:
    """Whether two calls in a row differ as much: the loss follows the number of the call then, not who computes it."""
    context.model.eval()
    one, other = (
        float(context.loss(context.step.predict(context.scenes), context.scenes)[0].detach()) for _ in range(2)
    )
    return abs(one - other) > DRIFTS * gap * abs(one)


CHECKS = {"training and validation compute the same loss": same_loss}
