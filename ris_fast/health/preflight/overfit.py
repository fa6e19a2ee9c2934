"""Preflight of learning itself: a network that cannot memorise a few scenes will not learn from many."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.probe import Subject
from ris_fast.training.validation import scene_nmse

STEPS, GOAL = 60, 0.05
FEWEST, SECONDS = 6, 0.5  # steps at least, and after that time at most; the note says how far it came


def memorise(subject: Subject) -> Iterator[Finding]:
    """A few scenes again and again through the run's own step: no finding of its own, but a note that says how far it
    came."""
    began, taken = time.perf_counter(), 0
    subject.step.telemetry.enabled = False  # undone with everything else
    start = score = _nmse(subject)
    for taken in range(1, STEPS + 1):
        torch.manual_seed(taken)
        subject.model.train()
        subject.step([subject.scenes], STEPS)
        late = taken >= FEWEST and time.perf_counter() - began > SECONDS
        if taken % 10 == 0 or late:
            score = _nmse(subject)
        if score < GOAL or late:
            break
    subject.reached = score < GOAL
    subject.note = f"NMSE of {subject.scenes.batch} scenes {start:.3f} -> {score:.3f} in {taken} steps" + (
        "" if score < GOAL else f"; the goal of {GOAL:g} in {STEPS} was not reached"
    )
    if not score < start:
        yield from _reason(subject, start, score)


def _reason(subject: Subject, start: float, score: float) -> Iterator[Finding]:
    """Nothing structural was found and the same scenes are not learned: the step goes the wrong way, or too far."""
    if score > 1.05 * start:
        yield Finding(
            "learning_rate_too_large",
            f"the NMSE of {subject.scenes.batch} scenes rises from {start:.3f} to {score:.3f} while the network is "
            "trained on them alone.",
            certain=False,
        )


@torch.no_grad()
def _nmse(subject: Subject) -> float:
    subject.model.eval()
    return float(scene_nmse(subject.step.predict(subject.scenes), subject.scenes).mean())


CHECKS = {"a few scenes can be memorised": memorise}
