"""A tracker has every number of metrics.jsonl, once for each step, whatever became of the run in between; and nothing
that happens to it happens to the training."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_fast.commands.cli import main
from ris_fast.config.schema import ConfigError
from ris_fast.files import StorageError
from ris_fast.report import tracker_sinks, trackers
from ris_fast.report.eventlog import JsonlReport, read_events
from ris_fast.report.trackers import Tracker, numbers
from tests.command_line import FEW_SCENES, SMALL_NETWORK, SMALL_TASK, settings

RUN = ["--preset", "original", "--device", "cpu", "--no-compile", "--batch-size", "16", "--precision", "fp32"]
RUN += settings(*SMALL_TASK, *FEW_SCENES, "report.every_steps=2", "report.plots=false", *SMALL_NETWORK)
RUN += settings("health.preflight=false")
STALLED = 4
ROOT = Path(__file__).parents[2]
SUMMARY = {
    "verdict": "learned",
    "best_val_nmse": 0.25,
    "findings": ["clip_too_small"],
    "evidence": [{"cause": "clip_too_small", "evidence": "every step is clipped.", "advice": "raise the norm"}],
}


def row(step: int, loss: float) -> dict[str, Any]:
    return {
        "epoch": 1,
        "step": step,
        "train_loss": loss,
        "lr": {"head": loss / 3},
        "health": {"scores": [1.5, {"a": 2}]},
    }


def train(folder: Path, name: str, steps: list[int], loss: float, **more: Any) -> None:
    """The rows of one part of a run: a report at each step, an epoch's row after the last."""
    callbacks = [JsonlReport(folder), Tracker(name, folder, **more)]
    for each in callbacks:
        each.on_train_start({"parameters": 7, "baselines": {"zero": 1.0}, "notes": ["a"]})
    for step in steps:
        for each in callbacks:
            each.on_log(row(step, loss + step))
    for each in callbacks:
        each.on_epoch_end({**row(steps[-1], loss), "val_nmse_raw": loss / 7})
        each.on_train_end({**SUMMARY, "optimizer_steps": steps[-1]})


def tensorboard(folder: Path) -> Any:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def expected(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> number, of every number in the current rows of metrics.jsonl."""
    return {
        (name, each["step"]): value
        for each in read_events(folder)
        if each["event"] in ("step", "epoch")
        for name, value in numbers({k: v for k, v in each.items() if k != "event"}, each["event"]).items()
    }


def assert_tensorboard_mirrors(folder: Path) -> None:
    found, wanted = tensorboard(folder), expected(folder)
    shown = [
        (name, event.step, event.value)
        for name in found.Tags()["scalars"]
        if not name.startswith("summary/")
        for event in found.Scalars(name)
    ]
    assert len(shown) == len(wanted) > 20
    for name, step, value in shown:
        assert value == np.float32(wanted[name, step]) or (math.isnan(value) and math.isnan(wanted[name, step]))


def test_tensorboard_has_every_number_of_metrics_jsonl(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard", [1, 2, 3], math.nan)
    assert_tensorboard_mirrors(tmp_path)
    assert {"step/lr/head", "step/health/scores/1/a", "epoch/val_nmse_raw"} < set(
        tensorboard(tmp_path).Tags()["scalars"]
    )
    (best,) = tensorboard(tmp_path).Scalars("summary/best_val_nmse")
    assert (best.step, best.value) == (3, 0.25)
    (said,) = tensorboard(tmp_path).Tensors("findings/text_summary")
    assert said.tensor_proto.string_val == [b"clip_too_small: every step is clipped. Fix: raise the norm"]


def test_tensorboard_forgets_what_a_resumed_run_goes_over_again(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard", [1, 2, 3, 4], 0.0)
    train(tmp_path, "tensorboard", [3, 4, 5], 100.0)
    assert_tensorboard_mirrors(tmp_path)
    losses = [(event.step, event.value) for event in tensorboard(tmp_path).Scalars("step/train_loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0), (5, 105.0)]


def test_tensorboard_keeps_the_report_of_a_step_whose_epoch_is_closed_after_a_resumption(tmp_path: Path) -> None:
    for callback in (first := [JsonlReport(tmp_path), Tracker("tensorboard", tmp_path)]):
        callback.on_train_start({})
    for callback in first:
        callback.on_log(row(8, 0.5))
        callback.on_train_end({"verdict": "stopped"})  # Ctrl-C during the validation
    for callback in (second := [JsonlReport(tmp_path), Tracker("tensorboard", tmp_path)]):
        callback.on_train_start({})
    for callback in second:
        callback.on_epoch_end(row(8, 0.5))
        callback.on_train_end({"verdict": "learned"})
    found = tensorboard(tmp_path)
    assert [len(found.Scalars(f"{kind}/train_loss")) for kind in ("step", "epoch")] == [1, 1]


def test_tracker_that_begins_with_a_resumption_gets_the_whole_run(tmp_path: Path) -> None:
    log = JsonlReport(tmp_path)
    log.on_log(row(1, 0.5))
    train(tmp_path, "tensorboard", [2, 3], 0.0)
    assert_tensorboard_mirrors(tmp_path)
    assert tensorboard(tmp_path).Scalars("step/train_loss")[0].step == 1


@pytest.mark.slow
def test_trained_and_resumed_run_is_mirrored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    tracked = settings("report.tracker=tensorboard")
    assert main(["train", *RUN, *tracked, "--epochs", "1", "--out", str(folder)]) == STALLED
    assert main(["train", "--resume", str(folder), "--epochs", "2"]) == STALLED
    assert_tensorboard_mirrors(folder)
    assert "not complete" not in capsys.readouterr().out
    plugins = tensorboard(folder).summary_metadata.values()
    assert b"optimizer.backbone_lr" in b"".join(each.plugin_data.content for each in plugins)
    before = sorted((folder / "tensorboard").iterdir())
    assert main(["track", str(folder), "--to", "tensorboard"]) == 0
    assert_tensorboard_mirrors(folder)
    assert len(before) == 2 and not set(before) & set((folder / "tensorboard").iterdir())


class Broken:
    """A tracker that fails at its second row."""

    title, replaces, known = "Broken", False, False
    rows: list[int] = []

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self.rows.clear()

    def open(self, settings: Any) -> None: ...

    def log(self, values: Any, step: int) -> None:
        self.rows.append(step)
        if step == 2:
            raise StorageError("events", OSError(28, "No space left on device"))

    def end(self, *_: Any) -> None:
        self.rows.append(-1)


def test_tracker_that_fails_is_reported_once_and_asked_no_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(tracker_sinks.SINKS, "tensorboard", Broken)
    said: list[str] = []
    train(tmp_path, "tensorboard", [1, 2, 3, 4], 0.0, report=said.append)
    assert Broken.rows == [1, 2] and len(expected(tmp_path)) > 20
    (line,) = said
    assert line.startswith("note: Broken is not complete, training goes on: events cannot be written: No space left")
    assert f"ris-fast track {tmp_path} --to tensorboard" in line


def test_tracker_that_does_not_answer_holds_nothing_up(tmp_path: Path, monkeypatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(Broken, "open", lambda *_: release.wait(20))
    monkeypatch.setitem(tracker_sinks.SINKS, "tensorboard", Broken)
    said, began = list[str](), time.monotonic()
    train(tmp_path, "tensorboard", [1, 3], 0.0, report=said.append, wait=0.05)
    assert time.monotonic() - began < 5.0 and "no answer within 0 s" in said[0] and Broken.rows == []
    release.set()


def test_package_that_does_not_import_is_reported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "import_module", lambda name: exec("raise ImportError('half of it is missing')"))
    said: list[str] = []
    train(tmp_path, "tensorboard", [1], 0.0, report=said.append)
    assert "half of it is missing" in said[0] and len(said) == 1 and not (tmp_path / "tensorboard").exists()


def test_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for command in (
        ["train", *RUN, *settings("report.tracker=wandb"), "--out", "run"],
        ["tune", *RUN[:4], "--out", "t"],
    ):
        command += settings("report.tracker=wandb") if command[0] == "tune" else []
        assert main(command) == 2
        assert "pip install 'ris-fast[wandb]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'. Did you mean 'tensorboard'"):
        Tracker("tensorbord", tmp_path)


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "rank_number", lambda: 1)
    train(tmp_path, "tensorboard", [1], 0.0)
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_offline_has_every_number_of_metrics_jsonl(tmp_path: Path, monkeypatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("wandb")
        from wandb.proto.wandb_internal_pb2 import Record
    monkeypatch.setenv("WANDB_MODE", "offline")
    parts = []
    for steps, loss in (([1, 2, 3, 4], 0.0), ([3, 4, 5], 100.0)):  # a process each, as those of a run that is resumed
        code = "from tests.report.test_trackers import *; train(Path({!r}), 'wandb', {}, {})"
        code = code.format(str(tmp_path), steps, loss)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        parts.append((done.stdout, done.stderr, expected(tmp_path)))
    (_, _, first), (said, *_) = parts
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two parts of one run
    shown: dict[tuple[str, int], float] = {}
    for file in files:
        for each in wandb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(each)
            for item in record.history.item:
                name = "/".join(item.nested_key) or item.key
                if not name.startswith("_"):
                    assert (name, record.history.step.num) not in shown
                    shown[name, record.history.step.num] = float(json.loads(item.value_json))
    last = {key: value for key, value in expected(tmp_path).items() if key[1] == 5}
    assert shown == pytest.approx(first | last)
    assert "note: W&B keeps steps 3 to 4 as the run made them first; metrics.jsonl has them as they are now" in said


def wandb_records(data: bytes) -> Any:
    """Records of a .wandb file: a LevelDB log in blocks of 32 KiB behind seven bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if left < 7 or kind == 0:
            place += left
            continue
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_trackio_has_every_number_of_metrics_jsonl(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # before it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trackio = pytest.importorskip("trackio")
        train(tmp_path, "trackio", [1, 2, 3, 4], 0.0)
        first = expected(tmp_path)
        train(tmp_path, "trackio", [3, 4, 5], 100.0)
    project = "ris-fast"
    (name,) = [each for each in trackio.SQLiteStorage.get_runs(project) if each.startswith(tmp_path.name)]
    shown: dict[tuple[str, int], float] = {}
    for each in trackio.SQLiteStorage.get_logs(project, name):
        for key, value in each.items():
            if key.startswith(("step/", "epoch/")):
                assert (key, each["step"]) not in shown
                shown[key, each["step"]] = value
    last = {key: value for key, value in expected(tmp_path).items() if key[1] == 5}
    assert shown == pytest.approx(first | last)
