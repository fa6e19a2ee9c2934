"""Places and records that are broken: named in one line with the right exit code, or passed by where they are only a
record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ris_fast.commands.cli import main
from ris_fast.commands.run_folder import run_lock
from ris_fast.files import remove_leftovers
from ris_fast.report.eventlog import read_events
from tests.commands.test_runs import PLOTS, SMALL

QUICK = [*SMALL, "--set", "health.preflight=false"]
LONG = "n" * 300


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *QUICK, *PLOTS, "--epochs", "1", "--out", str(folder)]) == 4
    return folder


@pytest.fixture()
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    "out, code, words",
    [
        ("dangling", 2, "a link that leads nowhere"),
        ("loop", 2, "a link that leads nowhere"),
        (LONG, 3, "File name too long"),
        ("file", 2, "is a file"),
        ("", 2, "--out is empty"),
        ("loop/run", 3, "loop cannot be written"),
        ("file/run", 3, "cannot be written"),
    ],
)
def test_train_names_an_impossible_out_folder(
    out: str, code: int, words: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere/x", "dangling")
    os.symlink("loop", "loop")
    Path("file").touch()
    before = sorted(os.listdir())
    assert main(["train", *QUICK, "--out", out]) == code
    assert words in capsys.readouterr().err and sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [["train", "--resume", LONG], ["train", LONG], ["train", "--data", LONG], ["evaluate", LONG], ["why", LONG]],
)
def test_commands_name_an_overlong_path_without_traceback(
    arguments: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (2, 3)
    said = capsys.readouterr().err
    assert LONG in said and "File name too long" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["train", "--out="], "--out"),
        (["train", "--resume", ""], "--resume"),
        (["train", "--data", ""], "--data"),
        (["evaluate", ""], "an argument"),
        (["simulate", "--scenes", "4", "--out", ""], "--out"),
    ],
)
def test_commands_refuse_an_empty_path(arguments: list[str], name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert f"{name} is empty" in capsys.readouterr().err and not os.listdir()


def garbage(run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe garbage\n[1]\n{"step": "x"}\n')


def no_plots(run: Path) -> None:
    shutil.rmtree(run / "plots")


def plots_are_a_file(run: Path) -> None:
    no_plots(run)
    (run / "plots").touch()


def metrics_are_a_folder(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


def summary_is_a_folder(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "summary.json").mkdir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm, told",
    [
        (garbage, ""),
        (no_plots, ""),
        (plots_are_a_file, "picture of the losses is not complete, training goes on"),
        (metrics_are_a_folder, "metrics.jsonl or summary.json is not complete, training goes on"),
        (summary_is_a_folder, "metrics.jsonl or summary.json is not complete"),
    ],
)
def test_resume_survives_broken_plots_metrics_and_summary(harm, told: str, run: Path, capsys) -> None:
    harm(run)
    pictures = [] if "plots" in harm.__name__ else ["--set", "report.plots=false"]
    assert main(["train", "--resume", str(run), "--epochs", "2", *pictures]) == 4
    said = capsys.readouterr()
    assert (
        told in said.out and said.out.count("training goes on") <= 2 and "Epoch 002/002" in said.out and said.err == ""
    )
    assert json.loads((run / "checkpoints" / "last.json").read_text())["state"]["epoch"] == 2


def test_read_events_skips_or_names_broken_rows(run: Path) -> None:
    rows = read_events(run)
    garbage(run)
    assert read_events(run, skip_broken=True)[: len(rows)] == rows
    with pytest.raises(ValueError, match=f"line {len(rows) + 1}: not JSON"):
        read_events(run)


def test_damaged_checkpoint_error_offers_the_whole_one(run: Path, capsys) -> None:
    for name, other in (("best", "last"), ("last", "best")):
        path = run / "checkpoints" / f"{name}.safetensors"
        content = bytearray(whole := path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        assert main(["evaluate", str(path), "--device", "cpu"]) == 3
        assert main(["train", "--resume", str(path), "--epochs", "2"]) == 3
        said = capsys.readouterr().err
        offered = str(run / "checkpoints" / f"{other}.safetensors")
        assert said.count(f"'{other}' is whole; give {offered} in its place") == 2
        assert main(["evaluate", offered, "--device", "cpu"]) == 0
        path.write_bytes(whole)


def test_run_lock_removes_partial_files_of_dead_processes(run: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    places = [
        run / "checkpoints" / f".last.safetensors.{number}.partial" for number in (dead.pid, os.getpid(), os.getppid())
    ]
    for path in (*places, run / ".notes.partial", run / "plots" / f".loss.png.{dead.pid}.partial"):
        path.write_text("half")
    with run_lock(run):
        left = {path.name for path in run.rglob("*.partial")}
    assert left == {places[2].name, ".notes.partial"}
    assert remove_leftovers(run) == []
