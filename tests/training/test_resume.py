"""Going on from a checkpoint: the same run, or a refusal that says what differs and what would do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.commands.run_folder import resumed_config, run_config
from ris_fast.config.load import render_toml
from ris_fast.config.schema import Config, ConfigError
from ris_fast.files import StorageError
from ris_fast.training import trainer as loop
from ris_fast.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ris_fast.training.resume import finished
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import Recorder, small


def trained(folder: Path, *overrides: str, **sizes: int) -> dict[str, Any]:
    return Trainer(small(*overrides, **sizes), folder).fit()


def stopped_within_an_epoch(folder: Path, config: Config) -> None:
    """Two steps of the first epoch, then Ctrl-C."""
    trainer = Trainer(config, folder)
    step = trainer.step

    def until_the_third(group: Any, planned: int) -> Any:
        if trainer.state.step == 2:
            raise KeyboardInterrupt
        return step(group, planned)

    until_the_third.telemetry, until_the_third.learning_rates = step.telemetry, step.learning_rates
    until_the_third.network, until_the_third.predict = step.network, step.predict
    trainer.step = until_the_third
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_trainer_takes_its_folder_as_text(tmp_path: Path) -> None:
    Trainer(small(), str(tmp_path / "run")).fit()
    assert Trainer(small(epochs=2), str(tmp_path / "run"), resume=True).state.epoch == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, words",
    [
        ("task.snr_max_db=30.0", "task.snr_max_db was 20.0 and is 30.0"),
        ("training.seed=7", "training.seed was 0 and is 7"),
        ("data.seed=7", "data.seed was 0 and is 7"),
        ("data.train_scenes=32", "data.train_scenes was 64 and is 32"),
        ("data.val_limit=20", "data.val_limit was 40 and is 20"),
        ("model.options.width=64", "model.options.width was 32 and is 64"),
        ("data.fixed=true", "data.fixed was False and is True"),
    ],
)
def test_resume_refuses_another_task_data_or_network(change: str, words: str, tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        Trainer(small(change, epochs=2), tmp_path, resume=True)


def test_resume_allows_new_rates_loss_weights_and_precision(tmp_path: Path) -> None:
    trained(tmp_path)
    again = Trainer(
        small("optimizer.head_lr=1e-5", "loss.cov_pred=0.1", "training.precision=bf16", epochs=2), tmp_path, resume=True
    )
    assert again.fit()["epochs"] == 2


def test_resume_within_an_epoch_keeps_the_scenes_of_a_step(tmp_path: Path) -> None:
    stopped_within_an_epoch(tmp_path, small())
    with pytest.raises(ConfigError, match="steps of 16 scenes"):
        Trainer(small(batch=32), tmp_path, resume=True)
    parted = Trainer(small("training.accumulate=2", batch=8), tmp_path, resume=True)
    assert parted.state.epoch_step == 2
    summary = parted.fit()
    assert (summary["optimizer_steps"], summary["scenes_seen"]) == (4, 64)


def test_resume_after_an_epoch_replans_for_a_larger_batch(tmp_path: Path) -> None:
    trained(tmp_path, epochs=2)
    larger = Trainer(small(batch=32, epochs=4), tmp_path, resume=True)
    assert larger.plan.planned == 2 * 4 + 2 * 2
    assert larger.fit()["optimizer_steps"] == 12


@pytest.mark.slow
def test_resume_measures_distance_from_the_first_weights(tmp_path: Path) -> None:
    whole = Trainer(small(epochs=3), callbacks=[told := Recorder()])
    whole.fit()
    stopped_within_an_epoch(tmp_path, small(epochs=3))
    Trainer(small(epochs=3), tmp_path, callbacks=[again := Recorder()], resume=True).fit()
    assert again.epochs[-1]["health"]["scores"] == told.epochs[-1]["health"]["scores"]
    assert again.epochs[-1]["health"]["distance"] == told.epochs[-1]["health"]["distance"] > 0
    assert again.epochs[-1]["epochs"] == 3


def test_summary_names_the_error_that_ended_the_run(tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError(tmp_path / "best.safetensors", OSError(28, "full"))

    monkeypatch.setattr(loop, "save", full)
    trainer = Trainer(small(), tmp_path, callbacks=[told := Recorder()])
    with pytest.raises(StorageError):
        trainer.fit()
    assert told.summary["verdict"] == "stopped" and "No space left" in told.summary["ended_by"]


def test_resume_offers_best_where_last_is_damaged(tmp_path: Path) -> None:
    trained(tmp_path)
    last = tmp_path / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="'best' is whole; give .*best.safetensors"):
        Trainer(small(epochs=2), tmp_path, resume=True)
    assert Trainer(small(epochs=2), tmp_path, resume="best").fit()["epochs"] == 2


def test_finished_says_what_would_give_the_run_more(tmp_path: Path) -> None:
    trained(tmp_path, epochs=2)

    def left(*overrides: str, epochs: int = 3, **changed: int) -> str:
        resumed = Trainer(small(*overrides, epochs=epochs), tmp_path, resume=True)
        return finished(resumed.config.training, replace(resumed.state, **changed))

    assert left(epochs=2).startswith("2 epochs are done and 2 are asked for; give a larger --epochs")
    assert left() == ""
    assert "larger --max-seconds" in left("training.max_seconds=1e-3")
    assert "larger training.patience" in left("training.patience=1", epochs_since_best=1)


def test_trainer_names_what_is_no_config() -> None:
    with pytest.raises(ConfigError, match="expected a Config, got dict.*load_config"):
        Trainer({"preset": "laptop"})  # type: ignore[arg-type]


def test_training_seed_draws_weights_and_data_seed_scenes() -> None:
    def drawn(*overrides: str) -> tuple[Any, Any, Any]:
        trainer = Trainer(small(*overrides))
        scenes = [trainer.source.batch(split, torch.arange(8)).snapshots for split in ("train", "val", "test")]
        order = torch.cat([index for group in trainer._index_groups() for index in group])
        return torch.cat([value.flatten() for value in trainer.model.state_dict().values()]), torch.cat(scenes), order

    first, weights, scenes = drawn(), drawn("training.seed=1"), drawn("data.seed=1")
    assert [torch.equal(one, other) for one, other in zip(first, weights)] == [False, True, False]
    assert [torch.equal(one, other) for one, other in zip(first, scenes)] == [True, False, True]


def test_resume_of_a_run_with_one_seed_keeps_its_scenes(tmp_path: Path) -> None:
    """Its config.toml has no data.seed, and training.seed drew its scenes."""
    config = small("training.seed=5", "data.seed=5")
    Trainer(config, tmp_path).fit()
    before, data, after = render_toml(config).partition("[data]\n")
    (tmp_path / "config.toml").write_text(before + data + re.sub(r"^seed = 5 .*\n", "", after, count=1, flags=re.M))
    again = resumed_config(tmp_path, {}, ["training.epochs=2"], {})
    assert (again.training.seed, again.data.seed) == (5, 5) and run_config(tmp_path).data.seed == 5
    assert resumed_config(tmp_path, {}, ["training.epochs=2", "data.seed=3"], {}).data.seed == 3
    path = tmp_path / "checkpoints" / "last.safetensors"
    groups, manifest = load_checkpoint(path.parent, "last")
    del manifest["identity"]["data.seed"]
    save_checkpoint(path.parent, "last", groups, manifest)
    assert Trainer(again, tmp_path, resume=True).fit()["epochs"] == 2
