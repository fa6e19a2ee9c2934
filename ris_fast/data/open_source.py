"""Opens the scenes that a configuration asks for, and fits its sector to what files hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ris_fast.config.schema import Config
from ris_fast.config.user_code import is_reference, short_reference
from ris_fast.data.data_path import check_data_path, guess_source
from ris_fast.data.dense_shards import open_shards
from ris_fast.data.errors import DataError
from ris_fast.data.geometry import Reach
from ris_fast.data.npz import NpzSource
from ris_fast.data.simulated import SimulatedSource
from ris_fast.data.source import SceneSource
from ris_fast.old_names import current_setting


def open_source(
    config: Config, device: torch.device | str, progress: Callable[[int, int], None] | None = None
) -> SceneSource:
    """The source that config.data asks for.

    Args: progress: called with (scenes read, scenes in all) of one split after the other while files are read and
        checked, which for 100,000 scenes of .npz takes a minute or two. Raises: DataError (exit code 3) where the files
        cannot be used.
    """
    kind = config.data.source
    if kind == "auto":
        kind = guess_source(config.data.path)
    elif kind != "simulate":
        if not config.data.path:
            raise DataError(
                "data.path", "", "nothing", f"a folder, because data.source is '{kind}'", "Give --data DIR."
            )
        check_data_path(Path(config.data.path))
    source: SceneSource
    if kind == "npz":
        source = NpzSource(config, device, progress)
        _refuse_lost_channel(source, config)
        return source
    if kind == "shards":
        source = open_shards(config, device, progress)
        _refuse_lost_channel(source, config)
        return source
    return SimulatedSource(config, device)


def _refuse_lost_channel(source: SceneSource, config: Config) -> None:
    """A network that needs H cannot be trained on H c_l; one that asks for H c_l may be, with a note."""
    inputs = current_setting("model.options.inputs", config.model.options.get("inputs"))
    if is_reference(config.model.name) and not source.channel:
        source.notes.append(
            f"the files have no channel: {short_reference(config.model.name)} is shown H c_l, (B, L, M, 2)"
        )
    elif not source.channel and inputs != "effective_channel":
        raise DataError(
            config.data.path,
            "H_full",
            "no such key, only H = H c_l",
            f"the channel, which model '{config.model.name}' needs: H c_l cannot carry the answer",
            "Generate the shards with H_full. To train on H c_l all the same, as the original did, use --preset "
            "original --set model.options.inputs=effective_channel --set health.mute=inputs_withhold_answer and expect "
            "a validation NMSE near 0.97: the run ends as stalled, with exit code 4.",
        )


def widened_sector(config: Config, reach: tuple[Reach, Reach] | None) -> tuple[Config, list[str]]:
    """The configuration with a sector that holds the sources as they are served, and a note of what that changed.

    A reader that re-expresses positions from another origin moves near sources out of the sector of the files' own, in
    which a pursuit would not look for them. Files that leave the task's sector themselves, and angles that a person
    set, stay.
    """
    wider: dict[str, float] = {}
    for key, name in (("azimuth_deg", "azimuth"), ("elevation_deg", "elevation")) if reach is not None else ():
        limit, origin = getattr(config.task, key), config.provenance.get(f"task.{key}", "default")
        stored, served = (math.degrees(getattr(each, name)) for each in reach)
        if stored <= 1.01 * limit < served and (origin == "default" or origin.startswith("preset ")):
            wider[key] = min(90.0, math.ceil(served))
    if not wider:
        return config, []
    said = " and ".join(f"task.{key} = {value:g}" for key, value in wider.items())
    provenance = {**config.provenance, **{f"task.{key}": "the files" for key in wider}}
    return replace(config, task=replace(config.task, **wider), provenance=provenance), [
        f"from the centre of the array some sources lie outside the files' own sector: {said} from here on"
    ]
