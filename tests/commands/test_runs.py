"""Runs through the real command line, end to end: train, its files, resume, evaluate, interrupt, env."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ris_fast.commands.cli import main
from ris_fast.commands.evaluate import evaluate
from ris_fast.commands.run_folder import run_lock
from ris_fast.commands.scene_figures import scene_figures, training_mean
from ris_fast.config.load import load_config
from ris_fast.data.simulated import SimulatedSource
from ris_fast.files import StorageError
from ris_fast.models.backprojection import Backprojection
from ris_fast.report.eventlog import read_events
from ris_fast.training.trainer import Trainer
from tests.command_line import FEW_SCENES, SMALL_NETWORK, SMALL_TASK, settings

BASE = ["--preset", "original", "--device", "cpu", "--no-compile", "--batch-size", "16", "--precision", "fp32"]
SIZES = (*SMALL_TASK, *FEW_SCENES, "data.test_scenes=60", "report.every_steps=2", *SMALL_NETWORK)
SMALL = [*BASE, *settings(*SIZES, "report.plots=false")]  # drawing takes longer than such a run
PLOTS, QUICK = settings("report.plots=true"), settings("health.preflight=false")
STALLED = 4  # a few steps of a small network teach it nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *SMALL, *PLOTS, "--epochs", "2", "--out", str(folder)]) == STALLED
    return folder


def test_train_writes_every_file_of_a_run_folder(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert {
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "plots/loss.png",
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
        "checkpoints/best.json",
    } <= files
    summary = json.loads((trained / "summary.json").read_text())
    assert {
        "parameters",
        "optimizer_steps",
        "scenes_seen",
        "scenes_per_s",
        "seconds",
        "train_loss",
        "val_nmse_raw",
        "val_nmse_ema",
        "best_val_nmse",
        "baselines",
        "verdict",
        "findings",
    } <= summary.keys()
    assert (summary["optimizer_steps"], summary["scenes_seen"]) == (8, 128)
    assert summary["checkpoints"].keys() == {"written", "bytes", "waited_seconds", "writer_seconds"}
    assert summary["checkpoints"]["written"] in (2, 3) and summary["checkpoints"]["bytes"] > 8 * summary["parameters"]
    assert summary["baselines"]["zero"] == 1.0 and json.loads((trained / "env.json").read_text())["versions"]["torch"]


def test_why_says_what_a_stalled_run_ruled_out_and_what_is_likely(trained: Path, capsys) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["verdict"] == "stalled" and summary["findings"] == []
    assert len(summary["ruled_out"]["checks"]) > 30 and "one_update_a_step" in summary["ruled_out"]["rules"]
    statuses = [each["status"] for each in summary["explanations"]]
    order = ["likely", "not looked at", "ruled out"]
    assert statuses == sorted(statuses, key=order.index) and {"likely", "ruled out"} <= set(statuses)
    assert main(["why", str(trained)]) == 0
    short = capsys.readouterr().out
    assert "likely: the run is too short: 8 steps" in short and len(short.splitlines()) <= 12
    assert main(["why", str(trained), "--every"]) == 0
    said = capsys.readouterr().out
    assert all(each["reason"] in said and each["by"] in said for each in summary["explanations"])


def test_metrics_have_a_row_per_report_with_weighted_terms(trained: Path) -> None:
    rows = read_events(trained)
    assert [row["event"] for row in rows][:4] == ["start", "step", "step", "step"]
    epoch = next(row for row in rows if row["event"] == "epoch")
    assert {"cov", "cov_pred", "angle", "count"} <= epoch["terms"].keys()
    assert epoch["train_loss"] == pytest.approx(sum(term["weighted"] for term in epoch["terms"].values()), rel=1e-4)


def test_evaluate_prints_tables_and_saves_figure_and_json(trained: Path, capsys) -> None:
    assert main(["evaluate", str(trained), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("SNR in dB", "-5 .. 0", "15 .. 20", "sources", "identity", "all"))
    assert (trained / "plots" / "evaluate.png").is_file() and (trained / "evaluation.json").is_file()


def test_evaluate_json_groups_add_up_to_the_total(trained: Path, capsys) -> None:
    assert main(["evaluate", str(trained / "checkpoints"), "--json", "--scenes", "50", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scenes"] == 50 and result["baselines"]["zero"] == 1.0 and result["mmse_bound"] is None
    for groups in (result["by_snr"], result["by_count"]):
        assert sum(group["scenes"] for group in groups) == 50
        mean = sum(group["scenes"] * group["nmse"]["mean"] for group in groups) / 50
        assert mean == pytest.approx(result["nmse"]["mean"])


def test_evaluate_agrees_with_the_best_validation_nmse(trained: Path) -> None:
    """The same weights on fresh scenes of the same law: validation and test differ by their sampling error only."""
    result = evaluate(trained, device="cpu")
    summary = json.loads((trained / "summary.json").read_text())
    assert result["nmse"]["mean"] == pytest.approx(summary["best_val_nmse"], rel=0.15)
    assert result["weights"] == summary["best_weights"]


@pytest.mark.slow
def test_simulated_data_set_can_be_trained_and_evaluated(tmp_path, capsys) -> None:
    data, folder = tmp_path / "scenes", tmp_path / "run"
    task = settings(*SMALL_TASK)
    assert (
        main(["simulate", "--out", str(data), "--scenes", "48", "--preset", "original", "--device", "cpu", *task]) == 0
    )
    assert f"--data {data}" in capsys.readouterr().out
    assert main(["train", *SMALL, "--epochs", "1", "--data", str(data), "--out", str(folder)]) == STALLED
    assert json.loads((folder / "summary.json").read_text())["scenes_seen"] == 48
    assert evaluate(folder, device="cpu")["scenes"] == 2
    data.rename(tmp_path / "moved")
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 3
    assert "--data DIR" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--device", "cpu", "--data", str(tmp_path / "moved")]) == 0


def test_evaluate_prints_what_it_cannot_write(trained: Path, tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise StorageError(trained / "evaluation.json", OSError(30, "read-only"))

    monkeypatch.setattr("ris_fast.report.evaluation.write_json", refuse)
    assert main(["evaluate", str(trained), "--device", "cpu"]) == 3
    said = capsys.readouterr()
    assert "mean NMSE" in said.out and "Read-only" in said.err


def test_simulate_refuses_a_folder_that_is_not_empty(tmp_path, capsys) -> None:
    (tmp_path / "precious.txt").touch()
    assert main(["simulate", "--out", str(tmp_path), "--scenes", "4", "--preset", "original", "--device", "cpu"]) == 3
    assert str(tmp_path) in capsys.readouterr().err


def test_scene_figures_pursuit_solves_an_easy_task() -> None:
    """Without any network a single source at high SNR is found: what a network must beat is not zero but this."""
    config = load_config(None, "laptop", ["task.max_sources=1", "task.snr_min_db=15.0"], {"training.device": "cpu"})
    source = SimulatedSource(config, "cpu")
    figures = scene_figures(
        Backprojection(config.task, width=8, depth=0), config.task, source, 64, training_mean(source)
    )
    assert figures["pursuit"].quantile(0.5) < 0.05
    assert figures["zero"].eq(1.0).all() and figures["network"].mean() > figures["pursuit"].mean()


def test_evaluate_refuses_more_test_scenes_than_there_are(trained: Path, capsys) -> None:
    assert main(["evaluate", str(trained), "--scenes", "61", "--device", "cpu"]) == 2
    assert "this run has 60" in capsys.readouterr().err


def test_evaluate_names_a_missing_best_checkpoint(trained: Path, tmp_path, capsys) -> None:
    (tmp_path / "config.toml").write_text((trained / "config.toml").read_text())
    assert main(["evaluate", str(tmp_path), "--device", "cpu"]) == 3
    assert "best.safetensors" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_train_interrupted_by_a_signal_saves_and_resumes(tmp_path, sent: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ris_fast", "train", *SMALL, *QUICK, "--epochs", "100000", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _wait_for_an_epoch(folder, process)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and f"ris-fast train --resume {folder}" in said and "Traceback" not in said
    reached = json.loads((folder / "summary.json").read_text())["epochs"]
    assert main(["train", "--resume", str(folder), "--epochs", str(reached + 1)]) == STALLED
    epochs = [row["epoch"] for row in read_events(folder) if row["event"] == "epoch"]
    assert epochs == list(range(1, reached + 2))


def _wait_for_an_epoch(folder: Path, process: subprocess.Popen) -> None:
    while not ((folder / "metrics.jsonl").exists() and any(row["event"] == "epoch" for row in read_events(folder))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
def test_resume_within_an_epoch_is_found_healthy(tmp_path, monkeypatch, capsys) -> None:
    folder, advance = tmp_path / "run", Trainer._advance

    def until_the_sixth(self: Trainer, scenes: int) -> None:
        advance(self, scenes)
        if self.state.step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_advance", until_the_sixth)
    assert main(["train", *SMALL, "--epochs", "3", "--out", str(folder)]) == 130
    monkeypatch.undo()
    state = json.loads((folder / "checkpoints" / "last.json").read_text())["state"]
    assert (state["epoch"], state["epoch_step"]) == (1, 2)
    assert main(["train", "--resume", str(folder)]) == STALLED
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["epochs"], summary["optimizer_steps"], summary["findings"]) == (3, 12, [])
    assert main(["why", str(folder)]) == 0
    assert "batches_skipped" not in capsys.readouterr().out


def test_resume_of_a_finished_run_changes_nothing(trained: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(trained)]) == 0
    assert "nothing to do: 2 epochs are done and 2 are asked for; give a larger --epochs" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_over(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert main(["train", *SMALL, "--epochs", "1", "--out", str(folder)]) == STALLED
    shutil.rmtree(folder / "checkpoints")
    assert main(["train", "--resume", str(folder)]) == STALLED
    assert "no checkpoint yet: the run begins anew" in capsys.readouterr().out
    assert [row["epoch"] for row in read_events(folder) if row["event"] == "epoch"] == [1]


def test_resume_refuses_a_run_that_is_locked(trained: Path, capsys) -> None:
    with run_lock(trained):
        assert main(["train", "--resume", str(trained), "--epochs", "3"]) == 2
    assert "another process" in capsys.readouterr().err


def test_train_that_never_began_leaves_no_folder(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["train", *SMALL, "--out", str(tmp_path / "file" / "run")]) == 3
    assert "cannot be written" in capsys.readouterr().err
    assert main(["train", *SMALL, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 3
    assert not (tmp_path / "run").exists()


def test_folder_of_a_refused_run_can_be_used_again(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    asked = ["train", *SMALL, "--epochs", "1", "--out", str(out)]
    for _ in range(2):
        assert main([*asked, *settings("optimizer.backbone_lr=0", "optimizer.head_lr=0")]) == 4
        assert "zero_learning_rate" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["config.toml", "env.json", "summary.json"]
    assert main([*asked, *QUICK]) == STALLED
    assert json.loads((out / "summary.json").read_text())["optimizer_steps"] > 0
    assert main([*asked, *QUICK]) == 2 and "already holds a run" in capsys.readouterr().err


def test_env_json_has_versions_and_kernel_backends(capsys) -> None:
    from ris_fast.kernels.registry import operators

    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] and found["cpu"]["cores"] >= 1
    on_cpu = {kernel["kernel"]: kernel for kernel in found["kernels"] if kernel["device"] == "cpu"}
    assert set(on_cpu) == {operator.name for operator in operators()}
    assert all(kernel["backend"] in ("C++", "plain torch") and kernel["reason"] for kernel in on_cpu.values())


def test_env_prints_a_table(capsys) -> None:
    assert main(["env"]) == 0
    assert "cov_nmse on cpu" in capsys.readouterr().out


def test_env_says_why_a_kernel_falls_back(monkeypatch, capsys) -> None:
    from ris_fast.kernels.native import loader

    monkeypatch.setattr(loader, "available", lambda: False)
    monkeypatch.setattr(loader, "why_not", lambda: "the library was not built")
    assert main(["env"]) == 0
    assert "plain torch: the library was not built" in capsys.readouterr().out
