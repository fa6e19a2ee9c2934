"""Our shards with a dense target and positions: how well they fit is known, and what preflight asks about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ris_fast.config.schema import Config
from ris_fast.data.manifest import columns_of, read_manifest
from ris_fast.data.shards import ShardSource


class DenseShardSource(ShardSource):
    """Scenes whose R is not exactly the sum over their sources."""

    def target_fit(self, split: str) -> Tensor:
        """NMSE of each scene's R fitted as a sum over its own sources, as the conversion measured it: (scenes,)
        float64."""
        table = self._load(split)[0]
        fit = table.take("target_nmse", torch.arange(self.size(split), device=table.device))
        assert fit is not None
        return fit.double().cpu()

    def labels(self, split: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ptr (B, 3 K_max) of the centred array, K (B,) and the dense R (B, N, N, 2) of scenes by number, on the
        CPU."""
        scenes = self.batch(split, index)
        assert scenes.azimuth is not None and scenes.elevation is not None and scenes.range_m is not None
        assert scenes.covariance is not None
        ptr = torch.cat((scenes.azimuth, scenes.elevation, scenes.range_m), 1)
        return ptr.cpu(), scenes.count.cpu(), scenes.covariance.cpu()


def open_shards(
    config: Config, device: torch.device | str, progress: Callable[[int, int], None] | None = None
) -> ShardSource:
    """The scenes of a folder of ours, with a dense target or without. Raises: DataError."""
    dense = "target_nmse" in columns_of(read_manifest(Path(config.data.path), config.task))
    return (DenseShardSource if dense else ShardSource)(config, device, progress)
