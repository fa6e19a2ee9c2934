"""The Triton kernels at the sizes of the standard task, for compilation ahead of time; those with a steering vector for
both wavefronts."""

from __future__ import annotations

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels
from .triton_solve import solve_kernel

POINTERS = ("snapshots", "channel", "codes", "snr_db", "levels", "moment", "gram", "columns", "image", "inner")
POINTERS += ("residual", "scores", "grid", "position", "fit", "residual_correlation", "explained", "inputs", "basis")
POINTERS += ("stage_positions", "stage_amplitudes", "x", "y", "curvature", "scale", "low", "high", "trust")
POINTERS += ("along_x", "along_y")
INTEGERS = ("code_stride", "antennas", "elements", "snapshots", "positions", "atoms", "atom", "width", "wide", "high")
INTEGERS += ("positions_u", "positions_v", "positions_w")
TYPES = {f"{name}_ptr": "*fp32" for name in POINTERS} | dict.fromkeys(INTEGERS, "i32")
TYPES |= dict.fromkeys(("norm", "wavenumber", "energy", "ratio"), "fp32")
ALIGNED = (*(f"{name}_ptr" for name in POINTERS), "antennas", "elements", "snapshots", "positions", "code_stride")
STAGES, ELEMENTS = 5, 256  # atoms; lanes that 144 elements take
LANES, WARPS = kernels.LANES, kernels.WARPS


# Registers, for triton 3.6 and 3.9 together. A program of `solve` is one warp, a scene: twelve fit a multiprocessor.
SOLVE_16, SOLVE_32, INNER_16, INNER_32, GRAM, SCENE, SEARCH, BASIS, LITTLE = 96, 168, 96, 216, 200, 80, 104, 48, 48


def cases() -> list[AotCase]:
    """Every kernel of a call, in its order."""
    stages = {"STAGES": STAGES}
    inner, basis = stages | {"STRIP": kernels.STRIP}, stages | {"ATOMS": 8, "ROWS": kernels.ROWS, "SIZE": 32}
    search = stages | {"WIDE": 16, "HIGH": 16, "TILE": kernels.TILE}
    inputs = stages | {"ATOMS": 8, "LANES": 32, "EARLY_LANES": 16}
    return [
        _case("scene", kernels.scene_kernel, {"LANES": LANES, "STRIP": kernels.WIDE_STRIP}, SCENE),
        _case("gram", kernels.gram_kernel, {"SIDE": kernels.SIDE}, GRAM, wide=True),
        _case("search", kernels.search_kernel, search, SEARCH, 2 * WARPS),
        _case("pick", kernels.pick_kernel, stages | {"LANES": LANES}, LITTLE),
        *_wavefronts("tangents", kernels.tangents_kernel, stages | {"LANES": ELEMENTS}, LITTLE),
        _case("inner-16", kernels.inner_kernel, inner | {"SIZE": 16}, INNER_16),
        _case("inner-32", kernels.inner_kernel, inner | {"SIZE": 32}, INNER_32),
        _case("solve-16", solve_kernel, stages | {"SIZE": 16}, SOLVE_16, warps=1),
        _case("solve-32", solve_kernel, stages | {"SIZE": 32}, SOLVE_32, warps=1),
        _case("residual", kernels.residual_kernel, stages | {"LANES": ELEMENTS}, LITTLE),
        _case("inputs", kernels.inputs_kernel, inputs, LITTLE, warps=1),
        *_wavefronts("basis", kernels.basis_kernel, basis, BASIS),
    ]


def _wavefronts(name: str, kernel: object, sizes: dict[str, int], most: int) -> list[AotCase]:
    return [
        _case(f"{name}-{kind}", kernel, sizes | {"SPHERICAL": kind == "spherical"}, most)
        for kind in ("fresnel", "spherical")
    ]


def _case(
    name: str, kernel: object, constexprs: dict[str, object], most: int, warps: int = WARPS, wide: bool = False
) -> AotCase:
    return aot_case(name, kernel, TYPES, constexprs, ALIGNED, warps, max_registers=most, wide=wide)
