"""What watching costs: a step that is read against one that is not, alternating in one process, as a share of training.

Run: pytest bench/test_health.py --benchmark-json=bench/results/health-overhead.json
With one thread, because a second one that waits for a busy core spins, and its waiting counts as work.
CPU seconds are the process's own, so that a busy machine does not count; on a GPU, wall seconds between
synchronisations. `load` is the machine's load average beside its cores: what else ran takes caches and memory bandwidth
all the same.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast import timing as measure
from ris_fast.config.load import load_config
from ris_fast.health.watch import watch
from ris_fast.training.telemetry.settings import RunSettings
from ris_fast.training.trainer import Trainer

ROUNDS = 40
FIRST, LATER = 100, 300  # steps of a plain loop


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with measure.threads(1):
        yield


def clock(device: torch.device) -> float:
    measure.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def alternating(device: torch.device, *variants: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of the first variant, then the median of what each other one takes more in the same round."""
    seconds: list[list[float]] = [[] for _ in variants]
    for number in range(rounds + 2):  # two to warm up
        for taken, call in zip(seconds, variants):
            began = clock(device)
            call()
            if number >= 2:
                taken.append(clock(device) - began)
    first = seconds[0]
    return [
        statistics.median(first),
        *(statistics.median(b - a for a, b in zip(first, other)) for other in seconds[1:]),
    ]


def load() -> dict[str, Any]:
    return {"load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", "threads": torch.get_num_threads()}


def recording(device: torch.device, optimizer: Any, repeats: int = 200) -> float:
    """Seconds to put the record of one step into the ring, as every step does."""

    def record() -> None:
        for _ in range(repeats):
            for bucket in optimizer.buckets:
                bucket.record()

    return alternating(device, lambda: None, record, rounds=5)[1] / repeats


def noting_scenes(device: torch.device, ring: Any, group: Any, repeats: int = 50) -> float:
    """Seconds to note the scenes of one step in their ring, as every step does."""

    def note() -> None:
        for _ in range(repeats):
            ring.begin()
            for scenes in group:
                ring.add(scenes)
            ring.close()

    return alternating(device, lambda: None, note, rounds=5)[1] / repeats


@pytest.mark.parametrize("preset, batch", [("laptop", 256), ("original", 64)])
def test_a_step_that_is_read(benchmark: Any, device: torch.device, preset: str, batch: int) -> None:
    """A report's reading, its ring of records included, spread over the steps between two reports, and each step's
    record."""
    config = load_config(
        None, preset, ["training.compile=false"], {"training.device": device.type, "training.batch_size": batch}
    )
    trainer = Trainer(config)
    group, telemetry = next(trainer._groups()), trainer.step.telemetry

    def step(read: bool) -> None:
        telemetry.enabled, telemetry.calls = read, 0
        trainer.step(group, 1000)
        if read:
            telemetry.read(telemetry.sample(), 1)

    plain, reading = alternating(
        device, lambda: step(False), lambda: step(True), rounds=ROUNDS if preset == "laptop" else 15
    )
    benchmark.pedantic(lambda: step(True), rounds=3)
    every, record = config.report.every_steps, recording(device, trainer.optimizer)
    settings = RunSettings(trainer.model, trainer.loss, trainer.optimizer, config)
    again = alternating(device, lambda: None, settings.changes, rounds=15)[1]
    noting = noting_scenes(device, telemetry.ring, group)
    benchmark.extra_info.update(
        preset=preset,
        batch=batch,
        step_s=plain,
        reading_s=reading,
        record_s=record,
        settings_s=again,
        scenes_s=noting,
        every_steps=every,
        **load(),
        share_of_training=((reading + again) / every + record + noting) / plain,
    )


def loop(device: torch.device, width: int, depth: int) -> tuple[Callable[[], None], torch.nn.Module, Any]:
    """A step of a plain loop, a perceptron; its model and optimizer."""
    torch.manual_seed(0)
    layers = (layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.GELU()))
    model = torch.nn.Sequential(*layers).to(device)
    optimizer, data = torch.optim.AdamW(model.parameters(), lr=1e-4), torch.randn(256, width, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()

    return step, model, optimizer


@pytest.mark.parametrize("width, depth, repeats", [(512, 4, 5), (128, 50, 1)], ids=["8_tensors", "100_tensors"])
def test_a_plain_loop_under_watch(benchmark: Any, device: torch.device, width: int, depth: int, repeats: int) -> None:
    """Two loops step by turns, one of them watched from the beginning: the first steps, which are looked at most, and
    the later ones. Each pair is made anew `repeats` times, since where its tensors lie in memory counts as much as a
    watch; and as often without a watch, which says how exact the figures are."""
    shares: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name in ("alone", "watched"):
            early, late = by_turns(device, width, depth, name == "watched")
            shares.setdefault(f"{name}_first", []).append(_excess(early))
            shares.setdefault(f"{name}_later", []).append(_excess(late))
    step, model, optimizer = loop(device, width, depth)
    watch(model, optimizer)
    benchmark.pedantic(step, rounds=3)
    benchmark.extra_info.update(
        step_s=float(np.median(late[:, 0])),
        steps=(FIRST, LATER),
        **load(),
        repeats=repeats,
        share_of_training=float(np.median(shares["watched_later"])),
        share_of_first_steps=float(np.median(shares["watched_first"])),
        shares=shares,
    )


def by_turns(device: torch.device, width: int, depth: int, watched: bool) -> tuple[np.ndarray, np.ndarray]:
    """(FIRST, 2) and (LATER, 2) seconds of the steps of two loops, the second of which may be watched."""
    loops = [loop(device, width, depth) for _ in range(2)]
    for step, *_ in loops:
        step()  # what the first step alone does is nobody's
    seen = watch(*loops[1][1:]) if watched else None
    seconds = np.zeros((FIRST + LATER, 2))
    for number, pair in enumerate(seconds):
        for which in (0, 1) if number % 2 else (1, 0):
            began = clock(device)
            loops[which][0]()
            pair[which] = clock(device) - began
    if seen is not None:
        seen.close()
    return seconds[:FIRST], seconds[FIRST:]


def _excess(seconds: np.ndarray) -> float:
    """What the second loop takes more, of the first."""
    return float((seconds[:, 1] - seconds[:, 0]).sum() / seconds[:, 0].sum())
