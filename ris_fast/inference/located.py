"""What is found in a batch of scenes, in the units that a person reads.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ris_fast.localize.sources import Deviations, Sources


class Located(NamedTuple):
    """Sources, strongest first, with standard deviations; NaN beyond `count`, and where something is not known.

    Positions are seen from the centre of the array. Where a measurement was given, powers are mean_l |s_l|^2 in the
    units of its snapshots and channel, deviations are those of an efficient estimator (the Fisher information at the
    estimate), and `count_probability` compares one chain of candidates: it is overconfident, and no probability of
    being right. All of these take the nominal array and the channel for the true ones. From a factor alone powers are
    shares of its trace, and the rest is NaN.
    """

    factor: Tensor  # (B, N, Q, 2)   the covariance is F F^H up to its scale, which is not that of `power`
    count: Tensor  # (B,)           int64, sources found
    azimuth_deg: Tensor  # (B, K)
    elevation_deg: Tensor  # (B, K)
    range_m: Tensor  # (B, K)
    power: Tensor  # (B, K)         linear
    azimuth_sd_deg: Tensor  # (B, K)
    elevation_sd_deg: Tensor  # (B, K)
    range_sd_m: Tensor  # (B, K)
    power_sd: Tensor  # (B, K)
    count_probability: Tensor  # (B, K + 1)     weights of 0, 1, ... K sources
    snr_db: Tensor  # (B,)           as given, or estimated

    def numpy(self) -> dict[str, np.ndarray]:
        """The same as numpy arrays by name."""
        return {name: value.cpu().numpy() for name, value in self._asdict().items()}

    @classmethod
    def of(
        cls,
        factor: Tensor,
        sources: Sources,
        *,
        deviations: Deviations | None = None,
        count_probability: Tensor | None = None,
        snr_db: Tensor | None = None,
    ) -> Located:
        """In degrees, and NaN where there is no source or nothing is known."""
        batch, slots = sources.power.shape
        unknown = sources.power.new_full((batch, slots), torch.nan)
        spread = [unknown] * 4 if deviations is None else [_shown(each, sources.active) for each in deviations]
        place = [_shown(each, sources.active) for each in sources[:4]]
        return cls(
            factor,
            sources.count,
            *(place[0].rad2deg(), place[1].rad2deg(), *place[2:]),
            *(spread[0].rad2deg(), spread[1].rad2deg(), *spread[2:]),
            factor.new_full((batch, slots + 1), torch.nan) if count_probability is None else count_probability,
            factor.new_full((batch,), torch.nan) if snr_db is None else snr_db,
        )

    @staticmethod
    def concatenate(parts: list[Located]) -> Located:
        """Chunks of scenes, one after the other."""
        return parts[0] if len(parts) == 1 else Located(*(torch.cat(each) for each in zip(*parts)))


def _shown(values: Tensor, active: Tensor) -> Tensor:
    return torch.where(active, values, torch.nan)
