"""Candidate sources from the atoms of the pursuit, without a network: where a search by likelihood starts.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.localize.sources import Sources
from ris_fast.models.features import PursuitFeatures
from ris_fast.models.simultaneous_pursuit import SimultaneousFeatures, features_for


@torch.no_grad()
def pursuit_sources(
    task: Task,
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    atoms: int = 0,
    count: Tensor | Literal["order"] | None = None,
) -> Sources:
    """The atoms that the pursuit finds in each scene, strongest first.

    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snr_db (B,); atoms: how many it looks for;
            0: one more than the task has sources;
        count: sources a scene, (B,), taken in the order of their worth; "order": as many as the pursuit answers with;
            None: all atoms.
    Returns: a row for each atom, or for each source that the task can have where `count` is given; powers are shares of
        a scene that sum to one. Float32 inside, whatever is given.
    """
    module = _features(task, atoms or task.max_sources + 1, snapshots.device)
    features = module(*(each.float() for each in (snapshots, channel, codes, snr_db)))
    low, high, atoms = module.low, module.high, module.atoms
    position = features.inputs[:, : 3 * atoms].unflatten(1, (atoms, 3)) * ((high - low) / 2) + (high + low) / 2
    most = None if count is None else task.max_sources
    if count is None:
        count = torch.full((len(snapshots),), atoms, device=position.device)
    elif isinstance(count, str):
        count = module.order(features)
    kept = torch.arange(atoms, device=position.device) < count[:, None]
    power = module.atom_columns(features).square().sum((1, 3)) * kept
    total = power.sum(1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    found = Sources.of_cosines(position.to(snapshots.dtype), (power / total).to(snapshots.dtype), count)
    return found if most is None else Sources(*(each[:, :most] for each in found[:4]), found.count)


@lru_cache(maxsize=8)
def _features(task: Task, atoms: int, device: torch.device) -> PursuitFeatures | SimultaneousFeatures:
    return features_for(task, atoms).to(device)
