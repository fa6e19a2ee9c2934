"""The Triton kernels at the sizes of the standard task, for compilation ahead of time; those with a steering vector for
both wavefronts."""

from __future__ import annotations

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels
from .triton_solve import solve_kernel

POINTERS = ("snapshots", "channel", "codes", "snr_db", "levels", "moment", "gram", "columns", "image", "inner")
POINTERS += ("residual", "scores", "grid", "position", "fit", "residual_correlation", "explained", "inputs", "basis")
POINTERS += ("stage_positions", "stage_amplitudes", "x", "y", "curvature", "scale", "low", "high", "trust")
INTEGERS = ("code_stride", "antennas", "elements", "snapshots", "positions", "atoms", "atom", "width")
TYPES = {f"{name}_ptr": "*fp32" for name in POINTERS} | dict.fromkeys(INTEGERS, "i32")
TYPES |= {"norm": "fp32", "wavenumber": "fp32"}
ALIGNED = (*(f"{name}_ptr" for name in POINTERS), "antennas", "elements", "snapshots", "positions", "code_stride")
STAGES, ELEMENTS = 5, 256  # atoms; lanes that 144 elements take
LANES, STRIP, SIDE, WARPS = kernels.LANES, kernels.STRIP, kernels.SIDE, kernels.WARPS


def cases() -> list[AotCase]:
    """Every kernel of a call, in its order."""
    stages = {"STAGES": STAGES}
    return [
        _case("scene", kernels.scene_kernel, {"LANES": LANES, "STRIP": STRIP}),
        _case("gram", kernels.gram_kernel, {"SIDE": SIDE}),
        _case("pick", kernels.pick_kernel, stages | {"LANES": LANES}),
        *_wavefronts("tangents", kernels.tangents_kernel, stages | {"LANES": ELEMENTS}),
        *(_case(f"inner-{size}", kernels.inner_kernel, stages | {"SIZE": size, "STRIP": STRIP}) for size in (16, 32)),
        *(_case(f"solve-{size}", solve_kernel, stages | {"SIZE": size}, warps=1) for size in (16, 32)),
        _case("residual", kernels.residual_kernel, stages | {"LANES": ELEMENTS}),
        _case("inputs", kernels.inputs_kernel, stages | {"ATOMS": 8, "LANES": 32, "EARLY_LANES": 16}, warps=1),
        *_wavefronts("basis", kernels.basis_kernel, stages | {"ATOMS": 8, "STRIP": STRIP, "SIZE": 32}),
    ]


def _wavefronts(name: str, kernel: object, sizes: dict[str, int]) -> list[AotCase]:
    return [
        _case(f"{name}-{kind}", kernel, sizes | {"SPHERICAL": kind == "spherical"}) for kind in ("fresnel", "spherical")
    ]


def _case(name: str, kernel: object, constexprs: dict[str, object], warps: int = WARPS, most: int = 255) -> AotCase:
    return aot_case(name, kernel, TYPES, constexprs, ALIGNED, warps, max_registers=most)
