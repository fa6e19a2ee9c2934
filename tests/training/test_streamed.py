"""Training on scenes that a thread reads ahead is training on scenes in memory, bit for bit, and the thread ends with
the run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.config.schema import Config
from ris_fast.data.errors import DataError
from ris_fast.data.write import write_shards
from ris_fast.health.monitor.nan_replay import replay
from ris_fast.training.trainer import Trainer
from tests.training.test_resume import At, interrupt
from tests.training.test_trainer import small, weights

SCENES = 56  # steps of 16, 16, 16 and 8


@pytest.fixture()
def written(tmp_path: Path) -> Path:
    write_shards(small(), tmp_path / "set", {"train": SCENES, "val": 40, "test": 4}, shard_scenes=16)
    return tmp_path / "set"


def from_files(path: Path, *overrides: str, memory: str = "files", **sizes: int) -> Config:
    where = (f"data.path={path}", f"data.memory={memory}")
    return small(*where, *overrides, scenes=SCENES, **{"epochs": 2, **sizes})


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ris-fast-ahead")]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_from_files_is_training_from_memory(written: Path, accumulate: int) -> None:
    trained = {}
    for memory in ("host", "files"):
        config = from_files(written, f"training.accumulate={accumulate}", memory=memory, batch=16 // accumulate)
        trainer = Trainer(config)
        assert trainer.source.reads_ahead == (memory == "files")
        summary = trainer.fit()
        assert (summary["optimizer_steps"], summary["scenes_seen"]) == (8, 2 * SCENES)
        trained[memory] = weights(trainer)
    assert same(trained["host"], trained["files"]) and readers() == []


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupt_ends_the_reader_and_the_run_goes_on_bitwise(written: Path, tmp_path: Path, step: int) -> None:
    whole = Trainer(from_files(written))
    whole.fit()
    trainer = At(step, interrupt).watch(Trainer(from_files(written), tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt) as held:  # its traceback holds the loop, and the loop its batches
        trainer.fit()
    assert held.tb is not None and readers() == []
    again = Trainer(from_files(written), tmp_path / "run", resume=True)
    assert again.state.step == step - 1
    again.fit()
    assert same(weights(again), weights(whole))


def test_a_file_that_shrinks_under_a_run_ends_it_with_its_name(written: Path, tmp_path: Path) -> None:
    def cut(trainer: Any) -> None:
        for path in written.glob("train-*"):
            os.truncate(path, 1000)

    trainer = At(2, cut).watch(Trainer(from_files(written, epochs=20), tmp_path / "run"))
    with pytest.raises(DataError, match="train-0000.*changed while it was in use"):
        trainer.fit()
    assert readers() == [] and trainer.state.step >= 2


def test_a_replayed_step_is_read_again_and_leaves_no_reader(written: Path) -> None:
    trainer = At(3, interrupt).watch(Trainer(from_files(written)))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert replay(trainer) == [] and readers() == []
    assert next(trainer._groups())[0].batch == 16
