"""`--profile`: a few steps of a run under torch's profiler, as a Chrome trace and a table of the ten slowest_operations
operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ris_fast.files import replacing, write_text
from ris_fast.training.trainer import Trainer

FIRST, STEPS, ROWS = 12, 5, 10  # the first steps are watched densely and warm things up


class Profile:
    """Stands where the trainer's step (or its captured form) stood, and profiles calls FIRST .. FIRST + STEPS.

    From the start of one call to the end of the last, so that what lies between them, the making of scenes, is seen
    too.
    """

    def __init__(self, step: Any, folder: Path, tell: Callable[[str], None]) -> None:
        self.inner, self.folder, self.tell, self.calls = step, folder, tell, 0
        cuda = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == FIRST:
            self.profiler.start()
        result = self.inner(*arguments)
        if self.calls == FIRST + STEPS - 1:
            self.profiler.stop()
            self._write()
        return result

    def _write(self) -> None:
        with replacing(self.folder / "trace.json") as partial:
            self.profiler.export_chrome_trace(str(partial))
        text = slowest_operations(self.profiler)
        write_text(self.folder / "operations.txt", text + "\n")
        self.tell(
            f"{text}\ntrace of {STEPS} steps, for chrome://tracing or ui.perfetto.dev: {self.folder / 'trace.json'}"
        )


def profiled(trainer: Trainer, folder: Path, tell: Callable[[str], None]) -> Trainer:
    """The same trainer, which will profile some of its steps, write them into `folder` and tell what they cost."""
    make = trainer._capture

    def capture() -> None:
        make()
        if trainer.capture is not None:
            trainer.capture = Profile(trainer.capture, folder, tell)

    trainer._capture = capture
    if trainer.device.type != "cuda":
        trainer.step = Profile(trainer.step, folder, tell)
    return trainer


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
