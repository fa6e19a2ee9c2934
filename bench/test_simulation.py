"""How fast scenes and random numbers are made: scenes per second and per CPU-second, by batch, threads and phase.

Run: pytest bench/test_simulation.py --benchmark-json=bench/results/simulation.json
Figures are in extra_info of every benchmark: medians with 20/80 percentiles; a repetition in which the process waited
for a core is set aside, and how many were is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.kernels.native import loader
from ris_fast.kernels.philox import op as philox
from ris_fast.kernels.scenes import op as scenes
from ris_fast.physics import scenes as physics
from ris_fast.physics.random import SceneGenerator
from ris_fast.timing import alternate, threads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASK, GENERATOR = Task(), SceneGenerator(seed=1, device=DEVICE)
REPETITIONS, SECONDS = 25, 1.5


def rates(benchmark: Any, call: Callable[[], Any], items: int, unit: str, **facts: Any) -> None:
    """Seconds of a call, and items a second of the clock and of a processor, into extra_info."""
    found = alternate({"ours": call}, DEVICE, quiet=REPETITIONS, seconds=SECONDS, warm=1)["ours"]
    by = {f"{unit}_per_s": items / found["s"]} | (
        {f"{unit}_per_cpu_s": items / found["processor_s"]} if found["processor_s"] else {}
    )
    benchmark.extra_info.update(found | by, backend=loader.describe(), torch=torch.__version__, **facts)
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="simulate")
@pytest.mark.parametrize("count", [1, 2] if DEVICE.type == "cpu" else [1])
@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
def test_simulate(benchmark: Any, batch: int, count: int) -> None:
    """Whole scenes of the standard task, from their numbers."""
    with threads(count):
        rates(benchmark, lambda: physics.simulate(TASK, batch, GENERATOR), batch, "scenes", threads=count)


def kernel_arguments(batch: int) -> tuple[Any, ...]:
    """What `simulate` hands to the kernel."""
    seen: list[tuple[Any, ...]] = []

    def spy(index: torch.Tensor, **call: Any) -> tuple[torch.Tensor, ...]:
        order = [argument.name for argument in torch.ops.ris_fast.scenes.default._schema.arguments[1:]]
        seen.append((index, *(call[name] for name in order)))
        return scenes.make_scenes(index, **call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(physics, "make_scenes", spy)
        physics.simulate(TASK, batch, GENERATOR)
    return seen[0]


PHASES: dict[str, Callable[[torch.Tensor, tuple[Any, ...]], Any]] = {
    "draws, and scenes of 4 elements": lambda index, _: physics.simulate(
        Task(ris_horizontal=2, ris_vertical=2, bs_antennas=16), index, GENERATOR
    ),
    "random numbers": lambda index, _: (
        GENERATOR.normal(index, "channel", 4608),
        GENERATOR.normal(index, "noise", 512),
    ),
    "fused kernel": lambda _, args: torch.ops.ris_fast.scenes(*args),
    "plain torch instead": lambda _, args: scenes._plain(*args),
}


@pytest.mark.benchmark(group="phases of simulate, 256 scenes, one thread")
@pytest.mark.parametrize("phase", PHASES)
def test_phase(benchmark: Any, phase: str) -> None:
    """Time of one phase; "plain torch instead" is the losing form of the kernel, with the same random numbers."""
    args = kernel_arguments(256)
    with threads(1):
        rates(benchmark, lambda: PHASES[phase](args[0], args), 256, "scenes", phase=phase)


@pytest.mark.benchmark(group="normals, 256 x 5120")
@pytest.mark.parametrize("source", [*loader.supported_levels(), "torch.randn"])
def test_normals(benchmark: Any, source: str) -> None:
    """Counter-based normals by instruction set, into memory that is there already, against torch's own."""
    index, out = torch.arange(256), torch.empty(256, 5120)
    if source == "torch.randn":
        call = lambda: out.normal_()  # noqa: E731
    else:
        fill = loader.function("philox_normal", philox.ARGUMENTS, source)
        call = lambda: fill(out.data_ptr(), index.data_ptr(), 256, 5120, 1, 2)  # noqa: E731
    with threads(1):
        rates(benchmark, call, out.numel(), "normals", source=source)
