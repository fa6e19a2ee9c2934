"""What a run says of itself at its start and at its end, as one mapping of plain values each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ris_fast.training.trainer import Trainer

LEARNED = 0.95  # a network has learned when it is below this share of its own start and of every baseline that is shown


def goal(trainer: Trainer) -> float:
    """Below this validation NMSE a network has learned: clearly under its own start, every constant answer, and what
    its features say without it. A start from learned weights (training.init) has to be beaten at all, not clearly."""
    start = trainer.state.initial_nmse / (LEARNED if trainer.config.training.init else 1.0)
    return LEARNED * min(start, *trainer.baselines.values())


def summary(trainer: Trainer, verdict: str | None, findings: list[str]) -> dict[str, Any]:
    """The end of a run; `verdict` None: learned or stalled, by the figures."""
    state = trainer.state
    best = state.best_nmse if math.isfinite(state.best_nmse) else None
    return {
        "verdict": verdict or ("learned" if best is not None and best < goal(trainer) else "stalled"),
        "parameters": trainer.parameters,
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
        "baselines": trainer.baselines,
        "findings": findings,
        "skipped_steps": trainer.counters["skipped"],
    }


def info(trainer: Trainer) -> dict[str, Any]:
    """The start of a run."""
    training = trainer.config.training
    return {
        "preset": trainer.config.preset,
        "model": trainer.config.model.name,
        "parameters": trainer.parameters,
        "device": str(trainer.device),
        "precision": training.precision,
        "source": trainer.source.describe(),
        "notes": [*trainer.source.notes, *trainer.notes],
        "blend": trainer.config.loss.beta,
        "fresh": trainer.source.name == "simulate" and not trainer.config.data.fixed,
        "train_scenes": trainer.source.size("train"),
        "batch_size": training.batch_size,
        "accumulate": training.accumulate,
        "epochs": training.epochs,
        "max_seconds": training.max_seconds,
        "planned_steps": trainer.plan.planned,
        "baselines": trainer.baselines,
        "compile": trainer.compile_note,
        "epoch_steps": trainer.epoch_steps,
        "ema_decay": trainer.optimizer.ema_decay,
        "optimizer_backend": trainer.optimizer.backend,
    }
