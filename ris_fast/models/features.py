"""Input features that carry the sensing operator: what a weighted pursuit says of each atom, in plain numbers.

Every feature is free of units and of the arbitrary phase and scale of a scene, so that a network need learn neither.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, F features, R = 4 K + K (K - 1) / 2
    columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit import op as kernel
from ris_fast.kernels.pursuit.reference import evidence_at, rank, width
from ris_fast.kernels.pursuit.search import TANGENTS, Geometry, with_dictionary
from ris_fast.models.constants import Constants
from ris_fast.models.pursuit import geometry_of


class Features(NamedTuple):
    """What the trainable part sees, and the columns that its factors are made of."""

    inputs: Tensor  # (B, F)      numbers of order one
    basis: Tensor  # (B, N, 2R)  planar; atom k: s_k times its T tangents; then how lower orders differ


class SceneFeatures(Constants):
    """What a pursuit needs of a task, as buffers; a subclass maps snapshots, channel and codes to `Features`.

    Holds no parameter; float32 whatever the autocast and the network's dtype. The unit of the snapshots and that of the
    channel do not matter: any finite scale gives the same features. Snapshots (or a channel) of zeros have no answer;
    their features are finite and their basis is zero. NaN stays NaN.

    Args: task: the array and the ranges of the scenes; stages: atoms to find.
    """

    def __init__(self, task: Task, stages: int) -> None:
        super().__init__()
        geometry, self.wavenumber = geometry_of(task)
        for name, value in geometry._asdict().items():
            self.register_buffer(name, value, persistent=False)
        self.atoms, self.rank = stages, rank(stages)
        self._complete()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SceneFeatures:
        """What `.to(device)` and its like go through: on another device the dictionary may be wanted."""
        super()._apply(fn, recurse)
        self._complete()
        return self

    def _complete(self) -> None:
        """Makes the dictionary where it is read, so that no call has to."""
        if self.reads_dictionary():
            self.dictionary = with_dictionary(self.geometry(), self.wavenumber).dictionary

    def reads_dictionary(self) -> bool:
        return True

    def geometry(self) -> Geometry:
        """The constants as the kernel takes them, where this module is."""
        return Geometry(*(getattr(self, name) for name in Geometry._fields))

    def atom_columns(self, features: Features) -> Tensor:
        """All atoms as columns s_k a_k: (B, N, K, 2)."""
        planes = features.basis.unflatten(2, (2, self.rank))[..., : self.atoms * TANGENTS : TANGENTS]
        return planes.transpose(2, 3).contiguous()

    def order(self, features: Features) -> Tensor:
        """How many of the atoms, the first ones, the pursuit answers with: (B,). All of them here."""
        return torch.full(features.inputs.shape[:1], self.atoms, device=features.inputs.device)

    def sources(self, features: Features) -> Tensor:
        """The pursuit's own answer, without a network: columns s_k a_k, zero beyond its order, (B, N, K, 2)."""
        return self.atom_columns(features)


def order_columns(atoms: int) -> Tensor:
    """For each order of a pursuit the mix of its basis that is the order's own estimate: (K, R, K).

    Column j is atom j: that of the highest order, and how it differs at the lower one.
    """
    out, first = torch.zeros(atoms, rank(atoms), atoms), atoms * TANGENTS
    for order in range(1, atoms + 1):
        for atom in range(order):
            out[order - 1, atom * TANGENTS, atom] = 1.0
            if order < atoms:
                out[order - 1, first + order * (order - 1) // 2 + atom, atom] = 1.0
    return out


class PursuitFeatures(SceneFeatures):
    """`Features` of scenes with one symbol a source and scene, by the fused kernel."""

    def __init__(self, task: Task, stages: int) -> None:
        super().__init__(task, stages)
        self.width, self.most = width(stages), min(stages, task.max_sources)
        self.length_of_atom = 2.5 * math.log(2 * task.snapshots * task.bs_antennas)  # 5 numbers, half a logarithm each
        self.register_buffer("order_columns", order_columns(stages), persistent=False)

    def reads_dictionary(self) -> bool:
        return kernel.reads_dictionary(self.grid.device, self.geometry(), self.wavenumber, self.atoms)

    def order(self, features: Features) -> Tensor:
        """By description length: (B,) from 1 to K_max.

        Model: the k that minimises cost_k / sigma^2 + 5 k log(2 L M) / 2, the costs from the features.
        Source: Schwarz, "Estimating the dimension of a model", Annals of Statistics 6 (1978) 461-464.
        """
        first = evidence_at(self.atoms)
        gains = (4.0 * (features.inputs[:, first : first + self.most] + 1.0)).expm1()
        return (gains - self.length_of_atom).cumsum(1).argmax(1) + 1

    def sources(self, features: Features) -> Tensor:
        """The order's own estimate, not the highest one's."""
        columns = self.order_columns[self.order(features) - 1]
        planes = features.basis.unflatten(2, (2, self.rank)).transpose(1, 2)
        return (planes @ columns[:, None]).permute(0, 2, 3, 1).contiguous()

    @torch.no_grad()
    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Features:
        return Features(
            *kernel.pursuit_features(
                snapshots, channel, codes, snr_db, list(self.geometry()), self.wavenumber, self.atoms
            )
        )
