"""What all benchmarks share: device, CPU threads, copy bandwidth, and results that name no host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.gpu.rows import note
from ris_fast import timing as measure


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest, device: torch.device) -> Iterator[int]:
    """CPU threads of torch and of our kernels; on a GPU one case is enough."""
    if device.type != "cpu" and request.param > 1:
        pytest.skip("threads matter on a CPU only")
    with measure.threads(request.param):
        yield request.param


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float:
    """Copy bandwidth in bytes per second, measured in this run."""
    return measure.copy_bandwidth(device)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In a run of bench/gpu.sh the figures of a benchmark are kept when it ends, not when all have ended."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and benchmark is not None:
        failed = {} if report.passed else {"error": str(report.longrepr)[-2000:]}
        note(item.nodeid, ok=report.passed, **benchmark.extra_info, **failed)
    return report


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Drops the host's name, so that results can be kept with the code; processor, cores and Python stay."""
    machine_info.pop("node", None)
    machine_info.pop("release", None)
