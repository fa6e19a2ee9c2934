"""Inputs on which the pursuit is tested and measured, and what a call must cost at least.

Letters: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..registry import Cost, Sample
from . import reference
from .geometry import geometry
from .search import TANGENTS, Pursuit, with_dictionary

WAVELENGTH_M = 0.3


def scenes(
    batch: int,
    horizontal: int,
    vertical: int,
    antennas: int,
    snapshots: int,
    atoms: int,
    *,
    spherical: bool = False,
    sector: float = 0.8,
    snr_db: float = 15.0,
    seed: int = 0,
    own_codes: bool = False,
) -> tuple[Any, ...]:
    """Operator arguments, float32 on CPU: as many sources as atoms, one to each strip of u, so that every pick is
    clear.

    own_codes: a set of codes for each scene, (B, L, N, 2), instead of one for all.
    """
    generator, wavenumber = torch.Generator().manual_seed(seed), 2 * math.pi / WAVELENGTH_M
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.complex64)  # noqa: E731
    x = (torch.arange(horizontal) - (horizontal - 1) / 2).repeat(vertical) * (WAVELENGTH_M / 2)
    y = (torch.arange(vertical) - (vertical - 1) / 2).repeat_interleave(horizontal) * (WAVELENGTH_M / 2)
    low, high = torch.tensor([-sector, -sector / 2, 0.1]), torch.tensor([sector, sector / 2, 0.5])
    position = low + (high - low) * uniform(batch, atoms, 3)
    strip = (torch.arange(atoms) + 0.5 + 0.5 * (uniform(batch, atoms) - 0.5)) / atoms
    position[..., 0] = low[0] + (high[0] - low[0]) * strip
    bend = wavenumber if spherical else 0.0
    constants = with_dictionary(geometry(x, y, wavenumber, low, high), bend)
    real, imag = Pursuit(constants, bend, atoms).steer(position).chunk(2, dim=2)
    amplitude = torch.polar(
        0.6 ** torch.arange(atoms) * (1 + 0.1 * uniform(batch, atoms)), 2 * math.pi * uniform(batch, atoms)
    )
    field = (torch.complex(real, imag) @ amplitude[..., None])[..., 0]
    sets = (batch,) if own_codes else ()
    channel, turns = (
        normal(batch, antennas, horizontal * vertical),
        2 * math.pi * uniform(*sets, snapshots, horizontal * vertical),
    )
    codes = torch.polar(torch.ones_like(turns), turns)
    clean = (codes * field[:, None]) @ channel.transpose(1, 2)
    level = (clean.abs().square().mean((1, 2), keepdim=True) * 10.0 ** (-snr_db / 10)).sqrt()
    received = clean + level * normal(*clean.shape)
    pairs = [torch.view_as_real(each).contiguous() for each in (received, channel, codes)]
    return *pairs, torch.full((batch,), snr_db), list(constants), bend, atoms


def _sample(name: str, *sizes: int, small: bool = False, strided: bool = False, **settings: Any) -> Sample:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        y, h, codes, snr_db, constants, wavenumber, atoms = scenes(*sizes, **settings)
        put = lambda t: (t.mT.contiguous().mT if strided and t.dim() > 1 else t).to(device, dtype)  # noqa: E731
        return put(y), put(h), put(codes), put(snr_db), [put(each) for each in constants], wavenumber, atoms

    return Sample(name, make, small=small)


SAMPLES = (
    _sample("standard", 32, 12, 12, 16, 16, 5),
    _sample("spherical", 8, 12, 12, 16, 16, 4, spherical=True),
    _sample("odd", 7, 7, 5, 13, 11, 3),
    _sample("wide", 2, 32, 32, 16, 16, 5, sector=0.3),
    _sample("one-of-each", 5, 4, 4, 8, 8, 1),
    _sample("small", 3, 5, 4, 6, 7, 2, small=True),
    _sample("strided", 3, 6, 6, 9, 17, 2, strided=True),
    _sample("empty-batch", 0, 6, 4, 4, 4, 2),
    _sample("own-codes", 5, 12, 12, 16, 16, 5, own_codes=True),
    _sample("small-own-codes", 3, 5, 4, 6, 7, 2, own_codes=True, small=True, strided=True),
)


def cost(
    snapshots: torch.Tensor,
    channel: torch.Tensor,
    codes: torch.Tensor,
    snr_db: torch.Tensor,
    constants: list[torch.Tensor],
    wavenumber: float,
    stages: int,
) -> Cost:
    """Least bytes (scenes read, features written) and FLOPs: the cheaper of P = G^H G and its images, and G through
    H."""
    (batch, length, antennas, _), elements = snapshots.shape, codes.shape[-2]
    written = reference.width(stages) + 2 * elements * reference.rank(stages)
    columns = 2 * stages * (stages + 1)
    read = 2 * antennas * (length + elements) + 1
    flops = 8 * elements * min(elements * (antennas + columns), antennas * length * columns)
    return Cost(4 * (batch * (written + read) + codes.numel()), batch * flops)


def triton_bytes(antennas: int, snapshots: int, elements: int, stages: int) -> int:
    """Bytes a scene that the Triton kernels move at least: one new base a forward step, no more afterwards.

    P written once and read at every step; of k atoms D read for D^H P D and P D for the residual, those of the new one
    written before. Each further new base reads P once more; codes and factors are shared.
    """
    scene = 4 * antennas * elements + 2 * antennas * snapshots + 2 * elements
    gram = 2 * elements**2 * (1 + stages)
    columns = sum(2 * TANGENTS * elements * (2 + k + k - 1) for k in range(1, stages + 1))
    return 4 * (scene + gram + columns + reference.width(stages) + 2 * elements * reference.rank(stages))
