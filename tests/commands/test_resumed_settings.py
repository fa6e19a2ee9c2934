"""`train --resume` on a folder in which something is not as the run left it: it is put right or said, never passed
over."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from ris_fast.commands.cli import main
from ris_fast.commands.runner import _await_checkpoints
from ris_fast.files import WRITER, StorageError
from ris_fast.report.eventlog import read_events
from ris_fast.training import checkpoint
from tests.command_line import FEW_SCENES, SMALL_TASK, settings

NETWORK = ("model.options.width=16", "model.options.depth=1", "training.max_seconds=0", "report.plots=false")
SMALL = ["--device", "cpu", "--no-compile", "--batch-size", "16", "--precision", "fp32", "--preset", "laptop"]
START = [*SMALL, *settings(*SMALL_TASK, *FEW_SCENES, *NETWORK)]
STALLED = 4


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *START, "--epochs", "1", "--out", str(folder)]) == STALLED
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert text.count(old) == 1
    (run / "config.toml").write_text(text.replace(old, new))


def test_resume_says_which_settings_differ_from_the_checkpoint(run: Path, capsys) -> None:
    edit(run, "\nhead_lr = 0.0", "\nhead_lr = 0.9")
    assert main(["train", "--resume", str(run), "--epochs", "2", "--set", "optimizer.warmup=0.2"]) == STALLED
    notes = [line for line in capsys.readouterr().out.splitlines() if "in the checkpoint and is" in line]
    assert len(notes) == 1 and notes[0].startswith("note: optimizer.head_lr was 0.0")
    assert "in the checkpoint and is 0.9" in notes[0] and notes[0].endswith("in config.toml")


@pytest.mark.parametrize(
    "old, new, words", [("[optimizer]", "[optimizer", "not valid TOML"), ("\nepochs = 1", "\nepochs = -1", "epochs")]
)
def test_config_that_cannot_be_used_is_named_and_the_checkpoint_replaces_it(
    old: str, new: str, words: str, run: Path, capsys
) -> None:
    before = (run / "config.toml").read_text()
    edit(run, old, new)
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert str(run / "config.toml") in said and words in said and f"Or remove {run / 'config.toml'}" in said
    (run / "config.toml").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert "written anew from the settings in checkpoint 'last'" in capsys.readouterr().out
    without = [sorted(line.partition("  # ")[0] for line in text.splitlines()) for text in (before, _config(run))]
    assert without[0] == without[1]


def _config(run: Path) -> str:
    return (run / "config.toml").read_text()


@pytest.mark.parametrize("left", ["", '{"verdict": "stopped", "optimizer_steps": 2}', '{"optimizer_steps'])
def test_summary_that_a_kill_prevented_is_written_on_resume(left: str, run: Path, capsys) -> None:
    expected = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    if left:
        (run / "summary.json").write_text(left)
    assert main(["train", "--resume", str(run)]) == STALLED
    assert "nothing to train: 1 epochs are done" in capsys.readouterr().out
    found = json.loads((run / "summary.json").read_text())
    same = ("verdict", "optimizer_steps", "best_val_nmse", "val_nmse_raw", "train_loss", "baselines", "findings")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    assert found["ruled_out"]["checks"] == expected["ruled_out"]["checks"] != []


def test_resumed_run_has_the_checks_that_it_passed_when_it_began(run: Path) -> None:
    expected = json.loads((run / "summary.json").read_text())["ruled_out"]["checks"]
    for epochs in ("2", "3"):
        assert main(["train", "--resume", str(run), "--epochs", epochs]) == STALLED
    assert json.loads((run / "summary.json").read_text())["ruled_out"]["checks"] == expected
    assert len(read_events(run)) > 6


def test_write_error_in_mid_run_says_how_to_continue(run: Path, monkeypatch, capsys) -> None:
    def full(path: Path, *_: object) -> int:
        raise StorageError(path, OSError(28, "full"))

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    assert main(["train", "--resume", str(run), "--epochs", "2"]) == 3
    said = capsys.readouterr().err
    assert "No space left" in said and f"Continue with: ris-fast train --resume {run}" in said


def test_signals_while_a_checkpoint_is_written_end_nothing(terminal_signals: None, capsys) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    done: list[float] = []

    def write() -> None:
        for _ in range(2):
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        time.sleep(0.2)
        done.append(time.monotonic())

    threading.Thread(target=write, name=WRITER).start()
    _await_checkpoints()
    assert done and capsys.readouterr().err.count("ends when the checkpoint is on disk") == 2
