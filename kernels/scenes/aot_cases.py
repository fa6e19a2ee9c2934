"""The three Triton kernels at the sizes of the standard task, for compilation ahead of time."""

from __future__ import annotations

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels

POINTERS = ("channel", "positions", "los_direction", "rician", "factor", "field", "source", "amplitude", "power")
POINTERS = (*POINTERS, "snapshots", "codes", "snr_db")
TYPES = {f"{name}_ptr": "*fp32" for name in POINTERS} | {"index_ptr": "*i64"}
TYPES |= dict.fromkeys(("antennas", "elements", "snapshots", "symbols", "code_stride"), "i32")
TYPES |= {"scale": "fp32", "antenna_scale": "fp32", "seed": "i64", "stream": "i64"}
SHAPE = ("antennas", "elements")
# 80 registers for the snapshots are triton 3.6 for sm_100, all others take 48 to 64: six programs, one a scene, still
# fit a multiprocessor.
SNAPSHOT_REGISTERS, CHANNEL_REGISTERS, FIELD_REGISTERS = 80, 40, 64


def cases() -> list[AotCase]:
    """The snapshots, and channel and field for both wavefronts."""
    aligned = ("channel_ptr", "field_ptr", "codes_ptr", *SHAPE)
    snapshots = _case("snapshots", kernels.snapshot_kernel, {"L": 16, "M": 16}, aligned, SNAPSHOT_REGISTERS)
    return [snapshots, *_wavefront("fresnel", False), *_wavefront("spherical", True)]


def _wavefront(name: str, spherical: bool) -> list[AotCase]:
    law = {"SPHERICAL": spherical, "BLOCK": kernels.BLOCK}
    channel, field = ("channel_ptr", "positions_ptr", *SHAPE), ("factor_ptr", "field_ptr", "positions_ptr", "elements")
    return [
        _case(f"channel-{name}", kernels.channel_kernel, law, channel, CHANNEL_REGISTERS),
        _case(f"field-{name}", kernels.field_kernel, {"K": 5} | law, field, FIELD_REGISTERS),
    ]


def _case(name: str, kernel: object, constexprs: dict[str, object], aligned: tuple[str, ...], most: int) -> AotCase:
    return aot_case(name, kernel, TYPES, constexprs, aligned, kernels.WARPS, max_registers=most)
