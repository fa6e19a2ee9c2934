"""The order of an epoch as a function of position: a keyed permutation that needs no array of all scenes.

Model: a Feistel network permutes the numbers below the next power of two, split into a left part of a bits and a right
part of b bits, a - b in {0, 1}. Round i replaces left by left ^ F(right, key_i), the next one right by
right ^ F(left, key_i), and so on; each round undoes itself, whatever F is. A number that lands at or beyond the size
goes through the network again until it lands below it (cycle walking), which keeps the permutation one of the numbers
below the size. F is the upper bits of a 32-bit hash, the keys are BLAKE2b of (seed, epoch).
Numerics: whole numbers of 32 bits without sign, on the host: the same everywhere.
Cost: at most two passes on average; 160,000 positions take about 10 ms of one core.
Source: Black and Rogaway, Ciphers with arbitrary finite domains, 2002; the hash is lowbias32 of C. Wellons.
"""

from __future__ import annotations

import hashlib

import numpy as np

ORDER = (
    "feistel-1"  # the name of this order in a checkpoint: another one would see other scenes in the rest of an epoch
)
BLOCK = 2**16  # positions at a time: their 32-bit halves stay in the cache
ROUNDS = 8
SMALL_BITS, SMALL_ROUNDS = 16, 24  # F of few bits mixes little; a small domain costs little


class EpochOrder:
    """A permutation of 0 ... size - 1 that (seed, epoch) chooses."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size, bits = size, max(1, (size - 1).bit_length())
        self.left_bits, self.right_bits = bits - bits // 2, bits // 2
        rounds = SMALL_ROUNDS if bits <= SMALL_BITS else ROUNDS
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=64, person=ORDER.encode()).digest()
        while len(digest) < 4 * rounds:
            digest += hashlib.blake2b(digest, digest_size=64, person=ORDER.encode()).digest()
        self.keys = np.frombuffer(digest[: 4 * rounds], "<u4").astype(np.uint32)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """The scenes at positions start ... stop - 1: (stop - start,) int64."""
        out = np.empty(max(0, stop - start), np.int64)
        for first in range(start, stop, BLOCK):
            here = out[first - start : first - start + BLOCK]
            here[:] = self._network(np.arange(first, first + len(here)))
            beyond = np.flatnonzero(here >= self.size)
            while beyond.size:
                here[beyond] = self._network(here[beyond])
                beyond = beyond[here[beyond] >= self.size]
        return out

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left = (numbers >> self.right_bits).astype(np.uint32)
        right = (numbers & ((1 << self.right_bits) - 1)).astype(np.uint32)
        room = np.empty_like(left), np.empty_like(left)
        for number, key in enumerate(self.keys):
            if number % 2 == 0:
                left ^= _upper_bits(right, key, self.left_bits, *room)
            else:
                right ^= _upper_bits(left, key, self.right_bits, *room)
        return (left.astype(np.int64) << self.right_bits) | right


def _upper_bits(values: np.ndarray, key: np.uint32, bits: int, out: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The upper `bits` bits of a hash of values ^ key, in `out`; `room` is scratch of the same shape."""
    if bits == 0:
        out.fill(0)
        return out
    np.bitwise_xor(values, key, out=out)
    out ^= np.right_shift(out, np.uint32(16), out=room)
    out *= np.uint32(0x21F0AAAD)
    out ^= np.right_shift(out, np.uint32(15), out=room)
    out *= np.uint32(0x735A2D97)
    out >>= np.uint32(32 - bits)
    return out
