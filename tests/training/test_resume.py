"""Going on from a checkpoint: the same run, or a refusal that says what differs and what would do."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.commands.run_folder import resumed_config
from ris_fast.config.load import render_toml
from ris_fast.config.schema import Config, ConfigError
from ris_fast.files import StorageError
from ris_fast.inference.opened_run import run_config
from ris_fast.training import checkpoint
from ris_fast.training.callback import Callback
from ris_fast.training.checkpoint import CheckpointError, load_checkpoint, read_whole, save_checkpoint
from ris_fast.training.resume import finished, tensors_of
from ris_fast.training.state import RunStopped
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


@pytest.mark.parametrize(
    "batch, accumulate, steps, earlier", [(8, 2, 4, False), (32, 1, 3, False), (24, 1, 4, False), (8, 2, 4, True)]
)
def test_resume_within_an_epoch_shows_each_scene_once(
    batch: int, accumulate: int, steps: int, earlier: bool, tmp_path: Path
) -> None:
    """Whatever the scenes of a step; also from a checkpoint of an earlier version, which counts steps only."""
    whole = torch.cat([index for group in Trainer(small())._index_groups() for index in group])
    stopped_within_an_epoch(tmp_path, small())
    if earlier:
        groups, manifest = load_checkpoint(tmp_path / "checkpoints", "last")
        del manifest["sha256"], manifest["state"]["epoch_scenes"]
        save_checkpoint(tmp_path / "checkpoints", "last", groups, manifest)
    parted = Trainer(small(f"training.accumulate={accumulate}", batch=batch), tmp_path, resume=True)
    assert (parted.state.epoch_step, parted.state.epoch_scenes) == (2, 32)
    left = torch.cat([index for group in parted._index_groups() for index in group])
    assert left.equal(whole[32:])
    assert parted.plan.planned == steps
    summary = parted.fit()
    assert (summary["optimizer_steps"], summary["scenes_seen"]) == (steps, 64)


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


def full(path: Path, *_: Any) -> int:
    raise StorageError(path, OSError(28, "full"))


def test_summary_names_the_error_that_ended_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "save_tensors", full)
    trainer = Trainer(small(), tmp_path, callbacks=[told := Recorder()])
    with pytest.raises(StorageError):
        trainer.fit()
    assert told.summary["verdict"] == "stopped" and "No space left" in told.summary["ended_by"]


class At(Callback):
    """Does something before the step of this number, counted from 1."""

    def __init__(self, step: int, then: Callable[[Trainer], None]) -> None:
        self.number, self.then = step, then

    def watch(self, trainer: Trainer) -> Trainer:
        self.trainer = trainer
        trainer.callbacks.append(self)
        return trainer

    def on_step_start(self) -> None:
        if self.trainer.state.step == self.number - 1:
            self.then(self.trainer)


def save_at_the_next_step(trainer: Trainer) -> None:
    trainer.saved -= 1e6


def interrupt(trainer: Trainer) -> None:
    raise KeyboardInterrupt


def killed(trainer: Trainer) -> None:
    trainer.writer.finish()  # a kill would leave what is on disk by now
    raise ZeroDivisionError


def run_until_killed(config: Config, folder: Path, step: int) -> None:
    """A run whose last checkpoint falls due within its epoch, behind step 6 of 4 an epoch, and which then is killed."""
    trainer = At(6, save_at_the_next_step).watch(At(step, killed).watch(Trainer(config, folder)))
    with pytest.raises(ZeroDivisionError):
        trainer.fit()


@pytest.mark.parametrize("kill", [8, 14])
def test_resume_of_a_killed_run_from_a_timed_checkpoint_is_bitwise(kill: int, tmp_path: Path) -> None:
    """Also where epochs, and better ones, had ended since."""
    whole = Trainer(small("training.patience=1", epochs=4), tmp_path / "whole", callbacks=[told := Recorder()])
    whole.fit()
    assert told.summary["epochs"] == 4  # every epoch is the best: the patience is not what ends the run
    run_until_killed(small("training.patience=1", epochs=4), tmp_path / "cut", kill)
    resumed = Trainer(
        small("training.patience=1", epochs=4), tmp_path / "cut", callbacks=[again := Recorder()], resume=True
    )
    assert (resumed.state.epoch, resumed.state.epoch_step) == (1, 2)
    resumed.fit()
    for name in ("last", "best"):
        (groups, manifest), (expected, other) = (
            load_checkpoint(tmp_path / run / "checkpoints", name) for run in ("cut", "whole")
        )
        assert groups.keys() == expected.keys()
        assert all(
            value.equal(expected[prefix][key]) for prefix, group in groups.items() for key, value in group.items()
        )
        apart = {key for key, value in manifest["state"].items() if value != other["state"][key]}
        assert apart <= {"seconds", "train_loss"}  # the loss is that of the epoch's steps since
    assert again.epochs[-1]["val_nmse_raw"] == told.epochs[-1]["val_nmse_raw"]


def test_last_checkpoint_is_written_by_time(tmp_path: Path) -> None:
    def saved(seconds: float) -> tuple[int, int]:
        folder = tmp_path / str(seconds)
        trainer = At(8, killed).watch(Trainer(small(f"report.checkpoint_seconds={seconds}", epochs=2), folder))
        with pytest.raises(ZeroDivisionError):
            trainer.fit()
        last = read_whole(folder / "checkpoints", "last")
        return trainer.writer.figures()["written"], last[1]["state"]["step"] if last else 0

    assert saved(0.0) == saved(60.0) == (1, 0)  # the best one of the first epoch
    written, step = saved(1e-6)
    assert written > 1 and 0 < step < 8


def test_best_checkpoint_has_no_moments_and_resumes(tmp_path: Path) -> None:
    trained(tmp_path, epochs=2)
    (last, _), (best, manifest) = (load_checkpoint(tmp_path / "checkpoints", name) for name in ("last", "best"))
    assert manifest["state"]["epoch"] == 2 and best["optimizer"].keys() == {"counters"}
    assert {key.partition(".")[0] for key in last["optimizer"]} == {"counters", "step", "exp_avg", "exp_avg_sq"}
    whole, resumed = (Trainer(small(epochs=4), tmp_path, resume=name) for name in ("last", "best"))
    assert any("best.safetensors has no moments" in note for note in resumed.notes) and not whole.notes
    for key in ("model", "ema"):
        groups = tensors_of(resumed.model, resumed.optimizer, moments=False)
        assert all(value.equal(last[key][name]) for name, value in groups[key].items())
    assert resumed.optimizer.counters() == whole.optimizer.counters() and not resumed.optimizer.state
    told = [Recorder(), Recorder()]
    for trainer, recorder in zip((whole, resumed), told):
        trainer.callbacks.append(recorder)
        trainer.folder = None
        trainer.fit()
    assert [row["lr"] for row in told[0].steps] == [row["lr"] for row in told[1].steps]
    assert told[1].summary["optimizer_steps"] == 16


def test_checkpoint_of_an_earlier_version_resumes_bitwise(tmp_path: Path) -> None:
    """It had the averages twice, and moments in the best one too."""
    whole = Trainer(small(epochs=3), tmp_path / "whole")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        At(9, interrupt).watch(Trainer(small(epochs=3), tmp_path)).fit()
    folder = tmp_path / "checkpoints"
    groups, manifest = load_checkpoint(folder, "last")
    averages = {f"ema.{key}": value.clone() for key, value in groups["ema"].items()}
    for name in ("last", "best"):
        save_checkpoint(folder, name, groups | {"optimizer": groups["optimizer"] | averages}, manifest)
        resumed = Trainer(small(epochs=3), tmp_path, resume=name)
        assert not resumed.notes
        resumed.folder = None
        resumed.fit()
        for one, other in zip(
            *(tensors_of(each.model, each.optimizer, moments=True).items() for each in (whole, resumed))
        ):
            assert one[0] == other[0] and all(value.equal(other[1][key]) for key, value in one[1].items())


def test_error_of_the_checkpoint_writer_ends_the_run_at_the_next_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "save_tensors", full)
    trainer = Trainer(small(epochs=5), tmp_path, callbacks=[told := Recorder()])

    def until_the_thread_has_failed(trainer: Trainer) -> None:
        trainer.writer._thread.join()

    At(6, save_at_the_next_step).watch(At(7, until_the_thread_has_failed).watch(trainer))
    monkeypatch.setattr(trainer.writer, "finish", trainer.writer.poll)
    with pytest.raises(StorageError, match="No space left"):
        trainer.fit()
    assert told.summary["optimizer_steps"] < 8 and "checkpoint_error" not in told.summary


def test_error_of_the_checkpoint_writer_is_told_beside_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "save_tensors", full)

    def stop(trainer: Trainer) -> None:
        raise RunStopped("enough", "steps_skipped")

    trainer = Trainer(small(epochs=5), tmp_path, callbacks=[told := Recorder()])
    monkeypatch.setattr(trainer.writer, "poll", lambda: None)
    At(5, stop).watch(trainer)
    with pytest.raises(RunStopped, match="enough"):
        trainer.fit()
    assert "No space left" in told.summary["checkpoint_error"] and told.summary["findings"] == ["steps_skipped"]


def same_checkpoint(one: Path, other: Path, name: str = "last") -> bool:
    (groups, _), (expected, _) = (load_checkpoint(run / "checkpoints", name) for run in (one, other))
    return groups.keys() == expected.keys() and all(
        value.equal(expected[prefix][key]) for prefix, group in groups.items() for key, value in group.items()
    )


@pytest.mark.parametrize("where", ["behind the update", "before it", "in a callback", "while the best is saved"])
def test_a_signal_anywhere_in_a_run_leaves_a_state_that_goes_on_bitwise(
    where: str, tmp_path: Path, monkeypatch, terminal_signals: None
) -> None:
    trained(tmp_path / "whole", epochs=3)
    trainer = Trainer(small(epochs=3), tmp_path / "cut")
    step, save = trainer.optimizer.step, trainer._save

    def update() -> None:
        if where == "before it" and trainer.state.step == 5:
            signal.raise_signal(signal.SIGINT)
        step()
        if where == "behind the update" and trainer.state.step == 5:
            signal.raise_signal(signal.SIGINT)

    def saved(name: str) -> None:
        if where == "while the best is saved" and (name, trainer.state.epoch) == ("best", 2):
            signal.raise_signal(signal.SIGINT)
        save(name)

    trainer.optimizer.step, trainer._save = update, saved

    class Interrupting(Callback):
        def on_step_end(self) -> None:
            if where == "in a callback" and trainer.state.step == 5:
                signal.raise_signal(signal.SIGINT)

    trainer.callbacks.append(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = Trainer(small(epochs=3), tmp_path / "cut", resume=True)
    assert (resumed.state.step, resumed.state.epoch) == ((8, 2) if "best" in where else (6, 1))
    resumed.fit()
    assert all(same_checkpoint(tmp_path / "cut", tmp_path / "whole", name) for name in ("last", "best"))


def test_a_second_signal_that_breaks_an_update_off_saves_nothing_of_it(tmp_path: Path, terminal_signals: None) -> None:
    trainer = Trainer(small(), tmp_path)
    step = trainer.optimizer.step

    def update() -> None:
        step()
        if trainer.state.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    trainer.optimizer.step = update
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert read_whole(tmp_path / "checkpoints", "last") is None


def test_interrupt_during_a_write_leaves_the_newest_checkpoint(tmp_path: Path, monkeypatch) -> None:
    write, entered = checkpoint.save_tensors, threading.Event()

    def slow(path: Path, *values: Any) -> int:
        entered.set()
        time.sleep(0.3)
        return write(path, *values)

    def interrupt_the_write(trainer: Trainer) -> None:
        assert entered.wait(60) and trainer.writer.busy("last")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    trainer = At(2, save_at_the_next_step).watch(At(3, interrupt_the_write).watch(Trainer(small(), tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoints", "last")[1]["state"]["step"] == 2
    assert trainer.writer.figures()["written"] == 2 and not trainer.writer.busy("last")


def test_fit_of_a_finished_run_leaves_its_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / "checkpoints" / "last.safetensors"
    before = path.read_bytes()
    assert Trainer(small(), tmp_path, resume="best").fit()["epochs"] == 1
    assert path.read_bytes() == before


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


def test_resume_of_a_run_from_before_a_setting_was_there(tmp_path: Path) -> None:
    trained(tmp_path)
    for name in ("last", "best"):
        groups, manifest = load_checkpoint(tmp_path / "checkpoints", name)
        del manifest["identity"]["task.phase_error_deg"]
        save_checkpoint(tmp_path / "checkpoints", name, groups, manifest)
    assert Trainer(small(epochs=2), tmp_path, resume=True).fit()["epochs"] == 2
    with pytest.raises(ConfigError, match="task.phase_error_deg was 0.0 and is 5.0"):
        Trainer(small("task.phase_error_deg=5", epochs=3), tmp_path, resume=True)
