"""The automatic batch size, and the profile of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.environment import free_memory
from ris_fast.training import batch_size as batch
from ris_fast.training.batch_size import Trial, choose_batch_size, pick
from ris_fast.training.profile import FIRST, STEPS, Profile
from ris_fast.training.trainer import Trainer

SMALL = [
    "task.ris_horizontal=4",
    "task.ris_vertical=3",
    "task.bs_antennas=8",
    "model.options.width=16",
    "model.options.depth=1",
    "data.train_scenes=200",
    "data.val_scenes=20",
    "report.plots=false",
]


def config(*overrides: str) -> Config:
    return load_config(None, "laptop", [*SMALL, *overrides], {"training.device": "cpu"})


def test_pick_takes_the_largest_of_the_fastest_sizes() -> None:
    trials = [
        Trial(32, 50.0, 1),
        Trial(64, 97.0, 1),
        Trial(128, 100.0, 1),
        Trial(256, 96.0, 1),
        Trial(512, 80.0, 1),
        Trial(1024, 0.0, 0),
    ]
    assert pick(config("data.train_scenes=1000000", "training.max_seconds=0"), trials) == 256


def test_pick_keeps_enough_updates() -> None:
    trials = [Trial(32, 100.0, 1), Trial(64, 200.0, 1), Trial(128, 400.0, 1)]
    assert pick(config("training.epochs=70", "data.train_scenes=1000", "training.max_seconds=0"), trials) == 64
    assert pick(config("training.epochs=1", "data.train_scenes=10", "training.max_seconds=0"), trials) == 32
    assert pick(config("training.epochs=1000", "data.train_scenes=1000000", "training.max_seconds=330"), trials) == 128


def test_choose_batch_size_tries_until_one_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def tried(_: Config, size: int) -> Trial:
        seen.append(size)
        return Trial(size, 1e9 * size if size < 256 else 0.0, 1)

    monkeypatch.setattr(batch, "try_size", tried)
    assert choose_batch_size(config("training.epochs=100000", "training.max_seconds=0"))[0] == 128 and seen == [
        32,
        64,
        128,
        256,
    ]
    monkeypatch.setattr(batch, "try_size", lambda _, size: Trial(size, 0.0, 0))
    assert choose_batch_size(config())[0] == 1


def test_choose_batch_size_stays_within_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "try_size", lambda _, size: Trial(size, 1e9, size * 2**30))
    monkeypatch.setattr(batch, "free_memory", lambda: 200 * 2**30)
    assert [trial.batch_size for trial in choose_batch_size(config())[1]] == [32, 64, 128]
    assert batch._room(Trial(32, 1.0, 0), config())


def test_try_size_makes_a_real_step_or_says_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch.try_size(config(), 256).scenes_per_s > 0  # more than an epoch has

    def too_much(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(batch, "_timed", too_much)
    assert batch.try_size(config(), 8) == Trial(8, 0.0, 0)
    monkeypatch.setattr(batch, "_timed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.try_size(config(), 8)


def test_free_memory_is_less_than_the_machine_has() -> None:
    assert 0 < free_memory() < 2**45


def test_batch_size_auto_sets_the_size_and_its_provenance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(batch, "choose_batch_size", lambda _: (48, [Trial(48, 10.0, 1), Trial(96, 0.0, 0)]))
    assert main(["train", "--preset", "laptop", "--device", "cpu", "--batch-size", "auto", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "96: does not fit" in out and [line.split() for line in out.splitlines() if line.startswith("batch_size")][
        0
    ][2:] == ["48", "#", "--batch-size", "auto"]
    assert main(["train", "--batch-size", "many"]) == 2


def test_profiled_run_leaves_a_trace_and_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = config("training.compile=false", "health.preflight=false")
    settings = replace(settings, training=replace(settings.training, batch_size=10, epochs=1, max_seconds=0.0))
    told: list[str] = []
    Trainer(settings, callbacks=[Profile(tmp_path / "profile", told.append)]).fit()
    assert 200 // 10 >= FIRST + STEPS, "the run must be long enough"
    table = (tmp_path / "profile" / "operations.txt").read_text().splitlines()
    assert len(table) == 11 and all(line.endswith("calls") for line in table[1:]) and table[1] in told[0]
    names = {
        event.get("name") for event in json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert "ris_fast::scenes" in names and "ris_fast::fused_step_apply" in names
