"""A network of one's own through the commands: written, checked, trained, continued, evaluated, predicted with."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from ris_fast import exit_codes
from ris_fast.commands.cli import main
from tests.command_line import SMALL_TASK, settings

SETTINGS = settings(
    *SMALL_TASK,
    "data.train_scenes=128",
    "data.val_scenes=64",
    "data.test_scenes=128",
    "training.batch_size=32",
    "model.options.width=32",
    "training.device=cpu",
    "report.plots=false",
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["new-model", "net.py"]) == exit_codes.DONE
    return tmp_path / "net.py"


def test_new_model_goes_through_every_command(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = ["--set", "model.name=net.py:BeamNet", *SETTINGS]
    assert main(["check", *named]) == exit_codes.DONE
    assert main(["train", *named, "--epochs", "1", "--out", "run"]) in (exit_codes.DONE, exit_codes.NOT_LEARNED)
    assert main(["train", "--resume", "run", "--epochs", "2"]) in (exit_codes.DONE, exit_codes.NOT_LEARNED)
    file.rename("moved.py")
    capfd.readouterr()
    assert main(["evaluate", "run", "--no-positions"]) == exit_codes.USAGE
    assert "there is no file" in capfd.readouterr().err
    config = Path("run/config.toml")
    config.write_text(config.read_text().replace("net.py", "moved.py"))
    assert main(["evaluate", "run", "--no-positions", "--json"]) == exit_codes.DONE
    found = json.loads(capfd.readouterr().out)
    assert found["model"] == "moved.py:BeamNet" and "least_squares" in found["baselines"]
    assert main(["simulate", "--out", "data", "--scenes", "16", *settings(*SMALL_TASK)]) == exit_codes.DONE
    assert main(["predict", "run", "--data", "data", "--out", "found.npz", "--count", "2"]) == exit_codes.DONE
    assert main(["mismatch", "run", "--scenes", "32", "--against", "task.snr_max_db=10"]) == exit_codes.DONE


def test_new_model_leaves_what_is_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = file.read_text()
    assert main(["new-model", "net.py"]) == exit_codes.USAGE
    assert "is there already, and stays" in capsys.readouterr().err and file.read_text() == text
    assert main(["new-model", "net"]) == exit_codes.USAGE
    assert "ends in .py" in capsys.readouterr().err


def test_new_model_is_python_by_itself(file: Path) -> None:
    assert "BeamNet" in runpy.run_path(str(file))


def test_a_name_that_is_close_is_offered(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in {
        "nett.py:BeamNet": "Did you mean 'net.py'?",
        "net.py:Beamnet": "Did you mean 'BeamNet'?",
        "net:BeamNt": "Did you mean 'BeamNet'?",
        "hybird": "Did you mean 'hybrid'?",
        "nett:BeamNet": "there is no module 'nett'",
    }.items():
        assert main(["check", "--set", f"model.name={name}"]) == exit_codes.USAGE
        assert said in capsys.readouterr().err, name
