"""A batch of scenes from its parameters as one operator: channel, snapshots and target factor.

Letters: B batch, L snapshots, M base-station antennas, N RIS elements, K sources, S symbols (1 or L). Not
differentiable: it makes data. On CPU one pass of C++, on CUDA three Triton launches.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from ..philox import op as philox
from ..registration import cpp_or, register, triton_function
from ..registry import Family
from ..values import check_shapes
from . import reference
from .samples import SAMPLES, cost

SCHEMA = (
    "scenes(Tensor index, int seed, int channel_stream, int noise_stream, int antennas, Tensor positions, Tensor codes,"
    " Tensor source, Tensor amplitude, Tensor power, Tensor los_direction, Tensor rician, Tensor? channel,"
    " Tensor snr_db, bool spherical) -> (Tensor, Tensor, Tensor)"
)
ARGUMENTS = [c_void_p] * 13 + [c_int64] * 11


def make_scenes(
    index: Tensor,
    *,
    seed: int,
    channel_stream: int,
    noise_stream: int,
    antennas: int,
    positions: Tensor,
    codes: Tensor,
    source: Tensor,
    amplitude: Tensor,
    power: Tensor,
    los_direction: Tensor,
    rician: Tensor,
    snr_db: Tensor,
    spherical: bool,
    channel: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Channel, noisy snapshots and target factor of scenes whose geometry is drawn already.

    Model: H = sqrt(k/(k+1)) b a(los_direction)^H + W / sqrt(2 M (k+1)), k the Rician factor, b of M antennas in line,
        y_l = H (c_l o sum_k amplitude_k a(source_k)) + n_l, factor column k = sqrt(power_k) a(source_k); a unit-norm
        near-field steering vectors, W and n counter-based normals of `index`.
    Args: index (B,) int64; seed, streams: as `philox_normal`; float32: positions (2, N) x and y of the elements,
        codes (L, N, 2) or a set a scene (B, L, N, 2), source (B, K, 3) azimuth, elevation, range, amplitude (B, S, K,
        2), power (B, K), los_direction (B, 3) azimuth, elevation, range of the base station, rician (B,), snr_db (B,);
        angles in radians, lengths in wavelengths;
        spherical: exact wavefront instead of the Fresnel one; channel (B, M, N, 2): the H of these scenes, in the
        place of the drawn one.
    Returns: channel (B, M, N, 2), snapshots (B, L, M, 2), factor (B, N, K, 2), float32.
    Raises: ValueError: shapes or dtypes that do not fit together.
    Numerics: scene b depends on its own parameters alone, bit for bit, whatever the batch and the number of threads.
    """
    tensors = {
        "positions": positions,
        "codes": codes,
        "source": source,
        "amplitude": amplitude,
        "power": power,
        "los_direction": los_direction,
        "rician": rician,
        "channel": channel,
        "snr_db": snr_db,
    }
    _check(index, antennas, {name: each for name, each in tensors.items() if each is not None})
    return torch.ops.ris_fast.scenes(
        index, philox.signed(seed), channel_stream, noise_stream, antennas, *tensors.values(), spherical
    )


def _check(index: Tensor, antennas: int, tensors: dict[str, Tensor]) -> None:
    batch, elements, sources = index.numel(), tensors["positions"].shape[-1], tensors["source"].shape[1]
    codes, symbols = tensors["codes"], tensors["amplitude"].shape[1]
    snapshots, own = codes.shape[-3], (batch,) if codes.dim() == 4 else ()
    expected = {
        "positions": (2, elements),
        "codes": (*own, snapshots, elements, 2),
        "source": (batch, sources, 3),
        "amplitude": (batch, snapshots if symbols != 1 else 1, sources, 2),
        "power": (batch, sources),
        "los_direction": (batch, 3),
        "rician": (batch,),
        "channel": (batch, antennas, elements, 2),
        "snr_db": (batch,),
    }
    expected = {name: shape for name, shape in expected.items() if name in tensors}
    of = f"{batch} scenes. Pass the {{name}} of these scenes."
    check_shapes("make_scenes", tensors, expected, of, torch.float32)


def _shapes(antennas: int, codes: Tensor, source: Tensor) -> tuple[tuple[int, ...], ...]:
    (batch, sources, _), (snapshots, elements, _) = source.shape, codes.shape[-3:]
    return (batch, antennas, elements, 2), (batch, snapshots, antennas, 2), (batch, elements, sources, 2)


@cache
def _native() -> Any:
    return loader.function("scenes", ARGUMENTS, restype=c_int)


def _cpp(
    index: Tensor, seed: int, channel_stream: int, noise_stream: int, antennas: int, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = [None if each is None else each.contiguous() for each in (index, *rest[:-1])]
    spherical = rest[-1]
    codes, source, amplitude = inputs[2:5]
    out = tuple(source.new_empty(shape) for shape in _shapes(antennas, codes, source))
    sizes = (len(source), antennas, codes.shape[-2], codes.shape[-3], source.shape[1], amplitude.shape[1])
    if _native()(
        *(None if each is None else each.data_ptr() for each in (*out, *inputs)),
        *sizes,
        seed,
        channel_stream,
        noise_stream,
        spherical,
        codes.dim() == 4,
    ):
        raise MemoryError(
            "scenes: no memory for the scratch of a thread. Lower the number of threads or the size of the array."
        )
    return out


def _plain(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The definition with the fast random numbers."""
    return reference.scenes(*args, normal=torch.ops.ris_fast.philox_normal)


def _fake(
    index: Tensor, seed: int, channel_stream: int, noise_stream: int, antennas: int, *rest: Any
) -> tuple[Tensor, ...]:
    codes, source = rest[1:3]
    return tuple(source.new_empty(shape) for shape in _shapes(antennas, codes, source))


_triton = triton_function(__package__, "scenes")
OPERATOR = register(
    SCHEMA,
    cpu=cpp_or(_plain, _cpp),
    cuda=_triton,
    fake=_fake,
    reference=reference.scenes,
    samples=SAMPLES,
    cost=cost,
    backends={"cpp": _cpp, "triton": _triton},
    results=3,
    error_ratio=4.0,  # normals of 4 ulp go in where the reference in float32 has correctly rounded ones
    dtypes=(torch.float32,),
)
FAMILY = Family("scenes", (OPERATOR,))
