"""Whole trainings of the default model: scenes a second, phases, memory, energy, growth, time to a target NMSE.

Run: pytest bench/test_training.py --benchmark-json=bench/results/training.json
Simulation and features are included everywhere. Figures are in extra_info, with versions and commit. On a GPU the same
tests run with the preset `full`, larger batches and fewer limits; about four minutes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ris_fast.benchmarks import training
from ris_fast.benchmarks.device import energy, launches_and_waits
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.timing import conditions

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = (64, 256, 1024, 2048, 4096, 8192, 16384) if CUDA else (64, 256, 1024, 4096, 16384)
USUAL = 1024 if CUDA else 256
TARGET_SECONDS = 60.0


def config_of(preset: str = "default") -> Config:
    """`default` is the preset that `ris-fast train` takes here by itself."""
    config = load_config(preset=("full" if CUDA else "laptop") if preset == "default" else preset)
    return replace(config, training=replace(config.training, device=str(DEVICE)))


def keep(benchmark: Any, **found: Any) -> None:
    benchmark.extra_info.update(found, conditions=conditions(DEVICE))
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.benchmark(group="scenes a second by batch size")
@pytest.mark.parametrize(
    "preset, size",
    [("default", size) for size in SIZES] + [("original", size) for size in (SIZES if CUDA else (64, 256))],
)
def test_rate_by_batch_size(benchmark: Any, preset: str, size: int) -> None:
    """The trainer's own loop; wanted in scenes/s: default model on two cores 1,500, `original` on a GPU 200,000."""
    scenes = 2**17 if CUDA else (2**13 if preset == "default" else 2**9)
    keep(benchmark, rows=training.by_batch(config_of(preset), (size,), scenes, compile=CUDA))


@pytest.mark.benchmark(group="phases of a step")
@pytest.mark.parametrize("batch_size", [64, USUAL, 16 * 1024 if CUDA else 2048])
def test_phases(benchmark: Any, batch_size: int) -> None:
    keep(benchmark, **training.phases(config_of(), batch_size))


@pytest.mark.benchmark(group="MFU, launches, waits, energy")
@pytest.mark.parametrize("preset, batch_size", [("default", USUAL), ("original", USUAL if CUDA else 64)])
def test_efficiency(benchmark: Any, preset: str, batch_size: int) -> None:
    """Products of the trainable part over one large product's rate, measured in the same run."""
    config = config_of(preset)
    call, trainer = training.step_call(config, batch_size)
    keep(
        benchmark,
        **training.efficiency(config, batch_size),
        counts=launches_and_waits(call, trainer.device),
        energy=energy(call, trainer.device, batch_size),
        peak_memory_bytes=training.peak_memory(trainer.device),
    )


@pytest.mark.benchmark(group="growth with the array")
def test_growth_with_elements(benchmark: Any) -> None:
    """N = 64 to 1024; wanted: linear, an exponent of about one over the number of elements."""
    configs = {side * side: training.with_array(config_of(), side) for side in training.ARRAYS}
    keep(benchmark, **training.growth(configs, USUAL if CUDA else 64))


@pytest.mark.benchmark(group="growth with the number of tensors")
def test_growth_with_tensors(benchmark: Any) -> None:
    """Perceptrons of 2 to 64 blocks, six tensors each."""
    configs = {depth: training.with_depth(config_of(), depth) for depth in (2, 8, 32, 64)}
    keep(benchmark, **training.growth(configs, 64))


@pytest.mark.benchmark(group="growth with the data set")
def test_growth_with_the_data_set(benchmark: Any) -> None:
    """Seconds a scene with 10,000, 100,000 and a million scenes an epoch; wanted: flat, an exponent of zero."""
    configs = {
        size: replace(config_of(), data=replace(config_of().data, train_scenes=size))
        for size in (10_000, 100_000, 1_000_000)
    }
    keep(benchmark, **training.growth(configs, USUAL))


@pytest.mark.benchmark(group="time to a target NMSE")
def test_time_to_target(benchmark: Any) -> None:
    """One run that anneals towards its end; validation included; None where the target was not reached."""
    keep(benchmark, **training.time_to_target(config_of(), TARGET_SECONDS))
