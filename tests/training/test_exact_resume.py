"""20 steps are 10, a resumption and 10 more, to the last bit: whatever ended the run, and wherever its scenes come
from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.data.write import write_shards
from ris_fast.health.monitor.attach import attach_health
from ris_fast.training.callback import Callback
from ris_fast.training.checkpoint import load_checkpoint
from ris_fast.training.schedule import learning_rate_factor
from ris_fast.training.state import RunStopped
from ris_fast.training.step_seed import seed_step, step_seed
from ris_fast.training.trainer import Trainer
from tests.data.make_npz import SMALL, write_folders
from tests.training.test_trainer import Recorder

TASK = [f"task.{key}={value}" for key, value in asdict(SMALL).items() if isinstance(value, int)]
COMMON = [
    *TASK,
    "data.val_scenes=12",
    "data.test_scenes=8",
    "data.val_limit=12",
    "training.compile=false",
    "training.precision=fp32",
    "training.max_seconds=0",
    "training.device=cpu",
    "report.every_steps=4",
]
PERCEPTRON = ["model.options.width=16", "model.options.depth=1"]
HYBRID = [f"model.options.{each}" for each in ("width=16", "heads=2", "layers=1", "feedforward=16", "grid=5")]
TIMED = ("seconds", "scenes_per_s", "mfu")


def config(*overrides: str, scenes: int = 28, batch: int = 4, epochs: int = 3, preset: str = "laptop") -> Config:
    """7 steps an epoch, 3 epochs: 21 steps."""
    sizes = [f"data.train_scenes={scenes}", f"training.batch_size={batch}", f"training.epochs={epochs}"]
    network = HYBRID if preset == "original" else PERCEPTRON
    return load_config(preset=preset, overrides=[*COMMON, *network, *sizes, *overrides])


class AtStep(Callback):
    """Does something before a step of this number, counted from 1."""

    def __init__(self, trainer: Trainer, number: int, then: Callable[[Trainer], None]) -> None:
        self.trainer, self.number, self.then = trainer, number, then
        trainer.callbacks.append(self)

    def on_step_start(self) -> None:
        if self.trainer.state.step == self.number - 1:
            self.then(self.trainer)


def interrupted(trainer: Trainer) -> None:
    raise KeyboardInterrupt


def due(trainer: Trainer) -> None:
    trainer.saved -= 1e6


def killed_within_the_step(trainer: Trainer) -> None:
    """After the first of its micro-batches; what is on disk by then is what a kill leaves."""
    trainer.writer.finish()
    accumulate, seen = trainer.step._accumulate, []

    def broken(*arguments: Any) -> Any:
        if seen:
            raise ZeroDivisionError
        seen.append(arguments)
        return accumulate(*arguments)

    trainer.step._accumulate = broken


def cut(settings: Config, folder: Path, how: str) -> None:
    """Ten steps and an end: Ctrl-C, or a kill two steps behind the last checkpoint, within an accumulation."""
    trainer = Trainer(settings, folder)
    if how == "interrupt":
        AtStep(trainer, 11, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    else:
        AtStep(trainer, 10, due)  # saved before step 11
        AtStep(trainer, 12, killed_within_the_step)
        with pytest.raises(ZeroDivisionError):
            trainer.fit()


def rows(recorder: Recorder) -> list[dict[str, Any]]:
    """The epochs as they are reported, without what the clock decides and without what this process made of them."""
    return [{key: row[key] for key in row.keys() - {"health", *TIMED}} for row in recorder.epochs]


def assert_same(one: Path, other: Path) -> None:
    for name in ("last", "best"):
        (groups, manifest), (expected, whole) = (load_checkpoint(run / "checkpoints", name) for run in (one, other))
        assert groups.keys() == expected.keys()
        for prefix, group in groups.items():
            assert group.keys() == expected[prefix].keys()
            assert all(value.equal(expected[prefix][key]) for key, value in group.items()), (name, prefix)
        states = [{key: each["state"][key] for key in each["state"] if key not in TIMED} for each in (manifest, whole)]
        assert states[0] == states[1] and manifest["planned_steps"] == whole["planned_steps"]


CASES = {
    "dropout": ("kill", ["model.options.dropout=0.2", "training.accumulate=2"], {"preset": "original", "batch": 2}),
    "within an accumulation": ("kill", ["training.accumulate=3"], {"scenes": 20, "batch": 1}),
    "the same scenes, early stopping": (
        "interrupt",
        ["data.fixed=true", "training.patience=2", "optimizer.head_lr=1e-12", "optimizer.backbone_lr=1e-12"],
        {"epochs": 9},
    ),
    "fp16": ("kill", ["training.precision=fp16", "training.accumulate=2"], {"scenes": 28, "batch": 2}),
    "without averages": ("interrupt", ["optimizer.ema_decay=0"], {}),
    "shards": ("kill", ["training.accumulate=2"], {"batch": 2}),
    "npz": ("interrupt", [], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_and_ten_more_are_twenty_bitwise(case: str, tmp_path: Path) -> None:
    how, overrides, sizes = CASES[case]
    if case == "shards":
        write_shards(config(), tmp_path / "data", {"train": 28, "val": 12, "test": 8}, shard_scenes=10)
    if case == "npz":
        write_folders(tmp_path / "data", train=28)
    data = [f"data.path={tmp_path / 'data'}"] if case in ("shards", "npz") else []
    settings = config(*overrides, *data, **sizes)
    whole = Trainer(settings, tmp_path / "whole", [told := Recorder()])
    whole.fit()
    settings = whole.config  # with what the data made of it, as config.toml has it
    cut(settings, tmp_path / "cut", how)
    torch.rand(3)  # whoever draws numbers in between
    resumed = Trainer(settings, tmp_path / "cut", [again := Recorder()], resume=True)
    assert resumed.state.step == 10 and resumed.state.epoch_step > 0
    resumed.fit()
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert rows(again) == rows(told)[1:] and len(told.epochs) >= 2
    if "stopping" in case:
        assert told.summary["epochs"] == again.summary["epochs"] < 9
    if case == "fp16":
        assert again.epochs[-1]["loss_scale"] == told.epochs[-1]["loss_scale"] is not None


def test_checks_and_other_draws_do_not_change_a_run(tmp_path: Path) -> None:
    """With dropout: preflight, and callbacks that draw from torch's own generator."""
    settings = config("model.options.dropout=0.2", epochs=1, scenes=12, preset="original")
    Trainer(settings, tmp_path / "plain").fit()
    watched = attach_health(Trainer(settings, tmp_path / "watched"), stop=False)
    for step in range(1, 4):
        AtStep(watched, step, lambda trainer: torch.manual_seed(99))
    watched.fit()
    assert_same(tmp_path / "watched", tmp_path / "plain")


def test_step_seed_depends_on_each_argument() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == len({seed % 2**32 for seed in seeds}) == 1000 and max(seeds) < 2**64
    seed_step(torch.device("cpu"), 1, 2)
    first = torch.rand(4)
    seed_step(torch.device("cpu"), 1, 2)
    assert torch.rand(4).equal(first)
    seed_step(torch.device("cpu"), 1, 2, rank=1)
    assert not torch.rand(4).equal(first)


def test_run_interrupted_within_validation_keeps_the_loss_of_the_epoch(tmp_path: Path) -> None:
    Trainer(config(epochs=2), tmp_path / "whole", [told := Recorder()]).fit()
    trainer = Trainer(config(epochs=2), tmp_path / "cut")
    score = trainer._score
    trainer._score = lambda *given, **named: interrupted(trainer) if trainer.state.step else score(*given, **named)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = Trainer(config(epochs=2), tmp_path / "cut", [again := Recorder()], resume=True)
    assert (resumed.state.step, resumed.state.epoch) == (7, 0)
    resumed.fit()
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert rows(again) == rows(told)


def poisoned(trainer: Trainer, steps: range) -> Trainer:
    """Its gradients are not finite in these steps, counted from 0."""
    scale = trainer.optimizer.scale
    trainer.optimizer.scale = lambda loss: scale(loss) * (torch.nan if trainer.state.step in steps else 1.0)
    return trainer


def test_skipped_steps_in_a_row_are_counted_across_a_resumption(tmp_path: Path) -> None:
    settings = config("training.max_skipped=5", "report.every_steps=1", "health.min_applied=0")

    def stopped(trainer: Trainer) -> int:
        with pytest.raises(RunStopped, match="last 5 steps was non-finite"):
            trainer.fit()
        return trainer.state.step

    assert stopped(poisoned(Trainer(settings), range(7, 20))) == 12
    trainer = poisoned(Trainer(settings, tmp_path), range(7, 20))
    AtStep(trainer, 11, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert stopped(poisoned(Trainer(settings, tmp_path, resume=True), range(7, 20))) == 12


class Ticking(Callback):
    """A clock that a step moves on by an eighth of a second, and nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def on_step_end(self) -> None:
        self.now += 0.125


def limited(seconds: float) -> Config:
    return config(f"training.max_seconds={seconds}", "report.every_steps=1", epochs=10)


def test_time_limited_run_resumes_bitwise_by_the_same_clock(tmp_path: Path, monkeypatch) -> None:
    """The length of its schedule depends on the clock, and a checkpoint has the length that was planned last."""
    clock = Ticking(monkeypatch)
    Trainer(limited(2.5), tmp_path / "whole", [clock, told := Recorder()]).fit()
    assert told.summary["optimizer_steps"] == 20 and told.steps[-1]["planned_steps"] == 20
    trainer = Trainer(limited(2.5), tmp_path / "cut", [clock])
    AtStep(trainer, 11, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    clock.now += 500.0  # between the two processes
    Trainer(limited(2.5), tmp_path / "cut", [clock, again := Recorder()], resume=True).fit()
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert [row["lr"] for row in again.steps] == [row["lr"] for row in told.steps[10:]]


@pytest.mark.parametrize("more, planned", [(3.75, 30), (0.0, 10 + 8 * 7)])
def test_time_limited_run_resumed_with_another_limit_replans_at_once(
    more: float, planned: int, tmp_path: Path, monkeypatch
) -> None:
    """By the steps and seconds so far; with no limit by its epochs, of which the one that the
    time cut short counts as one."""
    clock = Ticking(monkeypatch)
    Trainer(limited(1.25), tmp_path, [clock]).fit()
    resumed = Trainer(limited(more), tmp_path, [clock, told := Recorder()], resume=True)
    begun, rates = resumed.state.step, {group["name"]: group["peak_lr"] for group in resumed.optimizer.param_groups}
    assert begun == 10 and resumed.plan.planned == planned
    AtStep(resumed, begun + 5, interrupted)
    with pytest.raises(KeyboardInterrupt):
        resumed.fit()
    settings = resumed.config.optimizer
    for row in told.steps:
        factor = learning_rate_factor(row["step"] - 1, planned, settings.warmup, settings.final_lr)
        assert row["lr"] == {name: peak * factor for name, peak in rates.items()}
