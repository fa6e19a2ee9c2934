"""The event log: strict JSON whatever the numbers, nothing lost to a kill, nothing counted twice after a resume."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from ris_fast.files import StorageError
from ris_fast.report.eventlog import JsonlReport, dumps, read_events, write_json


def row(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "scenes_seen": 16 * step, "train_loss": 0.5, **more}


def strict(text: str) -> dict[str, object]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_jsonl_report_puts_a_row_on_disk_at_once(tmp_path) -> None:
    log = JsonlReport(tmp_path)
    for step in (1, 2):
        log.on_log(row(step))
        assert [each["step"] for each in read_events(tmp_path)] == list(range(1, step + 1))


def test_jsonl_report_keeps_non_finite_numbers(tmp_path) -> None:
    log = JsonlReport(tmp_path)
    log.on_log(
        row(
            1,
            train_loss=math.nan,
            grad_norm=torch.tensor(math.inf),
            terms={"cov": {"raw": np.float32("-inf")}},
            series=[1.0, math.nan],
        )
    )
    written = strict((tmp_path / "metrics.jsonl").read_text())
    assert written["train_loss"] is None and written["nonfinite"]["terms/cov/raw"] == "-inf"
    back = read_events(tmp_path)[0]
    assert math.isnan(back["train_loss"]) and back["grad_norm"] == math.inf
    assert back["terms"]["cov"]["raw"] == -math.inf and math.isnan(back["series"][1]) and "nonfinite" not in back


def test_dumps_makes_tensors_arrays_and_paths_plain(tmp_path) -> None:
    plain = strict(dumps({"a": torch.arange(3), "b": np.float32(0.5), "c": tmp_path, "d": True, "e": None}))
    assert plain == {"a": [0, 1, 2], "b": 0.5, "c": str(tmp_path), "d": True, "e": None}


def test_read_events_leaves_out_a_torn_row(tmp_path) -> None:
    JsonlReport(tmp_path).on_log(row(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert [each["step"] for each in read_events(tmp_path)] == [1]
    JsonlReport(tmp_path).on_log(row(2))
    assert [each["step"] for each in read_events(tmp_path)] == [1, 2]


def test_read_events_counts_repeated_rows_once(tmp_path) -> None:
    log = JsonlReport(tmp_path)
    log.on_train_start({})
    for step, loss in ((1, 0.9), (2, 0.8), (3, 0.7)):
        log.on_log(row(step, train_loss=loss))
    log.on_epoch_end(row(3, train_loss=0.8))
    for _ in range(2):
        log.on_train_start({})
    log.on_log(row(2, train_loss=0.6))
    log.on_epoch_end(row(2, train_loss=0.5))
    rows = [each for each in read_events(tmp_path) if each["event"] != "start"]
    assert [(each["step"], each["train_loss"]) for each in rows] == [(1, 0.9), (2, 0.6), (2, 0.5)]


@pytest.mark.parametrize("line", ["not json", "[1, 2]"])
def test_read_events_names_a_bad_line_by_its_number(tmp_path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + f"\n{line}\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_events(tmp_path)


def test_read_events_of_a_missing_log_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="Give a run folder"):
        read_events(tmp_path)


def test_write_json_replaces_the_summary_whole(tmp_path) -> None:
    JsonlReport(tmp_path).on_train_end({"verdict": "learned", "best_val_nmse": 0.3})
    write_json(tmp_path / "summary.json", {"verdict": "stopped", "best_val_nmse": math.inf})
    assert strict((tmp_path / "summary.json").read_text())["verdict"] == "stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_write_json_that_fails_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    write_json(tmp_path / "summary.json", {"verdict": "learned"})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "summary.json", {"verdict": "stopped"})
    assert strict((tmp_path / "summary.json").read_text()) == {"verdict": "learned"}


def test_jsonl_report_names_a_log_it_cannot_write(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="metrics.jsonl|file/run"):
        JsonlReport(tmp_path / "file" / "run").on_log(row(1))
