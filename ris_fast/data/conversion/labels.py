"""Whether the covariances of files are those of the positions beside them, and what was mistaken where they are not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.errors import DataError
from ris_fast.data.npz_load import Facts, clearly_apart, find_offset_of, target_columns
from ris_fast.physics.array import RISArray
from ris_fast.physics.real_complex import conj


def refuse_unrelated(where: Path, task: Task, offset: tuple[float, float], chunk: dict[str, Tensor]) -> None:
    """Raises: DataError where most covariances of the first scenes belong to other sources than those beside them, and
    no offset of the array explains it; it names the change after which they fit, if one of the usual mistakes was made.
    """
    array = RISArray.of(task)
    apart, scenes = _apart(array, offset, chunk), len(chunk["K"])
    if 2 * apart <= scenes:
        return
    fits = [name for name, other in _mistakes(chunk).items() if not _apart(array, find_offset_of(array, other), other)]
    raise DataError(
        where,
        "R",
        f"{apart} of {scenes} covariances of other sources than those beside them",
        "R = sum over the scene's sources of p a a^H",
        f"They fit with {fits[0]}: correct that."
        if fits
        else "Look at the order of scenes, at the units and directions of the angles, at the order of elements and at"
        " the task's array; without positions, covariances are converted as they are.",
    )


def _apart(array: RISArray, offset: tuple[float, float], chunk: dict[str, Tensor]) -> int:
    facts = Facts(False, offset)
    target_columns(array, facts, chunk)
    return clearly_apart(torch.cat(facts.fits))


def _mistakes(chunk: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What is often mistaken -> the chunk without it."""
    azimuth, elevation, range_m = chunk["ptr"].chunk(3, dim=1)
    exchanged, mirrored, upside_down = (
        {**chunk, "ptr": torch.cat([*angles, range_m], 1)}
        for angles in ((elevation, azimuth), (-azimuth, elevation), (azimuth, -elevation))
    )
    return {
        "the covariance conjugated": {**chunk, "R": conj(chunk["R"])},
        "azimuth and elevation exchanged": exchanged,
        "the azimuth's sign changed": mirrored,
        "the elevation's sign changed": upside_down,
    }
