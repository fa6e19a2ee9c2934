"""Input features that carry the sensing operator: what a weighted pursuit says of each atom, in plain numbers.

Every feature is free of units and of the arbitrary phase and scale of a scene, so that a network need learn neither.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T tangents of an atom, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ris_fast.config import Task
from ris_fast.models.pursuit import TANGENTS, Atoms, Normal, Pursuit, normal_equations

TINY = 1e-12


class Features(NamedTuple):
    """What the trainable part sees, and the columns that its factors are made of."""

    inputs: Tensor               # (B, F)        numbers of order one
    basis: Tensor                # (B, N, 2KT)   s_k times atom and tangents, planar, atoms of total power 1


class PursuitFeatures(nn.Module):
    """Snapshots, channel and codes -> `Features`. Holds no parameter; float32 whatever the autocast.

    Args: task: the array and the ranges of the scenes; stages: atoms to find.
    """

    def __init__(self, task: Task, stages: int) -> None:
        super().__init__()
        self.pursuit = Pursuit(task, stages)
        self.atoms = stages
        self.width = stages * (3 + 1 + 1 + 3 * TANGENTS + 2 * stages) + 2

    @torch.no_grad()
    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Features:
        with torch.autocast(snapshots.device.type, enabled=False):
            normal = normal_equations(snapshots.float(), channel.float(), codes.float(), snr_db.float())
            found = self.pursuit(normal)
            return Features(self._inputs(normal, found, snr_db), self._basis(found))

    def _inputs(self, normal: Normal, found: Atoms, snr_db: Tensor) -> Tensor:
        """(B, F): per atom its place, share of power, evidence, Fisher information, scores and couplings; the scene."""
        batch, noise = normal.noise.shape[0], normal.noise[:, None]
        s, power = found.amplitude, found.amplitude.square().sum(1).clamp_min(TINY)
        middle, half = (self.pursuit.high + self.pursuit.low) / 2, (self.pursuit.high - self.pursuit.low) / 2
        place = (found.place - middle) / half.clamp_min(TINY)
        share = (power / power.sum(1, keepdim=True)).clamp_min(1e-6).log() / 4
        evidence = (found.gains.clamp_min(0) / noise).log1p() / 4 - 1
        information = power[..., None] * torch.diagonal(found.gram[:, 0].flatten(1, 2).flatten(2), dim1=1, dim2=2) \
            .unflatten(1, (self.atoms, TANGENTS)).clamp_min(TINY) / noise[..., None]
        scores = _conj_times(s[..., None], found.left) / (noise[:, None, :, None] * information[:, None].sqrt())
        phase = s / power.sqrt()[:, None]
        overlap = _conj_times(phase[..., None], _times(found.gram[:, :, :, 0, :, 0], phase[:, :, None]))
        left_over = (normal.energy - found.gains.sum(1)).clamp_min(TINY) / (normal.energy * normal.noise)
        parts = [place, share, evidence, information.log1p() / 4 - 1, scores.clamp(-4, 4) / 2, overlap,
                 snr_db.float() / 10 - 1, left_over.log().clamp(-4, 4)]
        return torch.cat([part.reshape(batch, -1) for part in parts], dim=1)

    def _basis(self, found: Atoms) -> Tensor:
        """Tangents times amplitude, scaled so that the amplitudes of a scene have norm one."""
        s = found.amplitude / found.amplitude.square().sum((1, 2), keepdim=True).clamp_min(TINY).sqrt()
        real, imag = s.repeat_interleave(TANGENTS, dim=2)[:, None].unbind(2)
        left, right = found.tangents.chunk(2, dim=2)
        return torch.cat((left * real - right * imag, left * imag + right * real), dim=2)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Complex product of arrays whose axis 1 holds the real and the imaginary part."""
    return torch.stack((a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0]), dim=1)


def _conj_times(a: Tensor, b: Tensor) -> Tensor:
    """conj(a) b, likewise."""
    return torch.stack((a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]), dim=1)
