"""How fast the pursuit's features are made on a GPU, by batch: Triton against plain torch, each in a CUDA graph.

Run: pytest bench/test_features_gpu.py (add --benchmark-json FILE). In a graph, because that is how a step runs it; the
time of one call launched by the host is beside it. Bytes by the formula of `triton_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import record

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit import op
from ris_fast.kernels.pursuit.samples import triton_bytes
from ris_fast.kernels.pursuit.search import with_dictionary
from ris_fast.models.features import PursuitFeatures
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate
from ris_fast.timing import alternate
from ris_fast.training.capture import CudaGraph

BATCHES = (64, 512, 2048, 4096)
PLAIN_BATCH = 2048  # beyond, plain torch takes more memory than it is worth
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def arguments(batch: int, wavefront: str, device: torch.device) -> tuple[Any, ...]:
    """Operator arguments of drawn scenes of the standard task."""
    task = Task(wavefront=wavefront)
    model = PursuitFeatures(task, task.max_sources).to(device)
    scenes = simulate(task, batch, SceneGenerator(3, "val", str(device)))
    constants = list(with_dictionary(model.geometry(), model.wavenumber))  # plain torch reads it
    return scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db, constants, model.wavenumber, model.atoms


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as the replay of a graph; compiled and warm before."""
    for _ in range(2):
        call()
    return CudaGraph(call).replay


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
@pytest.mark.parametrize("batch", BATCHES)
def test_features_on_gpu(benchmark: Any, batch: int, wavefront: str, device: torch.device, bandwidth: float) -> None:
    args = arguments(batch, wavefront, device)
    ours = captured(lambda: op._triton(*args))
    runs: dict[str, Callable[[], Any]] = {"triton": ours, "triton, no graph": lambda: op._triton(*args)}
    if batch <= PLAIN_BATCH:
        runs["plain torch"] = captured(lambda: op._plain(*args))
    found = alternate(runs, device, quiet=50, seconds=4.0, least=5)
    (_, length, antennas, _), elements = args[0].shape, args[1].shape[2]
    rate = batch * triton_bytes(antennas, length, elements, args[-1]) / found["triton"]["s"]
    facts = {"scenes_per_s": batch / found["triton"]["s"], "bytes_per_s": rate, "share_of_copy": rate / bandwidth}
    record(benchmark, found, "triton", batch=batch, wavefront=wavefront, **facts)
    benchmark.pedantic(ours, rounds=3)
