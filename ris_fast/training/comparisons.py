"""What the NMSE of a run is set beside: answers that need no network, and the bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ris_fast.config.schema import Task
from ris_fast.data.source import SceneSource
from ris_fast.physics.baselines import baselines, mean_covariance
from ris_fast.physics.mmse_bound import mmse_bound
from ris_fast.physics.scenes import Scenes
from ris_fast.training.compiled_model import Network
from ris_fast.training.validation import classical_baseline

CHUNK = 1000  # scenes at a time
MEAN_OF = 4 * CHUNK  # training scenes


class Comparisons(NamedTuple):
    """NMSE by name; on the scenes that are validated where nothing else is said."""

    baselines: dict[str, float] = {}
    training_baselines: dict[str, float] = {}  # what the network's inputs say of some training scenes
    mmse_bound: float | None = None  # where it is known


def compare(
    model: nn.Module, network: Network, source: SceneSource, validation: Sequence[Scenes], task: Task
) -> Comparisons:
    """Every figure that a run is compared with. Reads training scenes for the mean covariance."""
    indices = torch.arange(min(MEAN_OF, source.size("train"))).split(CHUNK)
    constant = mean_covariance(source.batch("train", index) for index in indices)
    static = task.symbols == "static"
    some = [source.batch("train", indices[0])]
    return Comparisons(
        baselines(constant, validation) | classical_baseline(model, network, validation, constant, static),
        classical_baseline(model, network, some, constant, static),
        _bound(validation, task),
    )


def _bound(validation: Sequence[Scenes], task: Task) -> float | None:
    """None for another task than the standard one, and for few scenes."""
    if task != Task():
        return None
    counts, snr_db = (torch.cat([getattr(each, name) for each in validation]) for name in ("count", "snr_db"))
    return mmse_bound(counts.tolist(), snr_db.tolist())
