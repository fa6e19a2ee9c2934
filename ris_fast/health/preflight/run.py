"""Runs every check before the first step, each by itself and timed, and leaves the trainer bit for bit as it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

from ris_fast.health.finding import Finding
from ris_fast.health.preflight import (
    calls,
    dependent,
    distributions,
    drift,
    gradient,
    information,
    inputs,
    inside,
    kernels,
    labels,
    loss,
    modes,
    network,
    norms,
    one_step,
    order,
    overfit,
    own_terms,
    padding,
    parameters,
    preference,
    reach,
    recomputed,
    rereads,
    scene_gradients,
    scene_parts,
    scene_weights,
    scenes,
    schedule,
    several_steps,
    targets,
    terms,
    truth,
    unread,
    validation,
)
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.restore import TensorCopies, preserve_state, term_of_one_state
from ris_fast.training.footprint import is_memory
from ris_fast.training.trainer import Trainer

Check = Callable[[PreflightContext], Iterator[Finding]]
SMALL_BATCH = {
    **targets.CHECKS,
    **rereads.CHECKS,
    **scenes.CHECKS,
    **dependent.CHECKS,
    **scene_parts.CHECKS,
    **labels.CHECKS,
    **distributions.CHECKS,
    **order.CHECKS,
    **parameters.CHECKS,
    **loss.CHECKS,
    **truth.CHECKS,
    **own_terms.CHECKS,
    **preference.CHECKS,
    **calls.SMALL_BATCH,
    **modes.CHECKS,
    **network.CHECKS,
    **unread.CHECKS,
    **inside.CHECKS,
    **norms.CHECKS,
    **reach.CHECKS,
    **inputs.CHECKS,
    **padding.CHECKS,
    **information.CHECKS,
    **recomputed.CHECKS,
    **drift.CHECKS,
    **gradient.CHECKS,
    **scene_gradients.SMALL_BATCH,
    **scene_weights.CHECKS,
    **terms.CHECKS,
    **kernels.CHECKS,
    **schedule.CHECKS,
}
WHOLE_STEP = {
    **calls.WHOLE_STEP,
    **validation.CHECKS,
    **one_step.CHECKS,
    **scene_gradients.WHOLE_STEP,
    **several_steps.CHECKS,
}
LEARNING = overfit.CHECKS


@dataclass(frozen=True)
class Result:
    """One check: its name, what it found, how long it took, what it measured, why it could not run, and whether it
    reached its goal."""

    name: str
    findings: tuple[Finding, ...]
    seconds: float
    note: str = ""
    failed: str = ""
    reached: bool = True

    @property
    def passed(self) -> bool:
        return not self.findings and not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "seconds": self.seconds,
            "note": self.note,
            "failed": self.failed,
            "reached": self.reached,
            "findings": [finding.to_json() for finding in self.findings],
        }


def unknown(results: Sequence[Result]) -> str:
    """How many checks could not run and why the first could not; empty where all ran."""
    failed = [result for result in results if result.failed]
    if not failed:
        return ""
    count = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
    return (
        f"{count} could not run, and nothing is known of what was to be seen there: '{failed[0].name}',"
        f" {failed[0].failed}"
    )


def run_checks(trainer: Trainer, *, progress: Callable[[Result], None] | None = None) -> list[Result]:
    """Every check in turn. One that cannot run because of what another found is noted, not raised."""
    context, numbers, results = PreflightContext(trainer), TensorCopies(trainer), []
    compiling = calls.COMPILING if context.by_torch else {}
    for name, check in {**SMALL_BATCH, **compiling, **WHOLE_STEP, **LEARNING}.items():
        if name in LEARNING and any(result.findings for result in results):
            continue
        result = _run(context, numbers, name, check, small=name in SMALL_BATCH or name in LEARNING)
        results.append(result)
        if name in compiling and result.note:
            trainer.compile_note = result.note  # what was compiled stays so
        if progress is not None:
            progress(result)
    return results


def _run(context: PreflightContext, numbers: TensorCopies, name: str, check: Check, *, small: bool) -> Result:
    began, failed = time.perf_counter(), ""
    findings: list[Finding] = []
    context.note, context.reached = "", True
    with preserve_state(context.trainer, numbers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.model.train()
        try:
            with (
                context.small() if small else context.whole(),
                nullcontext() if name in loss.MEMORY else term_of_one_state(context.loss),
            ):
                findings.extend(check(context))
        except Exception as error:
            # A check calls whatever the trainer is made of, which may raise anything: the check ends, not the run.
            # Nothing is hidden by that: why and where it ended is shown, counted, and not called a pass.
            if is_memory(error) or hasattr(error, "exit_code"):  # reported to a person in their own words
                raise
            failed = described(error)
    return Result(name, tuple(findings), time.perf_counter() - began, context.note, failed, context.reached)


def described(error: Exception) -> str:
    """Kind, first line and location of an error."""
    frame = extract_tb(error.__traceback__)[-1]
    message = str(error).splitlines()[0] if str(error) else "no message"
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"
