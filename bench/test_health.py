"""What watching costs: a step that is read against one that is not, alternating in one process, as a share of training.

Run: pytest bench/test_health.py --benchmark-json=bench/results/health-overhead.json
CPU seconds are the process's own, so that a busy machine does not count; on a GPU, wall seconds between synchronisations.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable

import pytest
import torch

from ris_fast.health.watch import EVERY, watch
from ris_fast.settings import load_config
from ris_fast.training.loop import Trainer

PAIRS = 15


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternating(device: str, off: Callable[[], Any], on: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of either, taken in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(PAIRS + 2):
        for which, call in enumerate((off, on)):
            began = clock(device)
            call()
            if number >= 2:
                seconds[which].append(clock(device) - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


@pytest.mark.parametrize("preset, batch", [("laptop", 256), ("seed", 64)])
def test_a_step_that_is_read(benchmark: Any, device: str, preset: str, batch: int) -> None:
    config = load_config(None, preset, ["training.compile=false"], {"training.device": device, "training.batch_size": batch})
    trainer = Trainer(config)
    group, telemetry = next(trainer._groups()), trainer.step.telemetry

    def step(read: bool) -> None:
        telemetry.enabled, telemetry.calls = read, 0
        trainer.step(group, 1000)
        if read:
            telemetry.read(telemetry.sample(), 1)

    off, on = alternating(device, lambda: step(False), lambda: step(True))
    benchmark.pedantic(lambda: step(True), rounds=3)
    every = config.report.every_steps
    benchmark.extra_info.update(preset=preset, batch=batch, step_s=off, read_step_s=on, every_steps=every,
                                share_of_training=(on - off) / off / every)


def test_a_plain_loop_under_watch(benchmark: Any, device: str) -> None:
    """A perceptron of a million weights; with the default sampling one step in a hundred is looked at."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(layer for _ in range(4) for layer in (torch.nn.Linear(512, 512), torch.nn.GELU()))).to(device)
    optimizer, data = torch.optim.AdamW(model.parameters(), lr=1e-4), torch.randn(256, 512, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    plain = statistics.median(_timed(device, step) for _ in range(PAIRS))
    seen = watch(model, optimizer)
    looked = statistics.median(_timed(device, step) for _ in range(8))
    between = statistics.median(_timed(device, step) for _ in range(PAIRS))
    benchmark.pedantic(step, rounds=3)
    seen.close()
    benchmark.extra_info.update(step_s=plain, looked_at_step_s=looked, other_step_s=between, every=EVERY,
                                share_of_training=((looked - plain) / EVERY + max(0.0, between - plain)) / plain)


def _timed(device: str, call: Callable[[], None]) -> float:
    began = clock(device)
    call()
    return clock(device) - began
