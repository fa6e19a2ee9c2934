"""What a run reports at its start and at its end, as one mapping of plain values each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ris_fast.config.user_code import short_reference

if TYPE_CHECKING:  # a report reads LEARNED without torch
    from ris_fast.config.schema import Config
    from ris_fast.data.source import SceneSource
    from ris_fast.training.state import RunState

LEARNED = 0.95  # a network has learned when it is below this share of its own start and of every baseline that is shown


def goal(state: RunState, baselines: Mapping[str, float], *, from_weights: bool) -> float:
    """Below this validation NMSE a network has learned: clearly under its own start, every constant answer, and what
    its features say without it. A start from learned weights (training.init) has to be beaten at all, not clearly."""
    start = state.initial_nmse / (LEARNED if from_weights else 1.0)
    return LEARNED * min(start, *baselines.values())


def summary(
    state: RunState,
    baselines: Mapping[str, float],
    verdict: str | None = None,
    findings: Sequence[str] = (),
    *,
    from_weights: bool,
    **facts: Any,
) -> dict[str, Any]:
    """The end of a run; `verdict` None: learned or stalled, by the figures. `facts` are passed on."""
    best = state.best_nmse if math.isfinite(state.best_nmse) else None
    learned = best is not None and best < goal(state, baselines, from_weights=from_weights)
    return {
        "verdict": verdict or ("learned" if learned else "stalled"),
        "optimizer_steps": state.step,
        "scenes_seen": state.scenes_seen,
        "scenes_per_s": state.scenes_seen / max(state.seconds, 1e-9),
        "seconds": state.seconds,
        "epochs": state.epoch,
        "train_loss": state.train_loss,
        "initial_val_nmse": state.initial_nmse,
        "val_nmse_raw": state.val_nmse_raw,
        "val_nmse_ema": state.val_nmse_ema,
        "best_val_nmse": best,
        "best_weights": state.best_weights,
        "baselines": baselines,
        "findings": list(findings),
        **facts,
    }


def info(config: Config, source: SceneSource, **facts: Any) -> dict[str, Any]:
    """The start of a run: its settings and its data; `facts` are passed on."""
    training = config.training
    return {
        "preset": config.preset,
        "model": short_reference(config.model.name),
        "precision": training.precision,
        "source": source.describe(),
        "blend": config.loss.beta,
        "loaded": config.loss.loading > 0.0 or config.loss.shrink > 0.0,  # then no term of the loss is the plain NMSE
        "fresh": source.name == "simulate" and not config.data.fixed,
        "train_scenes": source.size("train"),
        "batch_size": training.batch_size,
        "accumulate": training.accumulate,
        "epochs": training.epochs,
        "max_seconds": training.max_seconds,
        "warmup": config.optimizer.warmup,
        "from_weights": bool(training.init),
        "frozen_on_purpose": config.health.frozen,
        **facts,
    }
