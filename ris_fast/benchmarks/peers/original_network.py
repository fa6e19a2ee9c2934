"""The original's network: the layers of ours, fed as the original feeds them, its heads the entries of a factor.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.config.schema import Task
from ris_fast.models.hybrid import RANGE_SHARE, Hybrid
from ris_fast.models.hybrid_parts import PositionCode
from ris_fast.physics.channel import effective_channel


class OriginalNetwork(Hybrid):
    """As many parameters; L tokens of raw snapshots, H c_l flattened, and the codes, averaged after a convolution."""

    def __init__(self, task: Task, **options: Any) -> None:
        super().__init__(task, **options)
        half = self.fine_path.out_features
        self.token_mix = nn.Conv1d(2 * task.bs_antennas, half, 5, padding=2)
        self.plane_path = nn.Conv1d(2 * task.elements, half, 5, padding=2)
        self.position = PositionCode(task.snapshots, 2 * half)

    @torch.no_grad()
    def features(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> tuple[Tensor, ...]:
        """Snapshots (B, L, M, 2), H c_l (B, L, M, 2) and codes (B, L, N, 2) or (1, L, N, 2), as they come."""
        return snapshots, effective_channel(channel, codes), codes if codes.dim() == 4 else codes[None]

    def _fused(self, features: tuple[Tensor, ...]) -> Tensor:
        snapshots, products, codes = features
        y = fn.gelu(self.token_mix(snapshots.flatten(2).transpose(1, 2)))
        y = fn.gelu(self.token_widen(self.token_depth(y))).transpose(1, 2)
        y = self.blocks(self.position(y)).mean(1)
        h = fn.gelu(self.fine_path(products.flatten(1)))
        c = fn.gelu(self.plane_path(codes.flatten(2).transpose(1, 2))).mean(2).expand(y.shape[0], -1)
        return fn.gelu(self.fuse(torch.cat((y, h, c), dim=-1)))

    def _factor(self, x_BD: Tensor, features: tuple[Tensor, ...]) -> Tensor:
        """Heads as entries."""
        shape = (x_BD.shape[0], self.task.elements, self.task.max_sources, 2)
        angle, range_ = (head(x_BD).float().view(shape) for head in (self.angle_factor, self.range_factor))
        return torch.cat((angle, math.sqrt(RANGE_SHARE) * range_), dim=2)
