"""Candidate sources from the atoms of the pursuit, without a network: where a search by likelihood starts.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.localize.sources import Sources
from ris_fast.models.features import PursuitFeatures
from ris_fast.models.simultaneous_pursuit import SimultaneousFeatures, features_for


@torch.no_grad()
def pursuit_sources(
    task: Task, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor, atoms: int
) -> Sources:
    """The `atoms` sources that the pursuit finds in each scene, as many in every scene, strongest first.

    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes ([B,] L, N, 2), snr_db (B,).
    Returns: powers are shares of a scene that sum to one. Float32 inside, whatever is given.
    """
    module = _features(task, atoms, snapshots.device)
    features = module(*(each.float() for each in (snapshots, channel, codes, snr_db)))
    low, high = module.low, module.high
    position = features.inputs[:, : 3 * atoms].unflatten(1, (atoms, 3)) * ((high - low) / 2) + (high + low) / 2
    power = module.sources(features).square().sum((1, 3))
    total = power.sum(1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    count = torch.full((len(snapshots),), atoms, device=power.device)
    return Sources.of_cosines(position.to(snapshots.dtype), (power / total).to(snapshots.dtype), count)


@lru_cache(maxsize=8)
def _features(task: Task, atoms: int, device: torch.device) -> PursuitFeatures | SimultaneousFeatures:
    return features_for(task, atoms).to(device)
