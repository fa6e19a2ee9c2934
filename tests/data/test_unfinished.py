"""Unfinished data sets: a changed byte in them never gets into a manifest; several processes write what one writes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ris_fast.config.schema import Config, ConfigError, Data
from ris_fast.data import write
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import file_hash
from ris_fast.data.parallel import WorkerLost, each_in_order
from ris_fast.data.write import write_shards
from ris_fast.files import StorageError
from tests.command_line import SMALL_TASK, settings
from tests.data.make_npz import SMALL

SIZES = {"train": 50, "val": 12, "test": 8}
CONFIG = Config(task=SMALL, data=Data(seed=5))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir()}


def stop_after(scenes: int, out: Path) -> Path:
    """Unfinished work with this many scenes."""

    def stop(done: int, total: int) -> None:
        if done >= scenes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="Run the same command again"):
        write_shards(CONFIG, out, SIZES, shard_scenes=16, progress=stop)
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return contents(write_shards(CONFIG, tmp_path_factory.mktemp("whole") / "set", SIZES, shard_scenes=16).parent)


def same_record(one: bytes, other: bytes) -> bool:
    """Of JSON, whether both say the same: the 17th digit of a number may be another."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["train-00001.safetensors", "train-00001.json"])
def test_a_flipped_bit_in_unfinished_work_is_made_again(
    tmp_path: Path, name: str, straight: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stop_after(48, tmp_path / "set")
    raw = bytearray((partial / name).read_bytes())
    for at in range(0, len(raw), max(1, len(raw) // 25)):
        flipped = raw.copy()
        flipped[at] ^= 1 << (at % 8)
        if same_record(raw, flipped):
            continue
        (partial / name).write_bytes(flipped)
        assert write.kept(partial / "train-00001.safetensors", 16) is None, at
    made: list[int] = []
    simulate = write.simulated_columns
    monkeypatch.setattr(write, "simulated_columns", lambda *a: (made.append(a[2]), simulate(*a))[1])
    assert contents(write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16).parent) == straight
    assert made == [16, 48, 0, 0]


def test_a_shard_without_a_receipt_is_made_again(tmp_path: Path, straight: dict[str, str]) -> None:
    partial = stop_after(32, tmp_path / "set")
    (partial / "train-00000.json").unlink()
    assert contents(write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16).parent) == straight


@pytest.mark.parametrize("before", ["plan.json", "val-00000.json"])
def test_a_kill_while_finishing_leaves_a_whole_set_that_the_same_call_tidies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, str], before: str
) -> None:
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == before:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16)
    assert (tmp_path / "set" / "manifest.json").is_file() and not (tmp_path / "set.partial").exists()
    assert contents(write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16).parent) == straight
    with pytest.raises(DataError, match="something there already"):
        write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16)


def test_two_processes_write_what_one_writes(tmp_path: Path, straight: dict[str, str]) -> None:
    stop_after(16, tmp_path / "set")
    seen: list[tuple[int, int]] = []
    write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16, jobs=2, progress=lambda *counts: seen.append(counts))
    assert contents(tmp_path / "set") == straight
    assert [total for _, total in seen] == [70] * 6 and seen[-1][0] == 70


def end_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_an_error() -> None:
    with pytest.raises(WorkerLost, match="was killed.*run the same command again.*--jobs 1"):
        list(each_in_order(end_at_two, range(4), 2))


def test_errors_of_other_processes_arrive_whole() -> None:
    for error in (DataError("f", "k", "a", "b", "Do."), StorageError("/x", OSError(28, "full"))):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, ending: signal.Signals) -> None:
    command = [sys.executable, "-m", "ris_fast", "simulate", "--out", "set", "--scenes", "2000000", "--jobs", "2"]
    run = subprocess.Popen(
        [*command, *settings(*SMALL_TASK)], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("set.partial/*-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if ending == signal.SIGINT else os.kill)(run.pid, ending)
    said = run.communicate(timeout=30)[1]
    assert run.returncode == (130 if ending == signal.SIGINT else -9)
    if ending == signal.SIGINT:
        assert said.count("\n") == 1 and "Run the same command again" in said, said
    while time.monotonic() < deadline:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of the command lives on")


def test_write_shards_refuses_no_process() -> None:
    with pytest.raises(ConfigError, match="--jobs is 0"):
        write_shards(CONFIG, "set", SIZES, jobs=0)


def test_receipts_are_json(tmp_path: Path) -> None:
    partial = stop_after(16, tmp_path / "set")
    assert json.loads((partial / "train-00000.json").read_text())["entry"]["scenes"] == 16
