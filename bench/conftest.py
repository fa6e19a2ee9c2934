"""What all benchmarks share: results that name no host, so that they can be kept with the code."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Drops the host's name; processor, cores and Python stay."""
    machine_info.pop("node", None)
    machine_info.pop("release", None)
