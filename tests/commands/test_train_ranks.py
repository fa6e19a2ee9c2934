"""`ris-fast train` under torchrun: two ranks, a rank that is killed and started again, and commands of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ris_fast.commands import launch
from ris_fast.commands.cli import main
from ris_fast.training.checkpoint import load_checkpoint
from tests.command_line import settings
from tests.training.test_trainer import SMALL

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
RUN = settings(
    *SMALL, "data.train_scenes=163", "data.val_limit=8", "training.epochs=3", "training.batch_size=4",
    "training.max_seconds=0", "health.preflight=false", "report.plots=false", "report.checkpoint_seconds=0.2",
)  # fmt: skip


def start(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *LAUNCHER, *launcher, "-m", "ris_fast", "train", "--preset", "original", *RUN]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*command, "--out", str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A run of two ranks that nobody disturbed: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    output, errors = start(folder).communicate(timeout=300)
    yield folder, output, errors


@pytest.mark.slow
def test_two_ranks_train_one_run(whole: tuple[Path, str, str]) -> None:
    folder, output, errors = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["optimizer_steps"], summary["scenes_seen"]) == (3 * 21, 3 * 163), errors
    assert output.count("Epoch 003/003") == 1 and output.count("run folder:") == 1
    assert "rank 1:" not in output + errors
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 64))


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_it_had_not(
    whole: tuple[Path, str, str], tmp_path: Path
) -> None:
    """Bit for bit, from the checkpoint that rank 0 writes when it hears of the end."""
    folder = tmp_path / "run"
    process = start(folder, "--max-restarts=1")
    os.kill(rank_1_after(folder, 15, process), signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert "rank 1 ended" in errors and "resumed from checkpoint 'last'" in output, output + errors
    assert process.returncode == 0, output + errors
    weights, manifest = load_checkpoint(folder / "checkpoints", "last")
    expected, reference = load_checkpoint(whole[0] / "checkpoints", "last")
    assert manifest["state"]["step"] == reference["state"]["step"] == 63
    for group in ("model", "ema"):
        assert all(weights[group][name].equal(value) for name, value in expected[group].items())


def rank_1_after(folder: Path, step: int, process: subprocess.Popen[str]) -> int:
    """The number of the process that is rank 1 of the run in `folder`, once that has reported a step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        rows = folder / "metrics.jsonl"
        if rows.exists() and f'"step": {step},' in rows.read_text():
            return next(pid for pid in children(process.pid) if "RANK=1" in environment_of(pid))
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {folder}")


def children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(each) for each in found]


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_a_command_of_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(["evaluate", "somewhere"]) == 2
    assert "evaluate runs in one process, and 2 were started" in capsys.readouterr().err
    assert main(["train", "--batch-size", "auto"]) == 2
    assert "tries sizes in one process" in capsys.readouterr().err


def test_other_ranks_say_errors_with_their_number_and_nothing_else(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert main(["train", "--print-config", "--epochs", "1"]) == 0
    assert main(["train", "--set", "training.epoch=1"]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("rank 3: ris-fast: ")
    assert all(line.startswith("rank 3: ") for line in said.err.splitlines())


def test_restarts_need_a_folder(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert main(["train", "--epochs", "1"]) == 2
    assert "needs its folder. Give --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "summary, ended",
    [('{"verdict": "stalled"}', True), ('{"verdict": "stopped", "ended_by": "RankLost"}', False), ("{", False)],
)
def test_a_run_that_came_to_its_own_end_is_not_started_again(summary: str, ended: bool, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(summary)
    assert (launch.outcome_of(tmp_path) is not None) == ended
