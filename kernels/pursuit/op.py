"""Features of scenes by Newtonized orthogonal matching pursuit as one operator; not differentiable, it reads data only.

Letters: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, F features, R columns, G grid points.
On CPU one pass of C++, a scene at a time on each thread; on CUDA Triton, up to MOST_ATOMS and MOST_ELEMENTS; elsewhere,
and where no compiler was found, plain torch.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..native import loader
from ..registration import cpp_or, register, triton_function
from ..registry import Family
from ..values import check_shapes
from . import reference
from .parallel import parallel_map
from .samples import SAMPLES, cost
from .search import Geometry, with_dictionary

SCHEMA = (
    "pursuit_features(Tensor snapshots, Tensor channel, Tensor codes, Tensor snr_db, Tensor[] constants, "
    "float wavenumber, int stages) -> (Tensor, Tensor)"
)
ARGUMENTS = [c_void_p] * 15 + [c_float] + [c_int64] * 8
CPU_CHUNK = 128  # scenes of the plain form: 21 MB of normal equations
CHOOSE = -1  # whether to form P = G^H G is left to the kernel; 1 and 0 force it
MOST_ATOMS = 9  # of Triton: the system of a step of K + 3 atoms is one square tile of registers
MOST_ELEMENTS = 4096  # of Triton: a column is one row of lanes
MOST_SIDE = 64  # of an array that Triton searches by factors: the residual is one tile; beyond, by the dictionary
NO_FACTORS = 2  # what the C++ answers where it had to read a dictionary that is empty


def _check(
    snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor, constants: list[Tensor], stages: int
) -> None:
    batch, length, antennas, _ = snapshots.shape
    elements, positions, columns = codes.shape[-2], constants[7].shape[0], constants[8].shape[-1]
    depths, wide, places, _ = constants[9].shape
    factors = bool(depths and wide and places)
    own = (batch,) if codes.dim() == 4 else ()
    expected = {
        "channel": (batch, antennas, elements, 2),
        "codes": (*own, length, elements, 2),
        "snr_db": (batch,),
        "x": (elements,),
        "y": (elements,),
        "curvature": (elements,),
        "scale": (3,),
        "low": (3,),
        "high": (3,),
        "trust": (3,),
        "grid": (positions, 3),
        "dictionary": (2 * elements, 2 * positions if columns else 0),
        "along_x": (depths, wide, places, 2),
        "along_y": (depths, elements // wide, positions // (depths * places), 2) if factors else (0, 0, 0, 2),
    }
    given = dict(zip(expected, (channel, codes, snr_db, *constants), strict=True))
    of = f"snapshots {tuple(snapshots.shape)}. Pass the {{name}} of this task and these scenes."
    check_shapes("pursuit_features", given, expected, of)
    if stages < 1 or positions < 1:
        raise ValueError(
            f"pursuit_features: {stages} stages on a grid of {positions} positions; it takes at least one of each."
        )


@cache
def _native() -> Any:
    return loader.function("pursuit_features", ARGUMENTS, restype=c_int)


def reads_dictionary(device: torch.device, geometry: Geometry, wavenumber: float, stages: int) -> bool:
    """Whether the operator reads the dictionary there: not in C++ nor in Triton where the grid has factors."""
    if wavenumber or not geometry.along_x.numel():
        return True
    if device.type == "cpu":
        return not loader.available()
    return not (device.type == "cuda" and _served(len(geometry.x), stages) and _tiled(geometry))


def _tiled(geometry: Geometry) -> bool:
    """Whether the Triton kernel takes the factors of the grid."""
    return 0 < geometry.along_x.numel() and max(geometry.along_x.shape[1], geometry.along_y.shape[1]) <= MOST_SIDE


def _served(elements: int, stages: int) -> bool:
    """Whether the Triton kernels take the size."""
    return elements <= MOST_ELEMENTS and stages <= MOST_ATOMS


def _cpp(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
    dense: int = CHOOSE,
) -> tuple[Tensor, Tensor]:
    _check(snapshots, channel, codes, snr_db, constants, stages)
    inputs = [each.float().contiguous() for each in (snapshots, channel, codes, snr_db, *constants[:9])]
    (batch, length, antennas, _), elements = snapshots.shape, codes.shape[-2]
    out = tuple(
        inputs[0].new_empty(shape)
        for shape in ((batch, reference.width(stages)), (batch, elements, 2 * reference.rank(stages)))
    )
    sizes = (batch, antennas, elements, length, stages, constants[7].shape[0], dense, codes.dim() == 4)
    failed = _native()(*(each.data_ptr() for each in (*out, *inputs)), wavenumber, *sizes)
    if failed == NO_FACTORS:
        raise ValueError(
            "pursuit_features: the dictionary is empty, and without it the grid must be a box over a rectangular array,"
            " Fresnel. Pass constants that went through search.with_dictionary."
        )
    if failed:
        raise MemoryError(
            "pursuit_features: no memory for the scratch of a thread. Lower the number of threads or the size of the"
            " array."
        )
    return out


def _plain(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
) -> tuple[Tensor, Tensor]:
    """The definition; a CPU works on chunks of CPU_CHUNK scenes, whatever the threads, so that the bits do not depend
    on them."""
    _check(snapshots, channel, codes, snr_db, constants, stages)
    geometry = with_dictionary(Geometry(*(each.float() for each in constants)), wavenumber)
    y, h, c, snr = (each.float() for each in (snapshots, channel, codes, snr_db))
    work = partial(reference.pursuit_features, constants=list(geometry), wavenumber=wavenumber, stages=stages)
    if snapshots.device.type != "cpu":
        return work(y, h, c, snr)
    chunks = [each.split(CPU_CHUNK) for each in (y, h, snr)]
    chunks.insert(2, c.split(CPU_CHUNK) if c.dim() == 4 else [c] * len(chunks[0]))
    parts = parallel_map(work, zip(*chunks))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


_launch = triton_function(__package__, "pursuit_features")


def _triton(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
) -> tuple[Tensor, Tensor]:
    """The Triton kernels where they serve the size, else plain torch."""
    if not _served(codes.shape[-2], stages):
        return _plain(snapshots, channel, codes, snr_db, constants, wavenumber, stages)
    _check(snapshots, channel, codes, snr_db, constants, stages)
    geometry = Geometry(*(each.float() for each in constants))
    factored = not wavenumber and _tiled(geometry)
    constants = list(geometry if factored else with_dictionary(geometry, wavenumber))
    return _launch(snapshots, channel, codes, snr_db, constants, wavenumber, stages, factored)


def _fake(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
) -> tuple[Tensor, Tensor]:
    batch, elements = snapshots.shape[0], codes.shape[-2]
    new = partial(torch.empty, device=snapshots.device, dtype=torch.float32)
    return new((batch, reference.width(stages))), new((batch, elements, 2 * reference.rank(stages)))


OPERATOR = register(
    SCHEMA,
    cpu=cpp_or(_plain, _cpp),
    cuda=_triton,
    fake=_fake,
    reference=reference.pursuit_features,
    samples=SAMPLES,
    cost=cost,
    backends={"cpp": _cpp, "triton": _triton},
    limits={"triton": f"up to {MOST_ATOMS} atoms and {MOST_ELEMENTS:,} elements, plain torch beyond"},
    results=2,
    dtypes=(torch.float32,),
)
pursuit_features = OPERATOR.call
FAMILY = Family("pursuit", (OPERATOR,))
