"""Puts rivals measured side by side into pytest-benchmark's results. How time is taken: ris_fast/timing.py."""

from __future__ import annotations

from typing import Any

import torch

from ris_fast.kernels.native import loader
from ris_fast.timing import Found, times_slower


def record(benchmark: Any, found: Found, ours: str, **facts: Any) -> None:
    """Every variant's figures, and its time over ours by the clock and by the processor, into extra_info."""
    benchmark.extra_info.update(variants=found, times_slower_than_ours=times_slower(found, found[ours]["s"]))
    if found[ours]["processor_s"]:
        slower = times_slower(found, found[ours]["processor_s"], "processor_s")
        benchmark.extra_info["processor_times_slower_than_ours"] = slower
    benchmark.extra_info.update(backend=loader.describe(), torch=torch.__version__, **facts)
