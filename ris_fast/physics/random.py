"""The random numbers of a scene: counter-based, so that scene i of a split is the same scene everywhere.

Every number is a pure function of (seed, split, scene index, quantity, position). Splits use different streams of
Philox4x32-10, so train, validation and test can never share a scene.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from ris_fast.config.spelling import did_you_mean
from ris_fast.kernels.philox.op import philox_normal, philox_uniform

SPLITS = ("train", "val", "test")
QUANTITIES = ("scene", "symbols", "channel", "noise", "phase_error", "channel_error")
SURFACES = len(SPLITS) * 256  # the stream that no split has: surfaces are the same in all of them
OWN_STREAMS = 2**31  # the upper half of all streams belongs to draws of the user's own


@dataclass(frozen=True)
class SceneGenerator:
    """Draws for the scenes of one split.

    Args: seed: which scenes, a whole number in 0 .. 2^63 - 1;
        split: "train", "val" or "test": a stream of its own, so that splits share no scene;
        device: where the numbers are made; they are the same on every one.
    Raises: TypeError or ValueError naming the argument.
    """

    seed: int = 0
    split: str = "train"
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"SceneGenerator: split is {self.split!r}; it must be one of {', '.join(SPLITS)}.")
        if not isinstance(self.seed, Integral):
            raise TypeError(f"SceneGenerator: seed is {self.seed!r}, expected a whole number in 0 .. 2^63 - 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"SceneGenerator: seed is {self.seed}; it must be in 0 .. 2^63 - 1.")

    def stream(self, quantity: str) -> int:
        """Number of the stream of one of `QUANTITIES` in this split."""
        if quantity not in QUANTITIES:
            raise ValueError(f"SceneGenerator: there is no quantity {quantity!r}.{did_you_mean(quantity, QUANTITIES)}")
        return SPLITS.index(self.split) * 256 + QUANTITIES.index(quantity)

    def uniform(self, index: Tensor, quantity: str, count: int) -> Tensor:
        """(B,) int64 scene indices -> (B, count) float32 in (0, 1]."""
        return philox_uniform(index, self.seed, self.stream(quantity), count)

    def normal(self, index: Tensor, quantity: str, count: int) -> Tensor:
        """(B,) int64 scene indices -> (B, count) float32 standard normal."""
        return philox_normal(index, self.seed, self.stream(quantity), count)


class OwnGenerator(SceneGenerator):
    """Draws for code of the user's own: a quantity has any name, and none of ours is drawn twice."""

    def stream(self, quantity: str) -> int:
        name = hashlib.sha256(f"{self.split}:{quantity}".encode()).digest()
        return OWN_STREAMS + int.from_bytes(name[:4], "big") % OWN_STREAMS


def surface_normal(surface: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) float32 standard normal of a numbered surface, the same for every split and seed of scenes."""
    return philox_normal(torch.tensor([surface], device=device), 0, SURFACES, count)[0]
