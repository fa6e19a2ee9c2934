"""What a checkpoint remembers of its run, and how a run continues from one: the same scenes, or a clear refusal."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ris_fast.config.load import plain_settings
from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.config.schema import Training as TrainingConfig
from ris_fast.config.user_code import OBJECT, is_reference, load_reference, short_reference, source_hash
from ris_fast.data.order import ORDER
from ris_fast.data.source import SceneSource
from ris_fast.files import BEST, CHECKPOINTS
from ris_fast.old_names import current_setting
from ris_fast.training.checkpoint import (
    CheckpointError,
    better_weights,
    checkpoint_of,
    load_checkpoint,
    load_weights,
    read_whole,
)
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.ranks.group import ALONE, Ranks
from ris_fast.training.schedule import Plan
from ris_fast.training.state import EpochMeters, RunState, trainable

CHANGED = "the source of "  # beginning of a note
MOMENTS = ("step.", "exp_avg.", "exp_avg_sq.")  # beginnings of their names among the optimizer's tensors


def identity(config: Config, source: SceneSource) -> dict[str, Any]:
    """Settings without which a run's earlier scores and its scenes would not be its own: 'section.key' -> plain
    value."""
    settings = {f"task.{key}": value for key, value in config.task.identity().items()}
    settings |= {
        "model.name": short_reference(config.model.name),
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


def run_facts(
    config: Config, source: SceneSource, state: RunState, planned_steps: int, model: nn.Module, ranks: int = 1
) -> dict[str, Any]:
    """What a checkpoint remembers of its run besides tensors: its progress, and the settings it depends on.

    Args: ranks: how many train it.
    """
    training = config.training
    return {
        "state": state.to_json(),
        "planned_steps": planned_steps,
        "model": short_reference(config.model.name),
        "sources": sources(config),
        "identity": identity(config, source),
        "step_scenes": training.batch_size * training.accumulate * ranks,
        "batch_size": training.batch_size,
        "accumulate": training.accumulate,
        "ranks": ranks,
        "precision": training.precision,
        "order": ORDER,
        "parameters": trainable(model),
        "preset": config.preset,
        "settings": plain_settings(config),
    }


def sources(config: Config) -> dict[str, str]:
    """SHA-256 of each file of the user's own code that the settings name, by setting."""
    named = {"model.name": config.model.name, "loss.own": config.loss.own}
    return {
        key: source_hash(load_reference(key, text, "code", lambda found: True, sole=inspect.isclass))
        for key, text in named.items()
        if is_reference(text) and not text.startswith(OBJECT)
    }


def changed_sources(manifest: Mapping[str, Any], config: Config) -> list[str]:
    """What a person should know of code of the user's own that is another one than the checkpoint was trained with."""
    before = manifest.get("sources", {})
    return [
        f"{CHANGED}{key} = '{short_reference(getattr(getattr(config, section), name))}' has changed since the"
        " checkpoint was written: its weights may mean something else in it"
        for key, now in sources(config).items()
        if before.get(key, now) != now
        for section, name in [key.split(".")]
    ]


def tensors_of(model: nn.Module, optimizer: FusedAdamW, *, moments: bool) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, as views: the weights, their averages once there are any, the optimizer's counters and,
    if asked for, its moments."""
    saved = optimizer.checkpoint_tensors()["optimizer"]
    averages = {key.removeprefix("ema."): value for key, value in saved.items() if key.startswith("ema.")}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = model.state_dict(keep_vars=True)
    groups = {"model": weights, "optimizer": {"counters": saved["counters"]}}
    if moments:
        groups["optimizer"] |= {key: value for key, value in saved.items() if key.startswith(MOMENTS)}
    if averages:
        groups["ema"] = {key: averages.get(names.get(id(value), ""), value) for key, value in weights.items()}
    return groups


class Found(NamedTuple):
    """A checkpoint to continue from: its tensors on the host, its manifest, where its run stood, the length of its
    schedule in steps, and what a person should read of it. Of plain values, so that one rank can send it to others."""

    path: str
    groups: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any]
    state: RunState
    planned_steps: int
    notes: list[str]

    def plan(self, training: TrainingConfig, epoch_steps: int, left: int) -> Plan:
        """The schedule from here on; one that time limits starts from the length that it had.

        Args: left: steps of the epoch under way that are still to be made.
        """
        rest = (training.epochs - self.state.epoch - 1) * epoch_steps + left
        planned = self.planned_steps if training.max_seconds else 0
        plan = Plan(self.state.step + max(0, rest), training.max_seconds, planned)
        if training.max_seconds != self.manifest.get("settings", {}).get("training.max_seconds", training.max_seconds):
            plan.update(self.state.step, self.state.seconds)  # at the rate of the steps so far
        return plan

    def meters(self, terms: list[str], device: torch.device) -> EpochMeters | None:
        """What was measured of the epoch under way; None where there is none, or where the loss has other terms now."""
        values, sums = self.manifest.get("meters"), self.groups.get("meters", {}).get("sums")
        if values is None or sums is None or not self.state.epoch_step or set(values["names"]) - set(terms):
            return None
        return EpochMeters.from_json(values, sums, device)


def find(run: Path, name: str, config: Config, source: SceneSource) -> Found:
    """What checkpoint NAME of the folder `run` holds.

    Raises: CheckpointError for a file that is not whole; ConfigError where settings changed so that the run would not
    be the same one.
    """
    folder = run / CHECKPOINTS
    groups, manifest = load_checkpoint(folder, name)
    _same_run(manifest, run, config, source)
    path = folder / f"{name}.safetensors"
    state = _state_of(manifest, path)
    if state.epoch_step and not state.epoch_scenes:  # earlier versions counted steps only
        product = manifest.get("step_scenes", config.training.batch_size * config.training.accumulate)
        state.epoch_scenes = min(state.epoch_step * product, source.size("train"))
    notes = [manifest["note"]] if "note" in manifest else []
    if state.epoch_step and manifest.get("order") != ORDER:
        notes.append(
            f"{path} is of an earlier version, within epoch {state.epoch + 1}: what is left of that epoch comes in"
            " another order, so that some of its scenes are seen twice and some not at all; later epochs are whole"
        )
    if state.step and not any(key.startswith(MOMENTS) for key in groups["optimizer"]):
        notes.append(f"{path} has no moments: AdamW starts them anew; learning rate, counts and averages go on")
    if name != BEST:
        notes += _take_best(state, folder, manifest)
    return Found(str(path), groups, manifest, state, manifest["planned_steps"], notes)


def restore(found: Found, model: nn.Module, optimizer: FusedAdamW) -> None:
    """Gives model and optimizer what was found. Raises: CheckpointError where it fits no such network."""
    groups = found.groups
    load_weights(model, groups["model"], found.path)
    saved = groups["optimizer"]
    if "ema" in groups and not any(key.startswith("ema.") for key in saved):  # earlier versions wrote averages twice
        saved |= {f"ema.{key}": groups["ema"][key] for key in optimizer.tensor_names}
    optimizer.load_checkpoint_tensors({"optimizer": saved})


def kept_product(found: Found, training: TrainingConfig, ranks: int) -> int | None:
    """The accumulation with which this number of ranks makes steps of as many scenes as the run's so far; None where
    nothing has to change, or where no accumulation does it, or where somebody changed batch size or accumulation."""
    before = found.manifest
    if before.get("ranks", 1) == ranks or "step_scenes" not in before:
        return None
    if (before.get("batch_size"), before.get("accumulate")) not in (
        (training.batch_size, training.accumulate),
        (None, None),  # earlier versions, of one rank, kept the product only
    ):
        return None
    accumulate, rest = divmod(before["step_scenes"], training.batch_size * ranks)
    return accumulate if accumulate and not rest else None


def start_from(place: str, model: nn.Module, ranks: Ranks = ALONE) -> list[str]:
    """Gives a new run's model the better weights of another run's best checkpoint, or of the checkpoint that is named,
    which rank 0 reads; returns what a person should read of them."""

    def read() -> tuple[Path, str, tuple[dict[str, Tensor], str, dict[str, Any]]]:
        folder, name = checkpoint_of(place)
        return folder, name, better_weights(folder / CHECKPOINTS, name)

    folder, name, (weights, kind, manifest) = ranks.by_first(read)
    load_weights(model, weights, f"training.init = {place}")
    return [
        f"starts from the {kind} weights of epoch {manifest['state']['epoch']} of {folder}, checkpoint '{name}'",
        *([manifest["note"]] if "note" in manifest else []),
    ]


def _state_of(manifest: Mapping[str, Any], path: Path) -> RunState:
    try:
        return RunState.from_json(manifest["state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: its record of the run's progress cannot be read ({error}). "
            "Use another checkpoint of this run."
        ) from error


def _same_run(manifest: Mapping[str, Any], run: Path, config: Config, source: SceneSource) -> None:
    now = identity(config, source)
    before = _known(manifest) if "identity" in manifest else now
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"--resume {run}: {'; '.join(changed[:3])}. The scores and scenes so far would not be those "
            "of such a run. Leave it as it was, or start a new run."
        )


def _known(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a manifest; of a run of the time when there was one seed, weights and scenes had that."""
    known = dict(manifest.get("identity") or {})
    known = {key: current_setting(key, value) for key, value in known.items()}
    younger = {f"task.{key}": value for key, value in Task().identity().items()}  # which the run did not have yet
    return {"data.seed": known.get("training.seed"), **younger, **known}


def _take_best(state: RunState, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Sets the best score so far to that of the best checkpoint itself, and returns what is to be said of it.

    What the last checkpoint remembers may be older (a kill before the next one, a last checkpoint put back) or of
    weights that are lost; a worse epoch must not replace the first, and nothing can replace the second.
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
        state.epochs_since_best = state.epoch - its.epoch  # below zero until the run is there again
        return [
            f"the best checkpoint, of epoch {its.epoch}, scores {its.best_nmse:.4g}: only a better epoch replaces it"
        ]
    return []


def finished(training: TrainingConfig, state: RunState, *, by_time: bool = True) -> str:
    """Why a run has nothing left to do, and what would give it more; empty where it has.

    Args: by_time: also because its time is used up, which is by the clock of one process.
    """
    if state.epoch >= training.epochs:
        return f"{state.epoch} epochs are done and {training.epochs} are asked for; give a larger --epochs to train on"
    if by_time and 0 < training.max_seconds <= state.seconds:
        return (
            f"{state.seconds:.0f} seconds are used and {training.max_seconds:g} were given; give a larger --max-seconds"
            " to train on"
        )
    if 0 < training.patience <= state.epochs_since_best:
        return f"{state.epochs_since_best} epochs brought nothing better; set a larger training.patience to train on"
    return ""
