"""How fast the pursuit's features are made: C++ against plain torch, by array size, atoms, instruction set and form.

Run: pytest bench/test_features.py (add --benchmark-json FILE). One thread; variants alternate in one process, and the
figure to read on a busy machine is processor time a scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import record

from ris_fast.config.schema import Task
from ris_fast.kernels.native import loader
from ris_fast.kernels.pursuit import op
from ris_fast.kernels.pursuit.search import with_dictionary
from ris_fast.models.features import PursuitFeatures
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate
from ris_fast.timing import Found, alternate, threads

CPU = torch.device("cpu")
SIDES = (8, 12, 16, 24, 32)
pytestmark = pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def arguments(batch: int, side: int = 12, wavefront: str = "fresnel", atoms: int = 0) -> tuple[Any, ...]:
    """Operator arguments of drawn scenes, M = L = 16 and K = 5."""
    task = Task(ris_horizontal=side, ris_vertical=side, wavefront=wavefront)
    model, scenes = PursuitFeatures(task, atoms or task.max_sources), simulate(task, batch, SceneGenerator(3, "val"))
    constants = list(with_dictionary(model.geometry(), model.wavenumber))
    return scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db, constants, model.wavenumber, model.atoms


def measured(
    benchmark: Any,
    runs: dict[str, Callable[[], Any]],
    batch: int,
    *,
    quiet: int = 200,
    seconds: float = 2.0,
    **facts: Any,
) -> None:
    found: Found = alternate(runs, CPU, quiet=quiet, seconds=seconds, least=5)
    benchmark.extra_info["core_us_a_scene"] = {name: 1e6 * each["processor_s"] / batch for name, each in found.items()}
    record(benchmark, found, "C++", batch=batch, **facts)
    benchmark.pedantic(runs["C++"], rounds=3)


@pytest.mark.parametrize("side", SIDES)
def test_features(benchmark: Any, side: int) -> None:
    """Both forms of the kernel and plain torch, N = 64 to 1024; plain torch up to 576, beyond which its matrices take
    0.6 GB."""
    batch = 256 if side <= 12 else 32 if side <= 16 else 8
    args = arguments(batch, side)
    runs = {
        "C++": lambda: op._cpp(*args),
        "C++ with P": lambda: op._cpp(*args, dense=1),
        "C++ through H": lambda: op._cpp(*args, dense=0),
    }
    if side <= 24:
        runs["plain torch"] = lambda: op._plain(*args)
    measured(benchmark, runs, batch, quiet=20, seconds=4.0, elements=side * side)


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_batch(benchmark: Any, batch: int, wavefront: str) -> None:
    """What a call costs beyond its scenes; a spherical wavefront has no short search of the grid."""
    args = arguments(batch, wavefront=wavefront)
    runs = {"C++": lambda: op._cpp(*args), "plain torch": lambda: op._plain(*args)}
    measured(benchmark, runs, batch, wavefront=wavefront)


@pytest.mark.parametrize("atoms", [1, 2, 3, 5, 8])
def test_atoms(benchmark: Any, atoms: int) -> None:
    """Work grows with the square of the atoms."""
    args = arguments(128, atoms=atoms)
    runs = {"C++": lambda: op._cpp(*args), "plain torch": lambda: op._plain(*args)}
    measured(benchmark, runs, 128, atoms=atoms)


@pytest.mark.parametrize("simd", loader.supported_levels())
def test_instruction_set(benchmark: Any, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = loader.function("pursuit_features", op.ARGUMENTS, simd, op.c_int)
    monkeypatch.setattr(op, "_native", lambda: native)
    args = arguments(256)
    runs = {"C++": lambda: op._cpp(*args)}
    measured(benchmark, runs, 256, seconds=1.0, simd=simd)
