"""A run opened for reading: its settings, and the better of the two sets of weights of one checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ris_fast.config.load import load_config, plain_settings
from ris_fast.config.schema import Config, ConfigError
from ris_fast.files import CHECKPOINTS, CONFIG
from ris_fast.training.checkpoint import CheckpointError, better_weights, checkpoint_of, load_weights, read_settings
from ris_fast.training.parts import network_of
from ris_fast.training.resume import CHANGED, changed_sources


@dataclass(frozen=True)
class OpenedRun:
    """`checkpoint` is its name, "best" or "last"; `kind` of its weights is "raw" or "ema"."""

    folder: Path
    config: Config
    checkpoint: str
    weights: dict[str, Tensor]
    kind: str
    epoch: int
    notes: tuple[str, ...]

    def network(self, model: nn.Module | None = None) -> nn.Module:
        """The network with these weights, on the CPU. Raises: ConfigError, CheckpointError where they do not fit.

        Args: model: the network, of a run whose network was handed to `Trainer` as an object.
        """
        model = network_of(self.config, model)
        try:
            load_weights(model, self.weights, str(self.folder))
        except CheckpointError as error:
            changed = [note for note in self.notes if note.startswith(CHANGED)]
            raise CheckpointError(". ".join((*changed, str(error)))) from error
        return model.eval()

    def nonfinite_weights(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity."""
        return [name for name, each in self.weights.items() if each.is_floating_point() and not each.isfinite().all()]


def open_run(path: str | Path) -> OpenedRun:
    """Reads the settings of a run and one checkpoint: the best one of a run folder, or the one that `path` names.

    Raises: ConfigError where there is no run, CheckpointError for a checkpoint that is missing or damaged.
    """
    path = Path(path)
    folder, name = checkpoint_of(path)
    if (folder / CONFIG).is_file():
        config = run_config(folder)
    elif (trained := read_settings(folder / CHECKPOINTS, name)) is not None:  # a Trainer in somebody's own program
        config = load_config(None, trained[0], (), trained[1])
    else:
        raise ConfigError(f"{path} is not a run folder: there is no {CONFIG}. Give the folder that train printed.")
    weights, kind, manifest = better_weights(folder / CHECKPOINTS, name)
    notes = [manifest["note"]] if "note" in manifest else []
    notes += changed_settings(folder, name, config, ("task.", "model.", "data."))
    with suppress(ConfigError):  # code that is not there: `network` says so where it is wanted
        notes += changed_sources(manifest, config)
    return OpenedRun(folder, config, name, weights, kind, manifest["state"]["epoch"], tuple(notes))


def run_config(folder: Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None) -> Config:
    """The settings in a run's config.toml, with --set and flags on top.

    A run of the time when one seed drew weights and scenes keeps its scenes.
    """
    config = load_config(folder / CONFIG, None, overrides, flags)
    if "data.seed" in config.provenance:
        return config
    recorded = load_config(folder / CONFIG)
    return replace(config, data=replace(config.data, seed=recorded.training.seed))


def changed_settings(folder: Path, checkpoint: str, config: Config, beginnings: tuple[str, ...] = ("",)) -> list[str]:
    """What a run's config.toml says otherwise than the settings that the checkpoint was trained with.

    Left out: settings that `--set` or a flag gave, and those that the checkpoint's version did not have. Args:
        config: as `run_config` reads it; beginnings: of the names of the settings that matter.
    """
    found = read_settings(folder / CHECKPOINTS, checkpoint)
    trained, now = {} if found is None else found[1], plain_settings(config)
    asked = {key for key, origin in config.provenance.items() if origin in ("--set", "flag")}
    keys = [key for key in trained if key in now or key.startswith("model.options.")]
    keys += [key for key in now if key.startswith("model.options.") and trained and key not in trained]
    return [
        f"{key} was {trained.get(key)!r} in the checkpoint and is {now.get(key)!r} in {CONFIG}"
        for key in keys
        if trained.get(key) != now.get(key) and key not in asked and key.startswith(beginnings)
    ]
