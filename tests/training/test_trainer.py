"""The contracts of the loop: one step a group, accumulation, skipping, resuming, counting, and a summary that is
true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.models import build_model
from ris_fast.training.callback import Callback
from ris_fast.training.checkpoint import CheckpointError
from ris_fast.training.state import RunState, RunStopped
from ris_fast.training.summary import summary
from ris_fast.training.trainer import Trainer

SMALL = [
    "task.ris_horizontal=4",
    "task.ris_vertical=4",
    "task.bs_antennas=4",
    "task.snapshots=8",
    "task.max_sources=2",
    "data.val_limit=40",
    "data.val_scenes=40",
    "training.compile=false",
    "training.precision=fp32",
    "model.name=hybrid",
    "model.options.width=32",
    "model.options.heads=4",
    "model.options.grid=5",
    "model.options.feedforward=32",
    "model.options.layers=1",
    "report.every_steps=1",
]


class Recorder(Callback):
    """Keeps every event."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def on_train_start(self, info: Any) -> None:
        self.info = dict(info)

    def on_log(self, row: Any) -> None:
        self.steps.append(dict(row))

    def on_epoch_end(self, row: Any) -> None:
        self.epochs.append(dict(row))

    def on_train_end(self, summary: Any) -> None:
        self.summary = dict(summary)


def small(*overrides: str, scenes: int = 64, batch: int = 16, epochs: int = 1) -> Config:
    return load_config(
        preset="original",
        overrides=[
            *SMALL,
            f"data.train_scenes={scenes}",
            f"training.batch_size={batch}",
            f"training.epochs={epochs}",
            *overrides,
        ],
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_trainer_sees_every_batch_once_and_reports_its_mean() -> None:
    recorder = Recorder()
    trainer = Trainer(small(scenes=8 * 16), callbacks=[recorder])
    seen, losses = [], []
    accumulate = trainer.step._accumulate

    def watched(scenes: Any, share: float) -> Any:
        seen.append(tuple(scenes.index.tolist()))
        result = accumulate(scenes, share)
        losses.append(float(result[0]))
        return result

    trainer.step._accumulate = watched
    trainer.fit()
    assert len(seen) == len(set(seen)) == 8
    assert sorted(index for batch in seen for index in batch) == list(range(128))
    assert trainer.optimizer.counters()["attempted"] == 8 and len(recorder.steps) == 8
    assert recorder.epochs[0]["train_loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)


@pytest.mark.parametrize("scenes", [64, 56])
def test_trainer_accumulated_step_equals_one_large_batch(scenes: int) -> None:
    """Also where the last micro-batch is ragged: every scene has the same weight."""

    def step(batch: int, accumulate: int) -> tuple[torch.Tensor, float]:
        trainer = Trainer(
            small(f"training.accumulate={accumulate}", "optimizer.max_grad_norm=0", scenes=scenes, batch=batch)
        )
        trainer.optimizer.clear_grads = False
        group = next(trainer._groups())
        result = trainer.step(group, planned=1)
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        return gradient, float(result.loss)

    whole, parts = step(64, 1), step(16, 4)
    assert whole[1] == pytest.approx(parts[1], rel=1e-5)
    assert (whole[0] - parts[0]).norm() < 1e-5 * whole[0].norm()


def test_trainer_first_step_moves_every_tensor() -> None:
    trainer = Trainer(small())
    before = weights(trainer)
    trainer.step(next(trainer._groups()), planned=1000)
    assert min(trainer.step.learning_rates().values()) > 0
    still = [name for name, value in weights(trainer).items() if value.equal(before[name])]
    assert not still


def test_trainer_groups_hold_every_parameter_once() -> None:
    trainer = Trainer(small())
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.model.parameters())
    for group in trainer.optimizer.param_groups:
        assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])
    assert {group["peak_lr"] for group in trainer.optimizer.param_groups} == {2e-4, 8e-4}


def test_trainer_skips_a_poisoned_batch() -> None:
    trainer = Trainer(small())
    groups = list(trainer._groups())
    trainer.step(groups[0], planned=10)
    before = weights(trainer)
    poisoned = groups[1][0].apply(lambda value: value * float("nan") if value.is_floating_point() else value)
    trainer.step([poisoned], planned=10)
    rate = trainer.step.learning_rates()
    after = weights(trainer)
    assert all(after[name].equal(before[name]) for name in before)
    counters = trainer.optimizer.counters()
    assert (counters["attempted"], counters["applied"], counters["skipped"]) == (2, 1, 1)
    assert counters["first_bad_tensor"]
    trainer.step(groups[2], planned=10)
    assert trainer.optimizer.counters()["applied"] == 2
    assert trainer.step.learning_rates() == rate  # the schedule counts applied steps, not attempted ones


def test_trainer_stops_when_every_batch_is_poisoned() -> None:
    recorder = Recorder()
    trainer = Trainer(small(scenes=16 * 30), callbacks=[recorder])
    scale = trainer.optimizer.scale
    trainer.optimizer.scale = lambda loss: scale(loss) * float("nan")
    with pytest.raises(RunStopped, match="non-finite, first in '"):
        trainer.fit()
    assert recorder.summary["verdict"] == "stopped" and recorder.summary["findings"] == ["steps_skipped"]
    assert recorder.summary["skipped_steps"] <= 10


def test_trainer_stops_when_a_group_makes_no_step() -> None:
    trainer = Trainer(small(scenes=64))
    step, calls = trainer.optimizer.step, []

    def every_other() -> None:
        calls.append(1)
        if len(calls) % 2:
            step()

    trainer.optimizer.step = every_other
    with pytest.raises(RunStopped, match="made 2 optimizer steps; its scenes, batch size and accumulation imply 4"):
        trainer.fit()


def test_trainer_resumes_bitwise(tmp_path: Path) -> None:
    whole = Trainer(small(epochs=3))
    whole.fit()
    cut = Trainer(small(epochs=3), tmp_path)
    groups = cut._groups

    def until_interrupted() -> Any:
        for number, group in enumerate(groups()):
            if cut.state.epoch == 1 and number == 2:
                raise KeyboardInterrupt
            yield group

    cut._groups = until_interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    resumed = Trainer(small(epochs=3), tmp_path, resume=True)
    assert (resumed.state.epoch, resumed.state.epoch_step) == (1, 2)
    summary = resumed.fit()
    assert all(value.equal(weights(resumed)[name]) for name, value in weights(whole).items())
    assert summary["optimizer_steps"] == 12 and summary["scenes_seen"] == 192


def test_trainer_checkpoint_holds_what_was_validated(tmp_path: Path) -> None:
    trainer = Trainer(small(epochs=2), tmp_path)
    summary = trainer.fit()
    from ris_fast.training.checkpoint import load_checkpoint, load_weights
    from ris_fast.training.validation import validate

    groups, manifest = load_checkpoint(tmp_path / "checkpoints", "best")
    kind = manifest["state"]["best_weights"]
    load_weights(trainer.model, groups["model" if kind == "raw" else "ema"], "best")
    score = validate(trainer.model, trainer.step.predict, trainer.loss, trainer.validation)
    assert score.nmse == pytest.approx(manifest["state"]["best_nmse"], rel=1e-6)
    assert summary["best_val_nmse"] == pytest.approx(score.nmse, rel=1e-6)
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == manifest


@pytest.mark.parametrize("extra, said", [("y_mix.weight", "train anew"), ("stem.mass", "not known: .'stem.mass'")])
def test_weights_of_another_network_say_what_to_do(extra: str, said: str) -> None:
    from ris_fast.training.checkpoint import load_weights

    model = Trainer(small()).model
    with pytest.raises(CheckpointError, match=f"old does not fit this network.*{said}"):
        load_weights(model, model.state_dict() | {extra: torch.zeros(1)}, "old")


def test_weights_of_an_earlier_pursuit_say_what_to_do() -> None:
    from ris_fast.training.checkpoint import load_weights

    model = build_model("backprojection", Task(), width=8)
    with pytest.raises(CheckpointError, match=r"stem.weight: \(8, 177\).* other features: train anew"):
        load_weights(model, model.state_dict() | {"stem.weight": torch.zeros(8, 177)}, "old")


def test_trainer_names_a_damaged_checkpoint(tmp_path: Path) -> None:
    Trainer(small(), tmp_path).fit()
    file = tmp_path / "checkpoints" / "last.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="last.safetensors cannot be read"):
        Trainer(small(epochs=2), tmp_path, resume=True)


def test_trainer_loss_is_the_same_in_training_and_validation() -> None:
    trainer = Trainer(small())
    scenes = trainer.source.batch("train", torch.arange(16))
    trainer.model.eval()
    with torch.no_grad():
        expected = float(trainer.loss(trainer.step.predict(scenes), scenes)[0])
    from ris_fast.training.validation import validate

    score = validate(trainer.model, trainer.step.predict, trainer.loss, [scenes[:10], scenes[10:]])
    assert score.loss == pytest.approx(expected, rel=1e-5)
    result = trainer.step([scenes], planned=10)
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)


def test_validate_scores_the_truth_zero() -> None:
    from ris_fast.models.prediction import Prediction
    from ris_fast.training.validation import validate

    trainer = Trainer(small())
    scenes = trainer.source.batch("val", torch.arange(32))
    score = validate(
        trainer.model,
        lambda each: Prediction(each.factor, None, None, None, None),
        type(trainer.loss)(task=trainer.config.task),
        [scenes],
    )
    assert abs(score.nmse) < 1e-6 and abs(score.loss) < 1e-6


def test_trainer_max_seconds_ends_and_anneals_the_run() -> None:
    recorder = Recorder()
    trainer = Trainer(
        small("training.max_seconds=3", "optimizer.final_lr=0.01", scenes=4096, epochs=1000), callbacks=[recorder]
    )
    summary = trainer.fit()
    assert summary["verdict"] in ("learned", "stalled") and summary["optimizer_steps"] < 256000
    last = recorder.steps[-1]["lr"]["backbone"]
    assert last < 0.5 * max(row["lr"]["backbone"] for row in recorder.steps)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trainer_trains_in_low_precision(precision: str) -> None:
    recorder = Recorder()
    Trainer(small(f"training.precision={precision}", epochs=2), callbacks=[recorder]).fit()
    losses = [row["train_loss"] for row in recorder.steps if row["train_loss"] == row["train_loss"]]
    assert losses and recorder.summary["skipped_steps"] < 8


def test_trainer_refuses_an_unknown_device() -> None:
    with pytest.raises(ConfigError, match="training.device"):
        Trainer(small("training.device=cuda:99"))


@pytest.mark.parametrize("part", ["model", "network", "loss", "optimizer", "source", "config", "device", "epoch_steps"])
def test_trainer_parts_cannot_be_replaced(part: str) -> None:
    trainer = Trainer(small())
    before = getattr(trainer, part)
    setattr(trainer, part, before)
    with pytest.raises(AttributeError, match=f"Trainer.{part} cannot be replaced"):
        setattr(trainer, part, torch.nn.Linear(2, 2))
    assert getattr(trainer, part) is before


def test_a_second_fit_validates_the_scenes_of_the_first() -> None:
    """The network remembers their features by identity: scenes in their place could be taken for others."""
    trainer = Trainer(small())
    trainer.fit()
    scenes = trainer.validation
    trainer.state.epoch = 0
    trainer.fit()
    assert trainer.validation is scenes and trainer.state.step == 8


def test_trainer_callbacks_and_folder_can_be_assigned(tmp_path: Path) -> None:
    trainer = Trainer(small())
    trainer.callbacks, trainer.folder = [told := Recorder()], tmp_path
    assert trainer.fit() == told.summary and (tmp_path / "checkpoints" / "last.safetensors").is_file()


class OldObserver:
    """What `observer=` took before there were callbacks."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.given: list[dict[str, Any]] = []
        self.start, self.step, self.epoch, self.finish = (
            lambda values, event=event: (self.events.append(event), self.given.append(values))
            for event in ("start", "step", "epoch", "finish")
        )


@pytest.mark.parametrize("way", ["keyword", "place", "assigned"])
def test_trainer_observer_still_works_with_a_warning(way: str) -> None:
    old = OldObserver()
    with pytest.warns(FutureWarning, match=r"callbacks=\[x\].*on_train_start.*start, step, epoch and finish") as said:
        if way == "assigned":
            trainer = Trainer(small())
            trainer.observer = old
        else:
            trainer = Trainer(small(), observer=old) if way == "keyword" else Trainer(small(), None, old)
    assert said[0].filename == __file__
    trainer.fit()
    assert old.events == ["start", *["step"] * 4, "epoch", "finish"]
    assert all(old.given[i]["floors"] == old.given[i]["baselines"] for i in (0, -1))
    assert old.given[1]["health"]["left_over"] == old.given[1]["health"]["residual_grad_norm"]
    with pytest.raises(AttributeError, match="trainer.callbacks"):
        trainer.observer  # noqa: B018


@pytest.mark.parametrize("given", [Recorder(), 3, Recorder], ids=["no list", "a number", "a class"])
def test_trainer_asks_for_a_list_of_callbacks(given: Any) -> None:
    with pytest.raises(TypeError, match=r"callbacks=\[\.\.\.\]"):
        Trainer(small(), callbacks=given)


def test_trainer_refuses_what_is_no_callback() -> None:
    with pytest.raises(TypeError, match="expected objects of ris_fast.Callback, got OldObserver"):
        Trainer(small(), callbacks=[OldObserver()]).fit()


def test_callbacks_are_called_in_order_and_see_each_other() -> None:
    class Adds(Callback):
        def on_log(self, row: dict[str, Any]) -> None:
            row["added"] = row["step"]

        def on_epoch_end(self, row: dict[str, Any]) -> None:
            row["added"] = row["step"]

    class AddsToTheSummary(Callback):
        def on_summary(self, summary: dict[str, Any]) -> None:
            summary["added"] = True

    before, behind = Recorder(), Recorder()
    returned = Trainer(small(), callbacks=[before, Adds(), behind, AddsToTheSummary()]).fit()
    assert [row["added"] for row in (*behind.steps, *behind.epochs)] == [1, 2, 3, 4, 4]
    assert not any("added" in row for row in (*before.steps, *before.epochs))
    assert before.summary["added"] and returned["added"]


def test_callback_step_methods_surround_every_step() -> None:
    class Steps(Callback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def on_step_start(self) -> None:
            self.events.append("start")

        def on_step_end(self) -> None:
            self.events.append("end")

        def on_log(self, row: dict[str, Any]) -> None:
            self.events.append("log")

    steps = Steps()
    Trainer(small(epochs=2), callbacks=[Callback(), steps]).fit()
    assert steps.events == ["start", "end", "log"] * 8


@pytest.mark.parametrize("best, verdict", [(0.856, "stalled"), (0.79, "stalled"), (0.76, "learned")])
def test_verdict_learned_beats_every_baseline_clearly(best: float, verdict: str) -> None:
    trainer = Trainer(small(), callbacks=[told := Recorder()])
    trainer.fit()
    assert {"zero", "identity", "mean", "lmmse"} == set(told.info["baselines"]) and 0 < told.info["baselines"][
        "lmmse"
    ] < 1
    assert told.info["training_baselines"].keys() == {"lmmse"} and told.info["mmse_bound"] is None
    state = RunState(initial_nmse=0.99, best_nmse=best)
    baselines = {"zero": 1.0, "mean": 0.986, "lmmse": 0.803}
    assert summary(state, baselines, from_weights=False)["verdict"] == verdict


@pytest.mark.parametrize(
    "init, best, verdict",
    [("", 0.0716, "stalled"), ("run", 0.0716, "learned"), ("run", 0.0738, "stalled"), ("", 0.06, "learned")],
)
def test_verdict_after_training_init_beats_its_start(init: str, best: float, verdict: str) -> None:
    state = RunState(initial_nmse=0.0737, best_nmse=best)
    baselines = {"mean": 0.879, "pursuit": 0.0853}
    assert summary(state, baselines, from_weights=bool(init))["verdict"] == verdict
