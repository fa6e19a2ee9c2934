"""Names of earlier versions work for one release: each is read as its new name, and one line says so."""

from __future__ import annotations

import importlib
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.config.load import load_config, render_toml
from ris_fast.config.schema import Task
from ris_fast.health.names import known_causes
from ris_fast.old_names import KEYS, MODULES, OldNameWarning
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.report.eventlog import read_events
from tests.command_line import FEW_SCENES, SMALL_NETWORK, SMALL_TASK, settings

QUIET = ("report.plots=false", "health.preflight=false")
SMALL = settings(*SMALL_TASK, *FEW_SCENES, "data.test_scenes=20", *QUIET, *SMALL_NETWORK)
FLAGS = ["--device", "cpu", "--no-compile", "--batch-size", "16", "--precision", "fp32"]
STALLED = 4

# As the version before wrote them, cut to what rules and reports read.
OLD_FLOORS = {"zero": 1.0, "identity": 0.987, "mean": 0.978, "matched_filter": 0.9}
OLD_SCORE = {"answers": "3397ed04180af377", "asleep": 12, "distance": 0.1}
OLD_ROWS = (
    {"event": "start", "fresh": True, "train_scenes": 64, "floors": OLD_FLOORS, "ceiling_flop_per_s": 9e10},
    {"event": "step", "step": 2, "epoch": 1, "health": {"asleep": 0, "groups_read": 2, "left_over": 0.0}},
    {
        "event": "epoch",
        "step": 4,
        "epoch": 1,
        "train_loss": 0.97,
        "val_nmse_raw": 0.975,
        "val_nmse_ema": 0.976,
        "share_of_ceiling": 0.07,
        "health": {
            "scores": {"raw": OLD_SCORE, "ema": {**OLD_SCORE, "answers": "c414dcbf75ce4310"}},
            "between_epochs": {"moved": 0, "back_to_first": 0},
            "around_validation": {"moved": 0, "back_to_first": 0},
        },
    },
)
OLD_EVIDENCE = {"evidence": "NMSE 0.975", "step": 4, "severity": "warning", "advice": "Train longer.", "certain": False}
OLD_SUMMARY = {
    "verdict": "stalled",
    "optimizer_steps": 4,
    "best_val_nmse": 0.975,
    "floors": OLD_FLOORS,
    "findings": ["stalled_at_floor"],
    "evidence": [{"cause": "stalled_at_floor", **OLD_EVIDENCE}],
    "ruled_out": {"checks": [], "rules": ["stalled_at_floor"]},
}


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run of one epoch with the config, rows and summary of the version before; checkpoints have not changed."""
    run = tmp_path / "run"
    assert main(["train", "--preset", "original", *FLAGS, *SMALL, "--epochs", "1", "--out", str(run)]) == STALLED
    file = run / "config.toml"
    file.write_text(file.read_text().replace("original", "seed"))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OLD_ROWS))
    (run / "summary.json").write_text(json.dumps(OLD_SUMMARY))
    return run


def notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("note: ")]


def test_why_explains_an_old_run_with_the_new_names(old_run: Path, capsys) -> None:
    capsys.readouterr()
    assert main(["why", str(old_run)]) == 0
    said = capsys.readouterr()
    assert "stalled_at_baseline: NMSE 0.975" in said.out and "0.978 for the constant answer" in said.out
    assert [line.split(":")[1].split(" is")[0].strip() for line in notes(said.err)] == [
        str(old_run / "summary.json"),
        str(old_run / "metrics.jsonl"),
    ]
    assert "floors -> baselines" in said.err and "stalled_at_floor -> stalled_at_baseline" in said.err
    assert "FutureWarning" not in said.err and len(said.err.splitlines()) == 2


def test_retired_setting_is_read_and_named(capsys, tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text('preset = "original"\n[report]\ncheckpoint_epochs = 3\nevery_steps = 7\n')
    with pytest.warns(OldNameWarning, match="report.checkpoint_epochs has no effect any more: .*checkpoint_seconds"):
        config = load_config(file)
    assert config.report.every_steps == 7 and "checkpoint_epochs" not in render_toml(config)
    assert main(["train", str(file), "--set", "report.checkpoint_epochs=1", "--print-config"]) == 0
    assert len(notes(capsys.readouterr().err)) == 1


def test_resume_and_evaluate_an_old_run(old_run: Path, capsys) -> None:
    capsys.readouterr()
    assert main(["train", "--resume", str(old_run), "--epochs", "2"]) in (0, STALLED)
    assert notes(capsys.readouterr().err) == ["note: preset 'seed' is called 'original' now"]
    config = (old_run / "config.toml").read_text()
    assert 'preset = "original"' in config and "# preset original" in config and "preset seed" not in config
    with pytest.warns(OldNameWarning, match="left_over -> residual_grad_norm"):
        rows = read_events(old_run)
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [1, 2]
    assert main(["evaluate", str(old_run), "--device", "cpu"]) == 0


def test_read_events_gives_old_rows_the_new_keys(tmp_path: Path) -> None:
    lost = {"event": "epoch", "step": 6, "floors": {"mean": None}, "nonfinite": {"floors/mean": "nan"}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*OLD_ROWS, lost)))
    with pytest.warns(OldNameWarning) as said:
        start, step, epoch, last = read_events(tmp_path)
    assert len(said) == 1
    assert start["baselines"] == OLD_FLOORS and start["peak_matmul_flop_per_s"] == 9e10 and epoch["mfu"] == 0.07
    assert step["health"] == {"modules_in_eval_mode": 0, "optimizer_batches": 2, "residual_grad_norm": 0.0}
    assert {"weight_drift_between_epochs", "weight_drift_in_validation", "scores"} == set(epoch["health"])
    assert epoch["health"]["scores"]["raw"]["prediction_hash"] == "3397ed04180af377"
    assert math.isnan(last["baselines"]["mean"])


def test_read_events_keeps_the_keys_of_other_trainers(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"val_loss": 0.5, "answers": 3}\n')
    assert read_events(file) == [{"val_loss": 0.5, "answers": 3}]


def test_read_events_of_a_new_run_does_not_warn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "epoch", **dict.fromkeys(KEYS.values(), 1)}) + "\n")
    with warnings.catch_warnings(action="error"):
        assert read_events(tmp_path)[0]["baselines"] == 1


def test_preset_seed_is_original_with_a_warning(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "seed"\n')
    for given in ({"preset": "seed"}, {"path": file}):
        with pytest.warns(OldNameWarning, match="preset 'seed' is called 'original' now"):
            assert load_config(**given) == load_config(preset="original")
    assert main(["train", "--preset", "seed", "--print-config"]) == 0
    said = capsys.readouterr()
    assert said.err == "note: preset 'seed' is called 'original' now\n" and said.out.startswith('preset = "original"')


def test_old_cause_name_is_muted_and_explained(capsys) -> None:
    with pytest.warns(OldNameWarning, match="cause 'stalled_at_floor' is called 'stalled_at_baseline' now"):
        assert known_causes(["stalled_at_floor"], "health.mute") == {"stalled_at_baseline"}
    assert main(["why", "--explain", "stalled_at_floor"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("# stalled_at_baseline") and len(notes(said.err)) == 1


def test_scenes_collapsed_is_effective_channel_with_a_warning() -> None:
    scenes = simulate(Task(), torch.arange(2), SceneGenerator(0, "train"))
    products = torch.zeros(2, 16, 16, 2)
    with pytest.warns(OldNameWarning, match="Scenes.collapsed is called effective_channel now"):
        assert replace(scenes, collapsed=products).effective_channel is products
    with pytest.warns(OldNameWarning):
        assert scenes.collapsed is None


@pytest.mark.parametrize("old", MODULES)
def test_old_modules_are_found_under_their_new_names(old: str) -> None:
    new = importlib.import_module(f"ris_fast.{MODULES[old]}")
    with pytest.warns(OldNameWarning, match=f"ris_fast.{old} is called ris_fast.{MODULES[old]} now"):
        sys.modules.pop(f"ris_fast.{old}", None)
        assert importlib.import_module(f"ris_fast.{old}") is new
    assert new.__spec__ is not None and new.__spec__.name == new.__name__ == f"ris_fast.{MODULES[old]}"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ris_fast.no_such_module")


def test_scenes_pickled_by_an_earlier_version_keep_their_field() -> None:
    scenes = simulate(Task(), torch.arange(2), SceneGenerator(seed=0, split="train"))
    state = {name: value for name, value in vars(scenes).items() if name != "effective_channel"}
    loaded = Scenes.__new__(Scenes)
    loaded.__setstate__(state | {"collapsed": torch.ones(3)})
    assert torch.equal(loaded.effective_channel, torch.ones(3)) and torch.equal(loaded.snapshots, scenes.snapshots)


@pytest.mark.parametrize(
    "setting, now",
    [
        ("health.mute=dead_units,stalled_at_floor", "dead_units,stalled_at_baseline"),
        ("model.options.inputs=collapsed", "effective_channel"),
    ],
)
def test_load_config_reads_old_words_in_values(setting: str, now: str) -> None:
    with pytest.warns(OldNameWarning, match="is called"):
        config = load_config(preset="original", overrides=[setting])
    assert now in (config.health.mute, config.model.options.get("inputs"))
