"""What a checkpoint remembers of its run, and how a run goes on from one: the same scenes, or a clear refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.source import SceneSource
from ris_fast.training.checkpoint import (
    BEST,
    CHECKPOINTS,
    CheckpointError,
    better_weights,
    checkpoint_of,
    load_checkpoint,
    load_weights,
    read_whole,
    save_checkpoint,
)
from ris_fast.training.state import RunState

if TYPE_CHECKING:
    from ris_fast.training.trainer import Trainer


def identity(config: Config, source: SceneSource) -> dict[str, Any]:
    """Settings without which a run's earlier scores and its scenes would not be its own: 'section.key' -> plain
    value."""
    settings = {f"task.{key}": value for key, value in asdict(config.task).items()}
    settings |= {
        "model.name": config.model.name,
        **{f"model.options.{key}": value for key, value in config.model.options.items()},
    }
    settings |= {
        "training.seed": config.training.seed,
        "data.seed": config.data.seed,
        "data.source": source.name,
        "data.fixed": config.data.fixed,
        "data.train_scenes": source.size("train"),
        "data.val_limit": min(config.data.val_limit, source.size("val")),
    }
    return json.loads(json.dumps(settings))


def save(trainer: Trainer, name: str) -> None:
    """Writes checkpoint NAME into the trainer's folder: weights, optimizer, averaged weights, and where the run
    stands."""
    if trainer.folder is None:
        return
    groups = {"model": trainer.model.state_dict(), **trainer.optimizer.checkpoint_tensors()}
    if trainer.optimizer.ema_decay:
        with trainer.optimizer.ema():
            groups["ema"] = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    training = trainer.config.training
    save_checkpoint(
        trainer.folder / CHECKPOINTS,
        name,
        groups,
        {
            "state": trainer.state.to_json(),
            "planned_steps": trainer.plan.planned,
            "parameters": trainer.parameters,
            "model": trainer.config.model.name,
            "identity": identity(trainer.config, trainer.source),
            "step_scenes": training.batch_size * training.accumulate,
        },
    )


def restore(trainer: Trainer, name: str) -> None:
    """Puts the trainer where checkpoint NAME of its folder was.

    Raises: CheckpointError for a file that is not whole or fits no such network; ConfigError where settings changed so
    that the run would not be the same one.
    """
    folder = Path(trainer.folder or ".") / CHECKPOINTS
    groups, manifest = load_checkpoint(folder, name)
    _same_run(manifest, trainer)
    load_weights(trainer.model, groups.pop("model"), str(folder / f"{name}.safetensors"))
    groups.pop("ema", None)
    trainer.optimizer.load_checkpoint_tensors(groups)
    trainer.state = state = _state_of(manifest, folder / f"{name}.safetensors")
    trainer.notes += [manifest["note"]] if "note" in manifest else []
    if name != BEST:
        trainer.notes += _take_best(state, folder, manifest)
    rest = (trainer.config.training.epochs - state.epoch) * trainer.epoch_steps - state.epoch_step
    trainer.plan = replace(
        trainer.plan,
        epoch_steps=state.step + max(0, rest),
        planned=manifest["planned_steps"] if trainer.config.training.max_seconds else 0,
    )


def start_from(trainer: Trainer, place: str) -> None:
    """Gives a new run the better weights of another run's best checkpoint, or of the checkpoint that is named."""
    folder, name = checkpoint_of(place)
    weights, kind, manifest = better_weights(folder / CHECKPOINTS, name)
    load_weights(trainer.model, weights, f"training.init = {place}")
    trainer.notes += [
        f"starts from the {kind} weights of epoch {manifest['state']['epoch']} of {folder}, checkpoint '{name}'",
        *([manifest["note"]] if "note" in manifest else []),
    ]


def _state_of(manifest: Mapping[str, Any], path: Path) -> RunState:
    try:
        return RunState.from_json(manifest["state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: what it says of where the run stands cannot be read ({error}). "
            "Use another checkpoint of this run."
        ) from error


def _same_run(manifest: Mapping[str, Any], trainer: Trainer) -> None:
    now = identity(trainer.config, trainer.source)
    before = _known(manifest) if "identity" in manifest else now
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"--resume {trainer.folder}: {'; '.join(changed[:3])}. The scores and scenes so far would not be those "
            "of such a run. Leave it as it was, or start a new run."
        )
    size = trainer.config.training.batch_size * trainer.config.training.accumulate
    if manifest["state"]["epoch_step"] and manifest.get("step_scenes", size) != size:
        raise ConfigError(
            f"--resume {trainer.folder}: the run stands within an epoch of steps of {manifest['step_scenes']} scenes, "
            f"and batch size times accumulation is {size} now. Keep the product, {manifest['step_scenes']}, or resume "
            "from a checkpoint at the end of an epoch."
        )


def _known(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a manifest; of a run of the time when there was one seed, weights and scenes had that."""
    known = dict(manifest.get("identity") or {})
    return {"data.seed": known.get("training.seed"), **known}


def _take_best(state: RunState, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Sets the best score so far to that of the best checkpoint itself, and returns what is to be said of it.

    What the last checkpoint remembers may be older (a kill between the two saves, a last checkpoint put back) or of
    weights that are lost; a worse epoch must not replace the first, and nothing can stand for the second.
    """
    path, found = folder / f"{BEST}.safetensors", read_whole(folder, BEST)
    if found is None:
        if not math.isfinite(state.best_nmse):
            return []
        state.best_nmse, state.best_weights, state.epochs_since_best = math.inf, "", 0
        return [
            f"{path} is {'damaged' if path.exists() else 'missing'}: the best weights so far are lost, and the next"
            " epoch's replace them"
        ]
    best = found[1]
    if _known(best) != _known(manifest):
        return []
    its = _state_of(best, path)
    if its.best_nmse != state.best_nmse:
        state.best_nmse, state.best_weights = its.best_nmse, its.best_weights
        state.epochs_since_best = max(0, state.epoch - its.epoch)
        return [
            f"the best checkpoint, of epoch {its.epoch}, scores {its.best_nmse:.4g}: only a better epoch replaces it"
        ]
    return []


def finished(trainer: Trainer) -> str:
    """Why a resumed run has nothing left to do, and what would give it more; empty where it has."""
    training, state = trainer.config.training, trainer.state
    if state.epoch >= training.epochs:
        return f"{state.epoch} epochs are done and {training.epochs} are asked for; give a larger --epochs to train on"
    if 0 < training.max_seconds <= state.seconds:
        return (
            f"{state.seconds:.0f} seconds are used and {training.max_seconds:g} were given; give a larger --max-seconds"
            " to train on"
        )
    if 0 < training.patience <= state.epochs_since_best:
        return f"{state.epochs_since_best} epochs brought nothing better; set a larger training.patience to train on"
    return ""
