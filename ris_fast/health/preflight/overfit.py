"""Preflight of learning itself: a network that cannot memorise a few scenes will not learn from many."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.training.validation import scene_nmse

STEPS, GOAL = 60, 0.05
FEWEST, SECONDS = 6, 0.5  # steps at least, and after that time at most; the note says how far it came


def overfit_batch(context: PreflightContext) -> Iterator[Finding]:
    """A few scenes again and again through the run's own step: no finding of its own, but a note that says how far it
    came."""
    began, taken = time.perf_counter(), 0
    context.step.telemetry.enabled = False  # undone with everything else
    start = score = _nmse(context)
    for taken in range(1, STEPS + 1):
        torch.manual_seed(taken)
        context.model.train()
        context.step([context.scenes], STEPS)
        late = taken >= FEWEST and time.perf_counter() - began > SECONDS
        if taken % 10 == 0 or late:
            score = _nmse(context)
        if score < GOAL or late:
            break
    context.reached = score < GOAL
    context.note = f"NMSE of {context.scenes.batch} scenes {start:.3f} -> {score:.3f} in {taken} steps" + (
        ""
        if score < GOAL
        else f"; the goal of {GOAL:g} was not reached in {'the time for it' if taken < STEPS else f'{STEPS} steps'}"
    )
    if not score < start:
        yield from _reason(context, start, score)


def _reason(context: PreflightContext, start: float, score: float) -> Iterator[Finding]:
    """Nothing structural was found and the same scenes are not learned: the step goes the wrong way, or too far."""
    if score > 1.05 * start:
        yield Finding(
            "learning_rate_too_large",
            f"the NMSE of {context.scenes.batch} scenes rises from {start:.3f} to {score:.3f} while the network is "
            "trained on them alone.",
            certain=False,
        )


@torch.no_grad()
def _nmse(context: PreflightContext) -> float:
    context.model.eval()
    return float(scene_nmse(context.step.predict(context.scenes), context.scenes).mean())


CHECKS = {"a few scenes can be memorised": overfit_batch}
