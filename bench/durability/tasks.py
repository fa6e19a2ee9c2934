"""The small runs and data sets of the campaign, and what they make undisturbed."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.durability import reading
from bench.durability.processes import Server

TASK = ("task.ris_horizontal=4", "task.ris_vertical=4", "task.bs_antennas=4", "task.snapshots=4", "task.max_sources=2")
SIZES = ("data.val_scenes=24", "data.test_scenes=8", "data.val_limit=24")
COMMON = (
    *TASK,
    *SIZES,
    "training.precision=fp32",
    "training.compile=false",
    "training.max_seconds=0",
    "report.plots=false",
    "health.preflight=false",
)
HYBRID = ("width=16", "heads=2", "layers=1", "feedforward=16", "grid=5", "dropout=0.1")
OPTIONS = {"original": HYBRID, "laptop": ("width=16", "depth=1")}  # preset -> its network, small
NPZ_TASK = ("task.ris_horizontal=6", "task.ris_vertical=4", "task.snapshots=8", "task.max_sources=3")


@dataclass(frozen=True)
class Mode:
    """A way to train: its settings, its preset, and its data (simulate, shards or npz)."""

    settings: tuple[str, ...]
    preset: str = "laptop"
    data: str = "simulate"

    def arguments(self, out: Path, prepared: Prepared) -> list[str]:
        words = ["train", "--preset", self.preset, "--device", "cpu", "--out", str(out)]
        if self.data != "simulate":
            words += ["--data", str(prepared.folder / self.data)]
        options = (f"model.options.{each}" for each in OPTIONS[self.preset])
        return [*words, *(word for text in (*COMMON, *options, *self.settings) for word in ("--set", text))]


def mode(scenes: int, batch: int, accumulate: int, epochs: int, every: float, *more: str, **how: str) -> Mode:
    """Args: every: seconds after which the last checkpoint is due."""
    sizes = {
        "data.train_scenes": scenes,
        "training.batch_size": batch,
        "training.accumulate": accumulate,
        "training.epochs": epochs,
        "report.checkpoint_seconds": every,
    }
    return Mode((*(f"{key}={value}" for key, value in sizes.items()), *more), **how)


MODES = {
    "hybrid, simulated, accumulated": mode(20, 4, 2, 3, 0.03, "report.every_steps=4", preset="original"),
    "simulated, short epochs": mode(8, 4, 1, 12, 0.05),
    "shards": mode(40, 8, 1, 5, 0.02, data="shards"),
    "shards, accumulated, saved at each step": mode(40, 4, 3, 4, 0.001, "report.every_steps=20", data="shards"),
    "npz": mode(36, 6, 1, 4, 0.03, *NPZ_TASK, data="npz"),
    "the same scenes, early stopping": mode(
        24, 8, 1, 8, 0.04, "data.fixed=true", "training.patience=2", "optimizer.head_lr=0.1"
    ),
}
SIMULATED = ("task.ris_horizontal=2", "task.ris_vertical=2", "task.bs_antennas=2", "task.snapshots=2")


def simulate_arguments(out: Path, scenes: int = 17000, settings: tuple[str, ...] = SIMULATED) -> list[str]:
    words = ["simulate", "--out", str(out), "--scenes", str(scenes), "--device", "cpu"]
    return [*words, *(word for text in settings for word in ("--set", text))]


def resume_arguments(run: Path) -> list[str]:
    return ["train", "--resume", str(run)]


@dataclass
class Prepared:
    """What every trial starts from and is compared with; `seconds` that the undisturbed commands took."""

    folder: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # of the data set "simulated"


def prepare(folder: Path, server: Server, only: Collection[str] = MODES) -> Prepared:
    """Makes the data sets, runs modes undisturbed, all or `only` these, and leaves runs that are half done."""
    from tests.data.make_npz import SMALL, write_folders  # imports torch

    prepared = Prepared(folder)
    folder.mkdir(parents=True)
    small = (*TASK,)
    _run(server, simulate_arguments(folder / "shards", 48, small), folder)
    write_folders(folder / "npz", train=36, val=24, test=8, task=SMALL)
    ended = _run(server, simulate_arguments(folder / "simulated"), folder)
    prepared.seconds["simulate"], prepared.files = ended.seconds, reading.files(folder / "simulated")
    for name in only:
        run = folder / f"run {name}"
        ended = _run(server, MODES[name].arguments(run, prepared), folder)
        prepared.results[name], prepared.epochs[name] = reading.result(run), reading.epochs(run)
        prepared.seconds[name] = ended.seconds
    for name in set(HALF) & set(only):
        _half_done(server, prepared, name)
    return prepared


TRIES = 8  # to hit a command before it ends
HALF = ("hybrid, simulated, accumulated", "shards", "npz")  # modes of which there is a run that was interrupted


def half_done(prepared: Prepared, name: str) -> Path:
    """The folder of a run of a mode that Ctrl-C ended; to be copied."""
    return prepared.folder / f"half {name}"


def _half_done(server: Server, prepared: Prepared, name: str) -> None:
    run = half_done(prepared, name)
    for _ in range(TRIES):
        shutil.rmtree(run, ignore_errors=True)
        server.start(MODES[name].arguments(run, prepared), prepared.folder)
        while reading.best_score(run) is None and server.wait(0.01) is None:
            pass
        ended = server.kill(signal.SIGINT)
        if ended.code == 130 and reading.checkpoint(run, "last") is not None:
            return
    raise RuntimeError(f"half of '{name}': {ended.code} {ended.text[-400:]}")


def _run(server: Server, arguments: list[str], folder: Path) -> Any:
    ended = server.run(arguments, folder)
    if not ended.trained:
        raise RuntimeError(f"ris-fast {' '.join(arguments)}: {ended.code}\n{ended.text}")
    return ended


def moment(random_numbers: random.Random, seconds: float) -> float:
    """Within the time that a command takes."""
    return random_numbers.uniform(0.0, seconds)
