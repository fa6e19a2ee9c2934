"""What `bench/gpu.sh` can do, in the order of its worth; seconds are limits, which add up to the time of a run."""

from __future__ import annotations

import sys
from typing import NamedTuple

PYTHON = (sys.executable, "-W", "ignore", "-m")
# What torch and its compiler have to say to their authors is no error here, as it is in the tests elsewhere.
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"),
    *("-o", "pythonpath="),  # the checkout's ris_fast lacks ris_fast.kernels where it is not installed as editable
    *(word for kind in ("User", "Future", "Deprecation") for word in ("-W", f"ignore::{kind}Warning")),
)


class Stage(NamedTuple):
    """A command, its limit in seconds, and its small form for a trial on any machine."""

    seconds: int
    command: tuple[str, ...]
    small: tuple[str, ...]


def _bench(name: str, wanted: str, small: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """pytest of one file of benchmarks, the cases that a GPU is asked for and the quickest one."""
    return tuple((*PYTEST, f"bench/test_{name}.py", "-k", cases) for cases in (wanted, small))


def _train(preset: str, seconds: int, *options: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    tiny = ("data.train_scenes=1024", "data.val_limit=64", "training.batch_size=256", "training.compile=false")
    small = [word for each in (*tiny, "health.preflight=false", "training.device=cpu") for word in ("--set", each)]
    width = ("--set", "model.options.width=64")
    return (
        (*PYTHON, "bench.gpu.train", preset, str(seconds), *options),
        (*PYTHON, "bench.gpu.train", preset, "60", "--epochs", "2", "--precision", "fp32", *small, *width),
    )


_GPU_TESTS = ("tests/kernels", "tests/training", "tests/data", "tests/gradcheck", "tests/physics", "-m", "gpu")
STAGES: dict[str, Stage] = {
    "smoke": Stage(75, *((*PYTHON, "bench.gpu.smoke"),) * 2),
    "train_full": Stage(110, *_train("full", 40)),
    "tests": Stage(
        80,
        (*PYTEST, "-n", "8", *_GPU_TESTS, "-k", "not compiled"),
        (*PYTEST, "tests/training/test_capture.py", "-k", "captured_call"),
    ),
    "fused_step": Stage(25, *_bench("fused_step", "16340000-150-1", "host_time and 2]")),
    "cov_nmse": Stage(60, *_bench("cov_nmse", "512-144 or 4096-144", "1-thread-low-rank-64-64")),
    "loop": Stage(60, *_bench("training", "rate and default and (2048 or 8192)", "rate and default-64]")),
    # ---- a second run: what is left of the time ----
    "train_original": Stage(130, *_train("original", 85)),
    "gradcheck": Stage(90, *((*PYTHON, "bench.gpu.gradcheck"),) * 2),
    "step": Stage(100, *_bench("train_step", "step_against_peers and original and bf16", "launches")),
    "check": Stage(40, (*PYTHON, "ris_fast", "check", "--preset", "full"), (*PYTHON, "ris_fast", "env")),
    "step_full": Stage(80, *_bench("train_step", "step_against_peers and full", "launches")),
    "cov_nmse_64": Stage(40, *_bench("cov_nmse", "rank-64-144 or dense-64-144", "1-thread-low-rank-64-64")),
    "loop_by_batch": Stage(60, *_bench("training", "rate or phases", "phases and 64]")),
    "efficiency": Stage(40, *_bench("training", "efficiency", "efficiency and default")),
    "tests_compiled": Stage(
        80,
        (*PYTEST, "-n", "4", "tests/training/test_capture.py", "-m", "gpu", "-k", "compiled"),
        (*PYTEST, "tests/training/test_capture.py", "-k", "captured_call"),
    ),
    "simulation": Stage(30, *_bench("simulation", "test_simulate and 1]", "test_simulate and 64-1]")),
    "features": Stage(60, *_bench("features_gpu", "fresnel", "64-fresnel")),
    "host_time": Stage(25, *_bench("fused_step", "host_time", "host_time and 2]")),
}
