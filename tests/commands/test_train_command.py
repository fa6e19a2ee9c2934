"""What surrounds a run: its folder, its exit code, and what is said when it ends before its time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ris_fast.commands import run_folder
from ris_fast.commands import train as launch
from ris_fast.commands.cli import main
from ris_fast.config.load import load_config, render_toml
from ris_fast.config.schema import ConfigError
from ris_fast.data.errors import DataError
from ris_fast.training import batch_size as memory
from ris_fast.training import trainer as loop
from ris_fast.training.ranks.group import ALONE
from ris_fast.training.state import RunStopped
from ris_fast.training.step import Step
from tests.command_line import settings

TINY = ["train", "--preset", "laptop", "--device", "cpu", "--set", "report.plots=false", "--batch-size", "64"]


class Ends:
    """A trainer whose run ends in a given way."""

    outcome: Any = None

    def __init__(self, config: Any, folder: Path | None = None, **_: Any) -> None:
        self.config, self.folder, self.callbacks, self.device = config, folder, [], torch.device("cpu")
        self.source, self.notes, self.network = SimpleNamespace(notes=[]), [], SimpleNamespace(compiled=False)
        self.ranks = ALONE

    def fit(self) -> dict[str, Any]:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return {"verdict": self.outcome}


def run(outcome: Any, monkeypatch, tmp_path: Path) -> int:
    monkeypatch.setattr(Ends, "outcome", outcome)
    monkeypatch.setattr(loop, "Trainer", Ends)
    monkeypatch.setattr(launch, "attach_run_health", lambda trainer, folder, *, preflight, report: None)
    return main([*TINY, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "outcome, code",
    [
        ("learned", 0),
        ("stalled", 4),
        ("stopped", 4),
        (RunStopped("no step was applied", "steps_skipped"), 4),
        (DataError("x.npz", "y", "NaN", "finite values", "Write it again."), 3),
        (ConfigError("no such device"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_train_exit_code_says_how_the_run_ended(outcome: Any, code: int, monkeypatch, tmp_path, capsys) -> None:
    assert run(outcome, monkeypatch, tmp_path) == code
    if isinstance(outcome, Exception):
        assert str(outcome) in capsys.readouterr().err


def test_interrupt_names_the_resume_command_if_there_is_one(monkeypatch, tmp_path, capsys) -> None:
    assert run(KeyboardInterrupt(), monkeypatch, tmp_path) == 130
    assert "No checkpoint" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.safetensors").touch()
    assert run(KeyboardInterrupt(), monkeypatch, tmp_path) == 130
    assert f"ris-fast train --resume {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "outcome", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_out_of_memory_names_the_batch_size_that_fits(outcome: BaseException, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(memory, "one_step_fits", lambda config: config.training.batch_size <= 10)
    assert run(outcome, monkeypatch, tmp_path) == 5
    assert "--batch-size 8 --accumulate 8 fits" in capsys.readouterr().err


def test_out_of_memory_says_when_not_one_scene_fits(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(memory, "one_step_fits", lambda config: False)
    assert run(MemoryError(), monkeypatch, tmp_path) == 5
    assert "Not even one scene fits" in capsys.readouterr().err


def test_one_step_fits_tells_what_fits_in_memory(monkeypatch) -> None:
    config = load_config(
        None,
        "laptop",
        ["training.compile=false", "data.train_scenes=8"],
        {"training.device": "cpu", "training.batch_size": 4},
    )
    assert memory.one_step_fits(config)

    def too_much(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(Step, "__call__", too_much)
    assert not memory.one_step_fits(config)


def test_train_exits_70_with_a_traceback_on_a_bug(monkeypatch, tmp_path, capsys) -> None:
    assert run(RuntimeError("a bug"), monkeypatch, tmp_path) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: a bug" in said


def test_new_folder_gives_each_run_its_own(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(preset="laptop")
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    first = run_folder.new_folder(config, None)
    assert first.is_dir()
    assert [str(first), str(run_folder.new_folder(config, None))] == [
        "runs/20260101-000000-laptop",
        "runs/20260101-000000-laptop-2",
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml"])
def test_new_folder_refuses_a_folder_that_holds_a_run(name: str, tmp_path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="--resume"):
        run_folder.new_folder(load_config(preset="laptop"), tmp_path)


def test_resumed_config_keeps_settings_and_provenance(tmp_path) -> None:
    config = load_config(None, "original", ["task.snapshots=8", "model.options.width=64"], {"training.epochs": 3})
    (tmp_path / "config.toml").write_text(render_toml(config))
    again = run_folder.resumed_config(tmp_path, {}, ["training.seed=5"], {"training.epochs": 4})
    expected = replace(config, training=replace(config.training, epochs=4, seed=5))
    assert again == expected
    assert again.provenance["task.snapshots"] == "--set" and again.provenance["training.epochs"] == "flag"
    assert again.provenance["optimizer.head_lr"] == "preset original" and again.provenance["task.symbols"] == "default"
    assert again.provenance["model.options.width"] == "--set" and again.provenance["training.seed"] == "--set"


def test_train_prints_findings_at_once_with_their_fix(tmp_path, capsys) -> None:
    small = settings(
        *("task.ris_horizontal=4", "task.ris_vertical=4", "task.bs_antennas=4", "data.train_scenes=128"),
        *("data.val_scenes=32", "model.options.width=16", "optimizer.backbone_lr=1e-9", "optimizer.head_lr=1e-9"),
        "training.max_seconds=0",
    )
    command = [*TINY, *small, "--no-compile", "--epochs", "12", "--out", str(tmp_path / "a run")]
    assert main(command) in (0, 4)
    text = capsys.readouterr().out
    found = text.index("found before the first step: learning_rate_too_small: the whole run can move")
    assert found < text.index("  fix: ", found) < text.index("Epoch 001") < text.index("findings, most certain first: ")
    assert text.rindex("  fix: ") > text.index("findings, most certain first: ") and "more: ris-fast why '" in text


def test_training_loads_nothing_of_the_benchmarks(tmp_path) -> None:
    """Also what the run loads as it goes: a whole short run in a process of its own."""
    sizes = ["task.ris_horizontal=4", "task.ris_vertical=4", "task.bs_antennas=4", "model.options.width=16"]
    sizes += ["data.train_scenes=128", "data.val_scenes=32", "training.compile=false", "training.max_seconds=0"]
    arguments = [*TINY, *(word for each in sizes for word in ("--set", each)), "--epochs", "1", "--profile"]
    code = f"""
import sys
from ris_fast.commands.cli import main
assert main({[*arguments, "--out", str(tmp_path / "run")]!r}) in (0, 4)
loaded = [name for name in sys.modules if name.startswith("ris_fast.benchmarks")]
assert "ris_fast.training.mfu" in sys.modules and not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
