"""`--profile`: a few steps of a run under torch's profiler, as a Chrome trace and a table of the slowest operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ris_fast.files import replacing, write_text
from ris_fast.training.callback import Callback

FIRST, STEPS, ROWS = 12, 5, 10  # the first steps are watched densely and warm things up


class Profile(Callback):
    """Profiles steps FIRST .. FIRST + STEPS - 1 of this process, writes them into `folder` and reports what they cost.

    From the start of the first to the end of the last, so that what lies between them, the making of scenes, is seen
    too.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self.folder, self.report, self.steps = folder, report, 0
        cuda = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, *cuda],
            acc_events=True,  # one cycle is all there is, and torch 2.11 warns without
        )

    def on_step_start(self) -> None:
        self.steps += 1
        if self.steps == FIRST:
            self.profiler.start()

    def on_step_end(self) -> None:
        if self.steps == FIRST + STEPS - 1:
            self.profiler.stop()
            self._write()

    def _write(self) -> None:
        with replacing(self.folder / "trace.json") as partial:
            self.profiler.export_chrome_trace(str(partial))
        text = slowest_operations(self.profiler)
        write_text(self.folder / "operations.txt", text + "\n")
        self.report(
            f"{text}\ntrace of {STEPS} steps, for chrome://tracing or ui.perfetto.dev: {self.folder / 'trace.json'}"
        )


def slowest_operations(profiler: Any, rows: int = ROWS) -> str:
    """The operations that took the most time themselves, on the device where there is one: a line for each."""
    found = profiler.key_averages()
    cost = (
        (lambda e: e.self_device_time_total)
        if any(e.self_device_time_total for e in found)
        else (lambda e: e.self_cpu_time_total)
    )
    total = max(sum(cost(event) for event in found), 1e-9)
    lines = [
        f"{event.key[:60]:60} {cost(event) / STEPS * 1e-3:9.3f} ms {cost(event) / total:5.0%}"
        f" {event.count / STEPS:8.1f} calls"
        for event in sorted(found, key=cost, reverse=True)[:rows]
    ]
    return "\n".join([f"the {rows} slowest operations, a step (time of their own)", *lines])
