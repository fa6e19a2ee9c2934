"""A user's array, codes and channel through the commands: the page's own examples, and what is noticed when they
change."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.commands.mismatch import mismatch
from ris_fast.config.load import load_config
from ris_fast.config.schema import ConfigError
from ris_fast.data.open_source import open_source
from ris_fast.models import build_model
from ris_fast.physics import array, own_channel, scenes
from ris_fast.training.resume import find

PAGE = (Path(__file__).parents[2] / "docs" / "own-physics.md").read_text(encoding="utf-8")
RAN = 0, 4  # trained, or trained too little to have learned
QUICK = "training.compile=false", "training.batch_size=32", "data.val_scenes=16", "data.test_scenes=16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's Python writes: an array and a code book; and its channel."""
    found = tmp_path_factory.mktemp("own")
    files, channel = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(files.replace('"elements.npy"', f'"{found}/elements.npy"').replace('"codes.npy"', f'"{found}/codes.npy"'), {})
    (found / "channel.py").write_text(channel)
    return found


def settings(folder: Path, *more: str) -> list[str]:
    given = {"elements_file": "elements.npy", "codes_file": "codes.npy", "channel": "channel.py:draw"}
    return [f"task.{key}={folder / name}" for key, name in given.items()] + [*QUICK, *more]


def as_arguments(overrides: list[str]) -> list[str]:
    return [each for text in overrides for each in ("--set", text)]


def fresh_process() -> None:
    """Nothing of a file is remembered."""
    for kept in (array._of_file, scenes.task_codes, scenes.task_positions, own_channel._sampler):
        kept.cache_clear()


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    out = folder / "set"
    arguments = ["simulate", "--out", str(out), "--scenes", "64", "--jobs", "2", *as_arguments(settings(folder))]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def run(folder: Path, data: Path) -> Path:
    """A run on the data set, and continued."""
    out = folder / "run"
    quick = as_arguments([*QUICK, "health.stop=false", "model.options.width=32", "report.plots=false"])
    assert main(["train", "--data", str(data), "--out", str(out), "--epochs", "1", *quick]) in RAN
    assert main(["train", "--resume", str(out), "--epochs", "2"]) in RAN
    return out


def test_own_physics_in_a_data_set_are_those_of_the_simulation(folder: Path, data: Path) -> None:
    read = open_source(load_config(flags={"data.path": str(data)}), "cpu").batch("val", torch.arange(8))
    made = open_source(load_config(overrides=settings(folder)), "cpu").batch("val", torch.arange(8))
    assert made.channel.shape == (8, 16, 100, 2)
    for name in ("snapshots", "channel", "codes", "factor"):
        assert torch.allclose(getattr(read, name), getattr(made, name), rtol=1e-5, atol=1e-6), name
    assert main(["simulate", "--check", str(data)]) == 0


@pytest.mark.slow
def test_own_physics_run_is_evaluated_predicted_and_compared(
    folder: Path, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--opponents", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nmse"]["mean"] < 1 and found["baselines"].keys() >= {"pursuit", "lmmse", "blind_likelihood"}
    assert found["positions"]["estimators"]
    file, out = data / "test-00000.safetensors", folder / "answer.npz"
    assert main(["predict", str(run), "--data", str(file), "--out", str(out)]) == 0
    with np.load(out) as answer:
        assert any(answer[name].shape[-1] == 100 or 100 in answer[name].shape for name in answer.files)
    rng = np.random.default_rng(1)
    np.save(folder / "moved.npy", np.load(folder / "elements.npy") + rng.normal(0, 0.05, (100, 2)))
    np.save(folder / "few.npy", np.load(folder / "elements.npy")[:99])
    rows = mismatch([run], [f"task.elements_file={folder / 'moved.npy'}"], scenes=16, device="cpu")["tests"]
    assert rows[1]["test"] == {"elements_file": str(folder / "moved.npy")}
    pursuit = [row["runs"]["run"]["baselines"]["pursuit"] for row in rows]
    assert pursuit[1] > 1.2 * pursuit[0]
    with pytest.raises(ConfigError, match="scenes of 99 elements do not fit the network of run, .* with 100"):
        mismatch([run], [f"task.elements_file={folder / 'few.npy'}"], scenes=16, device="cpu")


def test_a_changed_file_is_noticed_and_a_moved_one_is_not(
    folder: Path, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By run and data set; what lies elsewhere is given by its new place."""
    mine, manifest = tmp_path / "run", json.loads((data / "manifest.json").read_text())["task"]
    shutil.copytree(run, mine)
    before = (folder / "elements.npy").read_bytes()
    moved = shutil.move(folder / "elements.npy", tmp_path / "elements.npy")
    fresh_process()
    try:
        assert main(["train", "--resume", str(mine), "--epochs", "3"]) == 2
        assert "elements.npy': there is no such file" in capsys.readouterr().err
        there = f"task.elements_file={moved}"
        assert main(["train", "--resume", str(mine), "--epochs", "3", "--set", there]) in RAN
        source = open_source(load_config(overrides=[there], flags={"data.path": str(data)}), "cpu")
        assert source.task.elements_hash == manifest["elements_hash"]
        np.save(moved, np.load(moved) + 1e-3)
        fresh_process()
        assert main(["train", "--resume", str(mine), "--epochs", "4"]) == 2
        assert "elements.npy': the file has changed" in capsys.readouterr().err
        assert main(["train", "--resume", str(mine), "--epochs", "4", "--set", there]) == 3
        assert "key 'task': found elements_hash" in capsys.readouterr().err
        config = load_config(mine / "config.toml", overrides=["data.source=simulate", "data.train_scenes=64", there])
        with pytest.raises(ConfigError, match="task.elements_hash was '.*' and is '"):
            find(mine, "last", config, open_source(config, "cpu"))
    finally:
        (folder / "elements.npy").write_bytes(before)
        fresh_process()


def test_a_data_set_needs_neither_its_codes_nor_its_channel(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are in it: it is read, and checked but for the scenes that would be simulated again."""
    away = [(folder / name, tmp_path / name) for name in ("codes.npy", "channel.py")]
    for here, there in away:
        shutil.move(here, there)
    fresh_process()
    try:
        config = load_config(flags={"data.path": str(data)})
        assert open_source(config, "cpu").batch("train", torch.arange(2)).channel is not None
        assert main(["simulate", "--check", str(data)]) == 0
        assert "no scene could be simulated again: task.codes_file = " in capsys.readouterr().out
        with pytest.raises(ConfigError, match="task.codes_file = .*there is no such file"):
            scenes.check_physics(config.task, "cpu")
    finally:
        for here, there in away:
            shutil.move(there, here)


def test_hybrid_says_that_it_needs_a_grid(folder: Path) -> None:
    task = load_config(overrides=settings(folder)).task
    with pytest.raises(ConfigError, match="hybrid: .* rows and columns"):
        build_model("hybrid", task)


def test_contents_come_from_where_the_file_was_named(folder: Path, tmp_path: Path) -> None:
    """A later layer that names a file means what lies there, and a run's own record says where its content is from."""
    np.save(tmp_path / "other.npy", np.load(folder / "elements.npy")[:50])
    first = load_config(overrides=[f"task.elements_file={folder / 'elements.npy'}"])
    toml = tmp_path / "a.toml"
    toml.write_text(
        f'[task]\nelements_file = "{first.task.elements_file}"\nelements_hash = "{first.task.elements_hash}"'
    )
    second = load_config(toml, overrides=[f"task.elements_file={tmp_path / 'other.npy'}"])
    assert second.task.elements == 50 and second.task.elements_hash != first.task.elements_hash
    assert first.provenance["task.elements_hash"] == "--set"
    assert load_config(toml, overrides=["task.elements_file="]).task.elements == 144
