"""Scenes on the GPU in three launches: channel; field and target factor; snapshots. The model is that of reference.py.

channel    H[m, n] = sqrt(k/(k+1)) b_m conj(a_n) + W[m, n] / sqrt(2 M (k+1)), a lane an entry; W made from its counter
field      x_s[n] = sum_k amplitude[s, k] a_k[n] and factor[n, k] = sqrt(power_k) a_k[n], a lane a (symbol, element)
snapshots  y[l, m] = sum_n H[m, n] c_l[n] x_l[n] + noise, a program a scene, a lane a (snapshot, antenna); no tl.dot:
           its default precision is TF32, and these outer products need no shared memory
Lengths in wavelengths; complex entries are (re, im) pairs in memory. A scene's bits do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox.triton_kernels import direction, normal_pair, philox_words

BLOCK = 128  # lanes of the first two kernels; 256 sends the channel through shared memory
WARPS = 4


@triton.jit
def unit(quarters):
    """cos and sin of any number of quarter turns."""
    whole = tl.floor(quarters + 0.5)
    return direction(whole.to(tl.int32), quarters - whole)


@triton.jit
def cosines(position_ptr):
    """Direction cosines u = sin(azimuth) cos(elevation), v = sin(elevation) of the position at a pointer."""
    _, azimuth_sine = unit(tl.load(position_ptr) * 0.636619772367581343)
    elevation_cosine, elevation_sine = unit(tl.load(position_ptr + 1) * 0.636619772367581343)
    return azimuth_sine * elevation_cosine, elevation_sine


@triton.jit
def steer(x, y, position_ptr, scale, SPHERICAL: tl.constexpr):
    """Entry of the unit-norm near-field vector: exp(2 pi j path) / sqrt(N), scale = 1 / sqrt(N)."""
    u, v = cosines(position_ptr)
    r = tl.load(position_ptr + 2)
    bow, plane = x * x + y * y, u * x + v * y
    if SPHERICAL:
        excess = bow - 2.0 * r * plane
        path = tl.div_rn(-excess, r + tl.sqrt_rn(r * r + excess))
    else:
        path = plane - bow * tl.div_rn(0.5, r)
    cosine, sine = unit(4.0 * path)
    return cosine * scale, sine * scale


@triton.jit
def complex_normal(entry, stream, index, seed):
    """Normals 2 e and 2 e + 1 of a stream: half a Philox block, the parts of complex entry e."""
    w0, w1, w2, w3 = philox_words(entry >> 1, stream.to(tl.int64), index, seed.to(tl.int64))
    upper = (entry & 1) != 0
    return normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1))


@triton.jit(do_not_specialize=["seed", "stream"])
def channel_kernel(
    channel_ptr,
    index_ptr,
    positions_ptr,
    los_direction_ptr,
    rician_ptr,
    antennas,
    elements,
    scale,
    antenna_scale,
    seed,
    stream,
    SPHERICAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """channel (B, M, N, 2); grid (B, ceil(M N / BLOCK))."""
    scene, entries = tl.program_id(0), antennas * elements
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m, n = entry // elements, entry % elements
    x, y = tl.load(positions_ptr + n), tl.load(positions_ptr + elements + n)
    los_direction = los_direction_ptr + 3 * scene
    cosine, sine = steer(x, y, los_direction, scale, SPHERICAL)
    rician = tl.load(rician_ptr + scene)
    weight = tl.sqrt_rn(tl.div_rn(rician, rician + 1.0)) * antenna_scale
    scatter = tl.sqrt_rn(tl.div_rn(0.5, rician + 1.0)) * antenna_scale
    u, _ = cosines(los_direction)
    b_re, b_im = unit((2 * m - (antennas - 1)).to(tl.float32) * u)
    w_re, w_im = complex_normal(entry, stream, tl.load(index_ptr + scene), seed)
    h_re = scatter * w_re + weight * (b_re * cosine + b_im * sine)
    h_im = scatter * w_im + weight * (b_im * cosine - b_re * sine)
    place = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(
        channel_ptr + scene.to(tl.int64) * (2 * entries) + place, tl.interleave(h_re, h_im), mask=place < 2 * entries
    )


@triton.jit
def field_kernel(
    factor_ptr,
    field_ptr,
    positions_ptr,
    source_ptr,
    amplitude_ptr,
    power_ptr,
    symbols,
    elements,
    scale,
    K: tl.constexpr,
    SPHERICAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """field (B, S, N, 2) and factor (B, N, K, 2); grid (B, ceil(S N / BLOCK))."""
    scene = tl.program_id(0)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s, n, inside = lane // elements, lane % elements, lane < symbols * elements
    x, y = tl.load(positions_ptr + n), tl.load(positions_ptr + elements + n)
    x_re, x_im = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        cosine, sine = steer(x, y, source_ptr + 3 * (scene * K + k), scale, SPHERICAL)
        amplitude = amplitude_ptr + 2 * ((scene * symbols + s) * K + k)
        g_re, g_im = tl.load(amplitude, mask=inside, other=0.0), tl.load(amplitude + 1, mask=inside, other=0.0)
        x_re += g_re * cosine - g_im * sine
        x_im += g_re * sine + g_im * cosine
        root = tl.sqrt_rn(tl.load(power_ptr + scene * K + k))
        factor = factor_ptr + 2 * ((scene.to(tl.int64) * elements + n) * K + k)
        tl.store(factor, root * cosine, mask=lane < elements)
        tl.store(factor + 1, root * sine, mask=lane < elements)
    field = field_ptr + 2 * (scene.to(tl.int64) * symbols * elements + lane)
    tl.store(field, x_re, mask=inside)
    tl.store(field + 1, x_im, mask=inside)


@triton.jit(do_not_specialize=["seed", "stream"])
def snapshot_kernel(
    snapshots_ptr,
    channel_ptr,
    field_ptr,
    codes_ptr,
    index_ptr,
    snr_db_ptr,
    antennas,
    elements,
    snapshots,
    symbols,
    code_stride,
    seed,
    stream,
    L: tl.constexpr,
    M: tl.constexpr,
):
    """snapshots (B, L, M, 2); grid (B,); code_stride: floats from a scene's codes to the next one's, 0 where all share
    them; L and M: numbers of snapshots and antennas, rounded up to powers of two."""
    scene = tl.program_id(0)
    snapshot, m = tl.arange(0, L)[:, None], tl.arange(0, M)[None, :]
    s = tl.where(symbols == 1, 0, snapshot)
    channel = channel_ptr + scene.to(tl.int64) * (2 * antennas * elements) + 2 * m * elements
    field = field_ptr + scene.to(tl.int64) * (2 * symbols * elements) + 2 * s * elements
    codes = codes_ptr + scene.to(tl.int64) * code_stride + 2 * snapshot * elements
    y_re, y_im = tl.zeros([L, M], tl.float32), tl.zeros([L, M], tl.float32)
    for n in tl.range(0, elements, loop_unroll_factor=4):  # four entries of latency at a time
        h_re = tl.load(channel + 2 * n, mask=m < antennas, other=0.0)
        h_im = tl.load(channel + 2 * n + 1, mask=m < antennas, other=0.0)
        x_re = tl.load(field + 2 * n, mask=snapshot < snapshots, other=0.0)
        x_im = tl.load(field + 2 * n + 1, mask=snapshot < snapshots, other=0.0)
        c_re = tl.load(codes + 2 * n, mask=snapshot < snapshots, other=0.0)
        c_im = tl.load(codes + 2 * n + 1, mask=snapshot < snapshots, other=0.0)
        v_re, v_im = c_re * x_re - c_im * x_im, c_re * x_im + c_im * x_re
        y_re += h_re * v_re - h_im * v_im
        y_im += h_re * v_im + h_im * v_re
    values = 2 * antennas * snapshots
    power = tl.sum(tl.sum(y_re * y_re + y_im * y_im, 1), 0)
    variance = tl.div_rn(power, values.to(tl.float32)) * tl.exp2(-0.33219280948873623 * tl.load(snr_db_ptr + scene))
    deviation = tl.sqrt_rn(variance)
    z_re, z_im = complex_normal(snapshot * antennas + m, stream, tl.load(index_ptr + scene), seed)
    out = snapshots_ptr + scene.to(tl.int64) * values + 2 * (snapshot * antennas + m)
    inside = (snapshot < snapshots) & (m < antennas)
    tl.store(out, y_re + deviation * z_re, mask=inside)
    tl.store(out + 1, y_im + deviation * z_im, mask=inside)


def scenes(
    index: Tensor, seed: int, channel_stream: int, noise_stream: int, m: int, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on the device of `index`; arguments as in reference.py, float32."""
    tensors = [None if each is None else each.contiguous() for each in (index, *rest[:-1])]
    index, positions, codes, source, amplitude, power, los_direction, rician, given, snr_db = tensors
    spherical = bool(rest[-1])
    (batch, k, _), (snapshots, n, _), symbols = source.shape, codes.shape[-3:], amplitude.shape[1]
    channel, received = source.new_empty((batch, m, n, 2)), source.new_empty((batch, snapshots, m, 2))
    if given is not None:
        channel.copy_(given)
    factor, field = source.new_empty((batch, n, k, 2)), source.new_empty((batch, symbols, n, 2))
    if batch == 0:
        return channel, received, factor
    scale = n**-0.5
    with torch.cuda.device_of(index):  # does nothing on CPU, where the interpreter runs
        if given is None:
            channel_kernel[(batch, triton.cdiv(m * n, BLOCK))](
                channel,
                index,
                positions,
                los_direction,
                rician,
                m,
                n,
                scale,
                m**-0.5,
                seed,
                channel_stream,
                SPHERICAL=spherical,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        field_kernel[(batch, triton.cdiv(symbols * n, BLOCK))](
            factor,
            field,
            positions,
            source,
            amplitude,
            power,
            symbols,
            n,
            scale,
            K=k,
            SPHERICAL=spherical,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        snapshot_kernel[(batch,)](
            received,
            channel,
            field,
            codes,
            index,
            snr_db,
            m,
            n,
            snapshots,
            symbols,
            2 * snapshots * n if codes.dim() == 4 else 0,
            seed,
            noise_stream,
            L=triton.next_power_of_2(snapshots),
            M=triton.next_power_of_2(m),
            num_warps=WARPS,
        )
    return channel, received, factor
