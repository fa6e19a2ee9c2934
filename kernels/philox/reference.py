"""The definition of the counter-based random numbers, in plain integer torch: what every faster version must equal.

Legend: B batch, J blocks of four words, C values wanted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four int64 tensors of words in [0, 2**32), broadcastable.
        key: two words.
    Returns:
        four int64 tensors of words in [0, 2**32).
    Numerics: a product of two words wraps modulo 2**64 in int64; its two halves, masked, are the exact ones.
    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1, c2, c3


def words(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """(B, count) int64: word i of scene b is word i % 4 of the block with counter (i // 4, stream, low, high of
    index[b])."""
    block_1J = torch.arange((count + 3) // 4, device=index_B.device)[None]
    low_B1, high_B1 = (index_B & WORD)[:, None], ((index_B >> 32) & WORD)[:, None]
    stream_11 = torch.full((1, 1), stream & WORD, dtype=torch.int64, device=index_B.device)
    four = philox4x32((block_1J, stream_11, low_B1, high_B1), (seed & WORD, (seed >> 32) & WORD))
    return torch.stack(torch.broadcast_tensors(*four), -1).flatten(1)[:, :count]


def uniform(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """(B, count) float64 in (0, 1]: (the upper 24 bits of the word + 1) / 2**24, exact in float32 too."""
    return ((words(index_B, seed, stream, count) >> 8) + 1).double() * 2.0**-24


def normal(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """(B, count) float64 N(0, 1): Box-Muller on each pair of uniforms.

    Formula: z[2p] = sqrt(-2 ln u[2p]) cos(2 pi u[2p + 1]), z[2p + 1] = sqrt(-2 ln u[2p]) sin(2 pi u[2p + 1]). Where
        u[2p] is 1, once in 2**24 pairs, it counts as 1 - 2**-24: a source whose amplitude is such a pair would not
        be there.
    Source: Box and Muller, Annals of Mathematical Statistics 29 (1958) 610-611.
    """
    pair_BP2 = uniform(index_B, seed, stream, count + count % 2).unflatten(1, (-1, 2))
    radius_BP = (-2 * pair_BP2[..., 0].clamp_max(1 - 2.0**-24).log()).sqrt()
    angle_BP = 2 * math.pi * pair_BP2[..., 1]
    return torch.stack((radius_BP * angle_BP.cos(), radius_BP * angle_BP.sin()), -1).flatten(1)[:, :count]
