"""Inputs on which the scene kernel is tested and measured, and what a call must cost at least.

Letters: B batch, L snapshots, M base-station antennas, N RIS elements, K sources, S symbols (1 or L).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import Cost, Sample

NORMAL_FLOPS = 44  # a counter-based normal, integer operations included


def _sample(
    name: str,
    batch: int,
    side: int,
    antennas: int,
    snapshots: int,
    sources: int,
    *,
    moving: bool = False,
    spherical: bool = False,
    strided: bool = False,
    small: bool = False,
    own_codes: bool = False,
    own_channel: bool = False,
) -> Sample:
    """Random geometry on a square array, 1 .. K sources a scene, values that float32 holds exactly."""

    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            values = low + (high - low) * torch.rand(*shape, generator=generator)
            return (values.mT.contiguous().mT if strided and len(shape) > 1 else values).to(device, dtype)

        line = (torch.arange(side, dtype=dtype) - (side - 1) / 2) / 2
        positions = torch.stack((line.repeat(side), line.repeat_interleave(side))).to(device)
        active = torch.arange(sources) < torch.arange(batch)[:, None] % sources + 1
        amplitude = uniform(-1, 1, batch, snapshots if moving else 1, sources, 2) * active[:, None, :, None].to(device)
        turns = torch.randint(8, (*((batch,) if own_codes else ()), snapshots, side * side), generator=generator) * (
            2 * math.pi / 8
        )
        codes = torch.stack((turns.cos(), turns.sin()), -1).to(device, dtype)
        source = torch.stack(
            (uniform(-1.1, 1.1, batch, sources), uniform(-0.5, 0.5, batch, sources), uniform(1.7, 33, batch, sources)),
            -1,
        )
        los_direction = torch.stack(
            (uniform(-0.9, 0.9, batch), uniform(-0.9, 0.9, batch), uniform(333, 334, batch)), -1
        )
        power = uniform(0.1, 1, batch, sources) * active.to(device)
        return (
            torch.arange(batch, device=device) * 7 + 2**33,
            3,
            2,
            1,
            antennas,
            positions,
            codes,
            source,
            amplitude,
            power,
            los_direction,
            uniform(0.5, 10, batch),
            uniform(-1, 1, batch, antennas, side * side, 2) if own_channel else None,
            uniform(-5, 20, batch),
            spherical,
        )

    return Sample(name, make, small=small)


SAMPLES = (
    _sample("standard", 8, 12, 16, 16, 5),
    _sample("spherical", 4, 12, 16, 16, 5, spherical=True),
    _sample("moving", 3, 12, 16, 16, 5, moving=True),
    _sample("odd", 60, 7, 5, 3, 2, moving=True),
    _sample("wide", 2, 32, 24, 40, 16),
    _sample("one-of-each", 300, 2, 1, 1, 1),
    _sample("one-scene", 1, 12, 16, 16, 5),
    _sample("small", 4, 5, 4, 6, 3, small=True),
    _sample("small-spherical", 4, 4, 3, 5, 2, moving=True, spherical=True, small=True),
    _sample("strided", 2, 8, 9, 17, 3, strided=True),
    _sample("empty-batch", 0, 4, 2, 2, 2),
    _sample("own-codes", 6, 7, 5, 11, 3, moving=True, own_codes=True),
    _sample("small-own-codes", 4, 5, 4, 6, 3, own_codes=True, small=True),
    _sample("own-channel", 6, 7, 5, 11, 3, own_channel=True),
    _sample("small-own-channel", 4, 5, 4, 6, 3, moving=True, own_channel=True, small=True),
)


def cost(
    index: Tensor,
    seed: int,
    channel_stream: int,
    noise_stream: int,
    antennas: int,
    positions: Tensor,
    codes: Tensor,
    source: Tensor,
    amplitude: Tensor,
    *rest: Any,
) -> Cost:
    """Least bytes (parameters read, results written) and FLOPs (normals, and 8 per complex multiply-add)."""
    batch, sources, _ = source.shape
    (snapshots, elements, _), symbols = codes.shape[-3:], amplitude.shape[1]
    results = 2 * batch * (antennas * elements + snapshots * antennas + elements * sources)
    inputs = sum(each.numel() for each in (positions, codes, source, amplitude, *rest[:-1]) if each is not None)
    products = (
        snapshots * antennas * elements + antennas * elements + snapshots * elements + symbols * sources * elements
    )
    normals = 2 * antennas * (elements + snapshots)
    return Cost(4 * (results + inputs) + 8 * batch, batch * (8 * products + NORMAL_FLOPS * normals))
