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
from ..registry import AotCase, Family, Operator
from . import reference
from .samples import SAMPLES, cost

SCHEMA = (
    "scenes(Tensor index, int seed, int channel_stream, int noise_stream, int antennas, Tensor positions, Tensor codes,"
    " Tensor source, Tensor amplitude, Tensor power, Tensor los_direction, Tensor rician, Tensor snr_db, bool spherical) ->"
    " (Tensor, Tensor, Tensor)"
)
ARGUMENTS = [c_void_p] * 12 + [c_int64] * 11
LIBRARY = torch.library.Library("ris_fast", "FRAGMENT")
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Channel, noisy snapshots and target factor of scenes whose geometry is drawn already.

    Model: H = sqrt(k/(k+1)) b a(los_direction)^H + W / sqrt(2 M (k+1)), k the Rician factor, b of M antennas in line, y_l = H
        (c_l o sum_k amplitude_k a(source_k)) + n_l, factor column k = sqrt(power_k) a(source_k); a unit-norm near-field
        steering vectors, W and n counter-based normals of `index`.
    Args: index (B,) int64; seed, streams: as `philox_normal`; float32: positions (2, N) x and y of the elements,
        codes (L, N, 2) or a set a scene (B, L, N, 2), source (B, K, 3) azimuth, elevation, range, amplitude (B, S, K,
        2), power (B, K), los_direction (B, 3) azimuth, elevation, range of the base station, rician (B,), snr_db (B,); rad, and
        lengths in wavelengths;
        spherical: exact wavefront instead of the Fresnel one.
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
        "snr_db": snr_db,
    }
    _check(index, tensors)
    return torch.ops.ris_fast.scenes(
        index, philox.signed(seed), channel_stream, noise_stream, antennas, *tensors.values(), spherical
    )


def _check(index: Tensor, tensors: dict[str, Tensor]) -> None:
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
        "snr_db": (batch,),
    }
    for name, shape in expected.items():
        if tensors[name].shape != shape or tensors[name].dtype != torch.float32:
            raise ValueError(
                f"make_scenes: {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, expected {shape} "
                f"torch.float32 for {batch} scenes. Pass the {name} of these scenes."
            )


def _shapes(antennas: int, codes: Tensor, source: Tensor) -> tuple[tuple[int, ...], ...]:
    (batch, sources, _), (snapshots, elements, _) = source.shape, codes.shape[-3:]
    return (batch, antennas, elements, 2), (batch, snapshots, antennas, 2), (batch, elements, sources, 2)


@cache
def _native() -> Any:
    return loader.function("scenes", ARGUMENTS, restype=c_int)


def _cpp(
    index: Tensor, seed: int, channel_stream: int, noise_stream: int, antennas: int, *rest: Any
) -> tuple[Tensor, ...]:
    inputs, spherical = [each.contiguous() for each in (index, *rest[:-1])], rest[-1]
    codes, source, amplitude = inputs[2:5]
    out = tuple(source.new_empty(shape) for shape in _shapes(antennas, codes, source))
    sizes = (len(source), antennas, codes.shape[-2], codes.shape[-3], source.shape[1], amplitude.shape[1])
    if _native()(
        *(each.data_ptr() for each in (*out, *inputs)),
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


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    return _cpp(*args) if loader.available() else _plain(*args)


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels  # here, because a CPU user need not pay for triton's import

    return triton_kernels.scenes(*args)


def _fake(
    index: Tensor, seed: int, channel_stream: int, noise_stream: int, antennas: int, *rest: Any
) -> tuple[Tensor, ...]:
    codes, source = rest[1:3]
    return tuple(source.new_empty(shape) for shape in _shapes(antennas, codes, source))


LIBRARY.impl("scenes", _cpu, "CPU")
LIBRARY.impl("scenes", _triton, "CUDA")
torch.library.register_fake("ris_fast::scenes", _fake, lib=LIBRARY)


def _aot() -> list[AotCase]:
    """The three kernels at the sizes of the standard task."""
    from . import triton_kernels as kernels

    def case(
        name: str, kernel: Any, types: str, constexprs: dict[str, Any], aligned: tuple[str, ...], registers: int
    ) -> AotCase:
        signature = dict(each.split(":") for each in types.split()) | dict.fromkeys(constexprs, "constexpr")
        return AotCase(name, kernel, signature, constexprs, aligned, kernels.WARPS, max_registers=registers)

    channel = (
        "channel_ptr:*fp32 index_ptr:*i64 positions_ptr:*fp32 sight_ptr:*fp32 rician_ptr:*fp32 "
        "antennas:i32 elements:i32 scale:fp32 antenna_scale:fp32 seed:i64 stream:i64"
    )
    field = (
        "factor_ptr:*fp32 field_ptr:*fp32 positions_ptr:*fp32 source_ptr:*fp32 amplitude_ptr:*fp32 power_ptr:*fp32 "
        "symbols:i32 elements:i32 scale:fp32"
    )
    snapshot = (
        "snapshots_ptr:*fp32 channel_ptr:*fp32 field_ptr:*fp32 codes_ptr:*fp32 index_ptr:*i64 snr_db_ptr:*fp32 "
        "antennas:i32 elements:i32 snapshots:i32 symbols:i32 code_stride:i32 seed:i64 stream:i64"
    )
    shape = ("antennas", "elements")
    # 80 registers are triton 3.6 for sm_100, all others take 48 to 64: six programs, one a scene, still fit a
    # multiprocessor
    cases = [
        case(
            "snapshots",
            kernels.snapshot_kernel,
            snapshot,
            {"L": 16, "M": 16},
            ("channel_ptr", "field_ptr", "codes_ptr", *shape),
            80,
        )
    ]
    for name, spherical in (("fresnel", False), ("spherical", True)):
        law = {"SPHERICAL": spherical, "BLOCK": kernels.BLOCK}
        cases += [
            case(f"channel-{name}", kernels.channel_kernel, channel, law, ("channel_ptr", "positions_ptr", *shape), 40),
            case(
                f"field-{name}",
                kernels.field_kernel,
                field,
                {"K": 5} | law,
                ("factor_ptr", "field_ptr", "positions_ptr", "elements"),
                64,
            ),
        ]
    return cases


FAMILY = Family(
    "scenes",
    (
        # normals of 4 ulp go in where the reference in float32 has correctly rounded ones: hence 4 and not 2
        Operator(
            "scenes",
            torch.ops.ris_fast.scenes.default,
            reference.scenes,
            SAMPLES,
            cost,
            {"cpp": _cpp, "triton": _triton},
            results=3,
            error_ratio=4.0,
            dtypes=(torch.float32,),
        ),
    ),
    _aot,
)
