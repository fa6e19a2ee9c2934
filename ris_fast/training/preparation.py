"""What a trainer prepares before its first step: settings that the data and the machine decide, and compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Config, ConfigError
from ris_fast.data.open_source import widened_sector
from ris_fast.data.source import SceneSource
from ris_fast.training.compiled_model import Network, compile_now
from ris_fast.training.loss import CovarianceLoss, served_by
from ris_fast.training.precision import choose_precision
from ris_fast.training.ranks.group import Ranks
from ris_fast.training.resume import Found, kept_product
from ris_fast.training.step import Step


def served(config: Config, source: SceneSource, *, resumed: bool) -> Config:
    """The configuration with what the data make of it; a resumed run keeps the sector it began with."""
    weights, notes = served_by(config.loss, source.lacks)
    wider, more = (config, []) if resumed else widened_sector(config, source.reach)
    source.notes += notes + more
    return replace(wider, loss=weights)


def shared_out(config: Config, source: SceneSource, found: Found | None, ranks: Ranks) -> tuple[Config, list[str]]:
    """The configuration for this number of ranks, and what a person should read of it.

    A resumed run keeps the number of scenes in a step where only the number of ranks has changed.
    Raises: ConfigError for more ranks than scenes.
    """
    if source.size("train") < ranks.size:
        raise ConfigError(
            f"an epoch has {source.size('train'):,} scenes, fewer than the {ranks.size} ranks. Start fewer ranks, or"
            " set a larger data.train_scenes."
        )
    notes = []
    accumulate = None if found is None else kept_product(found, config.training, ranks.size)
    if found is not None and accumulate is not None and accumulate != config.training.accumulate:
        config = _set(config, f"resumed with {ranks.size} ranks", accumulate=accumulate)
        notes.append(
            f"training.accumulate = {accumulate} keeps {found.manifest['step_scenes']:,} scenes a step with"
            f" {ranks.size} rank{'s' * (ranks.size > 1)}"
        )
    training, scenes = config.training, source.size("train")
    product = "training.batch_size times training.accumulate" + (" times the ranks" if not ranks.alone else "")
    if (group := training.batch_size * training.accumulate * ranks.size) > scenes:
        notes.append(f"{product} is {group:,}, and an epoch has {scenes:,} scenes: each step takes all of them")
    return config, notes


def with_precision(
    config: Config, found: Found | None, model: nn.Module, loss: CovarianceLoss, source: SceneSource, ranks: Ranks
) -> tuple[Config, list[str]]:
    """The configuration with the precision that the run began in, or else the one that pays where rank 0 runs; and
    why."""
    precision = None if found is None else found.manifest.get("precision")
    notes = []
    if precision is None:
        precision, why = ranks.by_first(lambda: choose_precision(model, loss, source, source.device))
        notes.append(why)
    return _set(config, "precision auto", precision=precision), notes


def _set(config: Config, origin: str, **values: Any) -> Config:
    """Settings of [training], and where they came from."""
    origins = {**config.provenance, **{f"training.{key}": origin for key in values}}
    return replace(config, training=replace(config.training, **values), provenance=origins)


def compile_step(network: Network, step: Step, source: SceneSource, model: nn.Module, ranks: Ranks) -> str | None:
    """Compiles before the clock of the run starts, on a batch that trains nothing. Returns what is to be said of it,
    None where there is nothing to compile, or preflight has done so."""
    if step.network is not network or not network.compiled or network.ready:
        return None
    size = step.config.training.batch_size
    if source.size("train") < size * ranks.size:
        return f"eager: no batch reaches {size * ranks.size} scenes, so that compiling would not pay"
    scenes = source.batch("train", torch.arange(size, device=source.index_device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(step.loss(step.predict(scenes), scenes)[0], trained, allow_unused=True)

    return compile_now(network, train, step.device)
