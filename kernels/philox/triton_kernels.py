"""Counter-based uniforms and normals on the GPU: one lane a block of four values.

Mapping (that of reference.py): words = philox4x32-10(counter = (block j, stream, index low, index high), key = seed);
uniform = (upper 24 bits + 1)/2^24; z[2p], z[2p+1] = sqrt(-2 ln u[2p]) (cos, sin)(2 pi u[2p+1]).
The polynomials and the order of operations are those of philox.hpp, so that both differ by a few ulp at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 256  # blocks of four values a program makes
WARPS = 4


@triton.jit
def philox_words(block, stream, index, seed):
    """Four uint32 tensors from int64 tensors or scalars. Source: Salmon et al., SC 2011, section 3.3."""
    c0, c1, c2, c3 = block.to(tl.uint32), stream.to(tl.uint32), index.to(tl.uint32), (index >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c1 = tl.zeros_like(c0) + c1
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 = (k0 + 0x9E3779B9).to(tl.uint32)
        k1 = (k1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def ticks(word):
    """Uniform times 2^24: 1 .. 2^24, int32."""
    return (word >> 8).to(tl.int32) + 1


@triton.jit
def uniform(word):
    """Uniform in (0, 1], exact."""
    return ticks(word).to(tl.float32) * 5.960464477539063e-08


@triton.jit
def radius(tick):
    """sqrt(-2 ln(tick / 2^24)): mantissa in [sqrt(1/2), sqrt(2)), ln(1 + f) = f - f^2/2 + f^3 q(f)."""
    bits = tick.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f2, e = f * f, (exponent - 24).to(tl.float32)
    q = tl.fma(-0.07634503825928572, f, 0.12761578850076574)
    q = tl.fma(q, f, -0.13160179895629298)
    q = tl.fma(q, f, 0.14201757140973303)
    q = tl.fma(q, f, -0.16623357455511995)
    q = tl.fma(q, f, 0.20001226922882104)
    q = tl.fma(q, f, -0.25000821035016474)
    q = tl.fma(q, f, 0.3333333170832008)
    small = tl.fma(e, 1.428606765330187e-06, tl.fma(q * f, f2, -0.5 * f2))
    return tl.sqrt_rn(-2.0 * tl.fma(e, 0.693145751953125, small + f))


@triton.jit
def direction(quarter, t):
    """cos and sin of (quarter + t) quarter turns, |t| <= 1/2."""
    t2 = t * t
    s = tl.fma(-0.004601658182648317, t2, 0.07968003282320685)
    s = tl.fma(tl.fma(s, t2, -0.6459634602305683), t2, 1.5707963217079541) * t
    c = tl.fma(0.0009034159658328494, t2, -0.020860000074886056)
    c = tl.fma(tl.fma(tl.fma(c, t2, 0.25366920329074144), t2, -1.2337005417391813), t2, 1.0)
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def turn(tick):
    """cos and sin of 2 pi tick / 2^24; the quarter turn is split off in integers."""
    quarter = (tick + (1 << 21)) >> 22
    return direction(quarter, (tick - (quarter << 22)).to(tl.float32) * 2.384185791015625e-07)


@triton.jit
def normal_pair(first, second):
    """Box-Muller: two words to two normals. A uniform of 1 counts as the one before it: no pair is exactly zero."""
    r = radius(tl.minimum(ticks(first), 16777215))
    cosine, sine = turn(ticks(second))
    return r * cosine, r * sine


@triton.jit(do_not_specialize=["rows", "seed", "stream"])
def philox_kernel(
    out_ptr,
    index_ptr,
    rows,
    count,
    blocks,
    seed,
    stream,
    NORMAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fills out (rows, count) from index (rows).

    blocks = ceil(count / 4); rows * blocks < 2^31 - BLOCKS, so that the division stays in 32 bits; WHOLE: count is a
    multiple of four, and then a program's values are one run of memory, stored 128 bits at a time.
    """
    flat = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    row, block = flat // blocks, flat % blocks
    index = tl.load(index_ptr + row, mask=row < rows, other=0)
    w0, w1, w2, w3 = philox_words(block, stream.to(tl.int64), index, seed.to(tl.int64))
    if NORMAL:
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
    else:
        z0, z1, z2, z3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    if WHOLE:
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
        value = tl.program_id(0).to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
        tl.store(out_ptr + value, z, mask=value < rows * count.to(tl.int64))
    else:
        place, start = 4 * block, out_ptr + row.to(tl.int64) * count
        tl.store(start + place, z0, mask=(row < rows) & (place < count))
        tl.store(start + place + 1, z1, mask=(row < rows) & (place + 1 < count))
        tl.store(start + place + 2, z2, mask=(row < rows) & (place + 2 < count))
        tl.store(start + place + 3, z3, mask=(row < rows) & (place + 3 < count))


def launch(index_B: Tensor, seed: int, stream: int, count: int, normal: bool) -> Tensor:
    """(B, count) float32 on the device of `index_B`; one launch for every 2^31 blocks of four values."""
    blocks, index_B = (count + 3) // 4, index_B.contiguous()
    out = torch.empty((index_B.numel(), count), dtype=torch.float32, device=index_B.device)
    if out.numel() == 0:
        return out
    step = max(1, (2**31 - 2 * BLOCKS) // blocks)
    with torch.cuda.device_of(index_B):  # does nothing on CPU, where the interpreter runs
        for part, index in zip(out.split(step), index_B.split(step)):
            grid = (triton.cdiv(index.numel() * blocks, BLOCKS),)
            philox_kernel[grid](
                part,
                index,
                index.numel(),
                count,
                blocks,
                seed,
                stream,
                NORMAL=normal,
                WHOLE=count % 4 == 0,
                BLOCKS=BLOCKS,
                num_warps=WARPS,
            )
    return out


def uniform_numbers(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """`philox_uniform` on the device of `index_B`."""
    return launch(index_B, seed, stream, count, normal=False)


def normal_numbers(index_B: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """`philox_normal` on the device of `index_B`."""
    return launch(index_B, seed, stream, count, normal=True)
