"""The Triton kernels at the sizes of the standard task, for compilation ahead of time; those with a steering vector for
both wavefronts."""

from __future__ import annotations

from ..registry import AotCase, aot_case
from . import triton_kernels as kernels
from .search import EXTRA
from .triton_search import LANES, TILE, pick_kernel, residual_kernel, search_kernel

POINTERS = (
    "snapshots",
    "channel",
    "codes",
    "snr_db",
    "levels",
    "moment",
    "gram",
    "normal",
    "columns",
    "image",
    "state",
)
POINTERS += ("task", "residual", "scores", "grid", "inputs", "basis", "along_x", "along_y")
INTEGERS = ("code_stride", "antennas", "elements", "snapshots", "positions", "atoms", "atom", "last", "steps", "retry")
INTEGERS += ("width", "wide", "high", "positions_u", "positions_v", "positions_w")
TYPES = {f"{name}_ptr": "*fp32" for name in POINTERS} | {"flags_ptr": "*i32"}
TYPES |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(("norm", "wavenumber", "energy", "ratio"), "fp32")
ALIGNED = (*(f"{name}_ptr" for name in (*POINTERS, "flags")), "antennas", "elements", "snapshots", "code_stride")
ALIGNED += ("positions",)
STAGES, ELEMENTS, WARPS = 5, 144, kernels.WARPS

# Registers, for triton 3.6 and 3.9 together. A program of `step` is two warps, a scene, up to 32 unknowns and eight
# beyond: at 168 registers six fit a multiprocessor, at 255 four.
STEP, GRAM, SCENE, SEARCH, BASIS, LITTLE = 255, 200, 80, 104, 48, 48


def cases() -> list[AotCase]:
    """Every kernel of a call, in its order."""
    slots = {"A": STAGES + EXTRA}
    both = slots | {"STAGES": STAGES}
    search = slots | {"WIDE": 16, "HIGH": 16, "TILE": TILE}
    inputs = both | {"ATOMS": 8, "LANES": 32, "EARLY_LANES": 16}
    return [
        _case("scene", kernels.scene_kernel, {"LANES": kernels.LANES, "STRIP": kernels.WIDE_STRIP}, SCENE),
        _case("gram", kernels.gram_kernel, {"SIDE": kernels.SIDE}, GRAM, wide=True),
        _case("search", search_kernel, search, SEARCH, 2 * WARPS),
        _case("residual", residual_kernel, slots | {"LANES": 256}, LITTLE),
        _case("pick", pick_kernel, slots | {"LANES": LANES}, LITTLE),
        *_steps(3),
        *_steps(STAGES),
        *_steps(STAGES + EXTRA),
        _case("inputs", kernels.inputs_kernel, inputs, LITTLE, warps=1),
        *_wavefronts("basis", kernels.basis_kernel, both | {"ATOMS": 8, "ROWS": kernels.ROWS, "SIZE": 32}, BASIS),
    ]


def _steps(atoms: int) -> list[AotCase]:
    sizes = {"STAGES": STAGES, "A": STAGES + EXTRA, **kernels.step_sizes(atoms, ELEMENTS)}
    warps = sizes.pop("num_warps")
    return _wavefronts(f"step-{sizes['SIZE']}", kernels.step_kernel, sizes, STEP, warps)


def _wavefronts(name: str, kernel: object, sizes: dict[str, int], most: int, warps: int = WARPS) -> list[AotCase]:
    return [
        _case(f"{name}-{kind}", kernel, sizes | {"SPHERICAL": kind == "spherical"}, most, warps)
        for kind in ("fresnel", "spherical")
    ]


def _case(
    name: str, kernel: object, constexprs: dict[str, object], most: int, warps: int = WARPS, wide: bool = False
) -> AotCase:
    return aot_case(name, kernel, TYPES, constexprs, ALIGNED, warps, max_registers=most, wide=wide)
