"""A checkpoint is what the tensors were when it was saved, one is written at a time, and no error of the thread is
lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.files import StorageError, remove_leftovers
from ris_fast.training import checkpoint, checkpoint_writer
from ris_fast.training.checkpoint import load_checkpoint
from ris_fast.training.checkpoint_writer import CheckpointWriter

needs_cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
SAVES = """
import os, sys, torch
from pathlib import Path
from ris_fast import files
from ris_fast.training.checkpoint_writer import CheckpointWriter
writer, groups = CheckpointWriter(), {"model": {"weight": torch.full((1000, 1000), 1.0)}}
writer.save(Path("."), "last", groups, {})
writer.finish()
groups["model"]["weight"].fill_(2.0)
"""
KILLED = """
def stopped(path):
    print("half", flush=True)
    import time
    time.sleep(600)
files._flush = stopped  # the file is there under its other name, and not on disk
"""


class Gate:
    """Stands in for `save_tensors`: writes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.came, self.inside, self.most = threading.Event(), threading.Event(), 0, 0
        self.paths: list[str] = []
        self.write = checkpoint.save_tensors
        monkeypatch.setattr(checkpoint, "save_tensors", self)

    def __call__(self, path: Path, *values: Any) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.came.set()
        assert self.open.wait(60)
        self.paths.append(path.name)
        size = self.write(path, *values)
        self.inside -= 1
        return size


@pytest.fixture()
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def groups(value: float, device: str = "cpu") -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.full((3, 4), value, device=device)
    return {"model": {"weight": weight, "turned": weight.T}, "ema": {"weight": weight + 1}}


def value_in(folder: Path, name: str) -> float:
    found, manifest = load_checkpoint(folder, name)
    weight = found["model"]["weight"]
    assert weight.eq(weight[0, 0]).all() and found["ema"]["weight"].eq(weight + 1).all()
    assert found["model"]["turned"].equal(weight.T) and manifest["value"] == float(weight[0, 0])
    return float(weight[0, 0])


@pytest.mark.parametrize("device", ["cpu", needs_cuda])
def test_checkpoint_writer_writes_the_tensors_as_they_were(device: str, gate: Gate, tmp_path: Path) -> None:
    writer, given = CheckpointWriter(), groups(1.0, device)
    writer.save(tmp_path, "last", given, {"value": 1.0})
    for group in given.values():
        for tensor in group.values():
            tensor.fill_(7.0)
    gate.open.set()
    writer.finish()
    assert value_in(tmp_path, "last") == 1.0 and not writer.busy("last")
    figures = writer.figures()
    assert (figures["written"], figures["bytes"]) == (1, sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert figures["waited_seconds"] > 0 and figures["writer_seconds"] > 0


def test_checkpoint_writer_keeps_the_newest_of_a_name_and_writes_one_at_a_time(gate: Gate, tmp_path: Path) -> None:
    writer = CheckpointWriter()
    writer.save(tmp_path, "best", groups(1.0), {"value": 1.0})
    assert gate.came.wait(60) and writer.busy("best")
    for value in (2.0, 3.0, 4.0):
        writer.save(tmp_path, "best", groups(value), {"value": value})
    writer.save(tmp_path, "last", groups(5.0), {"value": 5.0})
    gate.open.set()
    writer.finish()
    assert gate.paths == ["best.safetensors", "best.safetensors", "last.safetensors"] and gate.most == 1
    assert (value_in(tmp_path, "best"), value_in(tmp_path, "last")) == (4.0, 5.0)


def test_checkpoint_writer_fills_the_same_memory_again(tmp_path: Path, monkeypatch) -> None:
    seen, write = [], checkpoint_writer.write_checkpoint

    def watched(folder: Path, name: str, tensors: Any, manifest: Any) -> int:
        seen.append({key: value.data_ptr() for key, value in tensors.items()})
        return write(folder, name, tensors, manifest)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", watched)
    writer = CheckpointWriter()
    for value in (1.0, 2.0, 3.0):
        writer.save(tmp_path, "last", groups(value), {"value": value})
        writer.finish()
    assert seen[0] == seen[1] == seen[2] and value_in(tmp_path, "last") == 3.0
    larger = {"model": {"weight": torch.ones(5, 5)}}
    writer.save(tmp_path, "last", larger, {})
    writer.finish()
    assert load_checkpoint(tmp_path, "last")[0]["model"]["weight"].equal(larger["model"]["weight"])


class Event:
    """Stands in for a CUDA event."""

    def __init__(self, *_: Any) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


@pytest.mark.parametrize("end", ["poll", "finish"])
def test_checkpoint_writer_waits_for_a_copy_on_its_way(end: str, tmp_path: Path, monkeypatch) -> None:
    fill, events = checkpoint_writer._fill, list[Event]()

    def on_its_way(*copies: Any) -> Event:
        fill(*copies)
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(checkpoint_writer, "_fill", on_its_way)
    writer = CheckpointWriter()
    writer.save(tmp_path, "last", groups(1.0), {"value": 1.0})
    writer.poll()
    assert writer._thread is None and writer.busy("last") and not list(tmp_path.iterdir())
    writer.save(tmp_path, "last", groups(2.0), {"value": 2.0})
    if end == "poll":
        events[-1].passed = True
        writer.poll()
        assert not writer._copying
    writer.finish()
    assert value_in(tmp_path, "last") == 2.0 and writer.figures()["written"] == 1


@pytest.mark.parametrize(
    "after", [CheckpointWriter.poll, CheckpointWriter.finish, lambda w: w.save(Path("."), "last", groups(0.0), {})]
)
def test_checkpoint_writer_raises_the_error_of_its_thread_once(
    after: Callable[[CheckpointWriter], None], gate: Gate, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    writer = CheckpointWriter()
    writer.save(tmp_path / "file", "last", groups(1.0), {"value": 1.0})
    assert gate.came.wait(60)
    writer.save(tmp_path, "best", groups(1.0), {"value": 1.0})
    thread = writer._thread
    gate.open.set()
    thread.join()
    with pytest.raises(StorageError, match="file.* cannot be written"):
        after(writer)
    assert writer.close() == "" and not (tmp_path / "best.safetensors").exists()
    writer.save(tmp_path, "last", groups(2.0), {"value": 2.0})
    writer.finish()
    assert value_in(tmp_path, "last") == 2.0


def python(script: str, folder: Path, **options: Any) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, text=True, **options)


def written(folder: Path) -> float:
    return float(load_checkpoint(folder, "last")[0]["model"]["weight"].unique())


@pytest.mark.slow
def test_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    process = python(SAVES + KILLED + "writer.save(Path('.'), 'last', groups, {})", tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert written(tmp_path) == 1.0
    assert [path.name for path in remove_leftovers(tmp_path)] == [f".last.safetensors.{process.pid}.partial"]
    assert sorted(os.listdir(tmp_path)) == ["last.json", "last.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_python_ends_when_the_checkpoint_is_whole(end: str, tmp_path: Path) -> None:
    slow = "flush = files._flush\nfiles._flush = lambda path: (__import__('time').sleep(1), flush(path))\n"
    script = SAVES + slow + f"writer.save(Path('.'), 'last', groups, {{}})\n{end}"
    python(script, tmp_path, stderr=subprocess.DEVNULL).communicate()
    assert written(tmp_path) == 2.0 and json.loads((tmp_path / "last.json").read_text())["sha256"]
    assert sorted(os.listdir(tmp_path)) == ["last.json", "last.safetensors"]
