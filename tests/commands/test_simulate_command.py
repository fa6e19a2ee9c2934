"""`ris-fast simulate`: whatever is wrong is said in one line, with the exit code of its kind, and leaves nothing
behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from ris_fast.commands.cli import main

SMALL = [
    "--preset",
    "original",
    *(
        part
        for text in ("task.ris_horizontal=4", "task.ris_vertical=4", "task.bs_antennas=4", "task.snapshots=4")
        for part in ("--set", text)
    ),
]


def simulate(*arguments: str) -> int:
    return main(["simulate", *SMALL, *arguments])


@pytest.mark.parametrize(
    "arguments, code, answer",
    [
        (["--scenes", "0"], 2, "at least one scene"),
        (["--scenes", "-5"], 2, "at least one scene"),
        (["--scenes", "2.5"], 2, "not a whole number"),
        (["--scenes", "1e14"], 3, "GB free"),
        (["--scenes", "4", "--seed", "-1"], 2, "data.seed"),
        (["--scenes", "4", "--seed", "9223372036854775808"], 2, "data.seed"),
        (["--scenes", "4", "--set", "training.device=gpu"], 2, "auto, cpu, cuda"),
        (["--scenes", "4", "--out", "/proc/x"], 3, "/proc/x"),
        (["--scenes", "4", "--out", "file/below"], 3, "file/below"),
        (["--scenes", "4", "--out", "file"], 3, "new or empty folder"),
    ],
)
def test_simulate_reports_a_mistake_in_one_line(
    arguments: list[str],
    code: int,
    answer: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert simulate(*(arguments if "--out" in arguments else [*arguments, "--out", "set"])) == code
    said = capsys.readouterr()
    assert said.err.startswith("ris-fast: ") and answer in said.err and said.err.count("\n") == 1 and said.out == ""
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_simulate_reports_a_disk_error_in_one_line(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    assert simulate("--scenes", "4", "--out", str(tmp_path / "set")) == 3
    said = capsys.readouterr().err
    assert os.strerror(number) in said and str(tmp_path / "set.partial") in said and said.count("\n") == 1


def test_simulate_uses_the_configured_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "ris_fast.commands.simulate.choose_device", lambda name: (asked.append(name), torch.device("cpu"))[1]
    )
    assert simulate("--scenes", "4", "--out", str(tmp_path / "a"), "--set", "training.device=cuda:3") == 0
    assert (
        simulate("--scenes", "4", "--out", str(tmp_path / "b"), "--set", "training.device=cuda:3", "--device", "cpu")
        == 0
    )
    assert asked == ["cuda:3", "cpu"]


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 - 1])
def test_simulate_takes_a_large_seed_to_the_last_digit(seed: int, tmp_path: Path) -> None:
    assert simulate("--scenes", "4", "--out", str(tmp_path / "set"), "--seed", str(seed)) == 0
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["seed"] == seed
