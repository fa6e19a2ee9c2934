"""What does not fit is refused at once with the setting that asks for it; what fits is left alone and its random
numbers with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.config.schema import Config, ConfigError, Optimizer
from ris_fast.config.section import SMALLEST_FLOAT
from ris_fast.training import footprint
from ris_fast.training.footprint import OutOfMemory, bytes_per_scene
from ris_fast.training.step import build_optimizer
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import Recorder, small

BILLION = 10**9


@pytest.mark.parametrize(
    "overrides, named",
    [
        (("training.batch_size=1000000000", "data.train_scenes=1000000000"), "training.batch_size = 1,000,000,000"),
        (
            ("training.batch_size=600", "training.accumulate=1000000000", "data.train_scenes=1000000000"),
            "training.accumulate = 1,000,000,000",
        ),
        (("data.train_scenes=1000000000000",), "data.train_scenes = 1,000,000,000,000"),
        (("data.val_limit=1000000000", "data.val_scenes=1000000000"), "data.val_limit = 1,000,000,000"),
    ],
)
def test_trainer_refuses_a_size_that_exceeds_memory(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(OutOfMemory, match=f"{named} exceeds this machine's memory: .* free"):
        Trainer(small(*overrides))


def test_footprint_counts_the_copies_of_checkpoints(tmp_path, monkeypatch) -> None:
    """Weights and averages for the last and the best one, two moments for the last."""
    config = small("training.batch_size=600", "data.train_scenes=600")
    trainer = Trainer(config)
    needed, weights = sum(footprint.needed_bytes(trainer).values()), 4 * trainer.parameters
    trainer.folder = tmp_path
    assert 6 * weights <= footprint.checkpoint_bytes(trainer) < 6.1 * weights  # buffers too
    monkeypatch.setattr(footprint, "free_memory", lambda: needed + 5 * weights)
    Trainer(config)
    with pytest.raises(OutOfMemory, match="training.batch_size = 600"):
        Trainer(config, tmp_path)
    Trainer(replace(config, optimizer=replace(config.optimizer, ema_decay=0.0)), tmp_path)


def test_train_exits_5_for_a_size_that_exceeds_memory(tmp_path, capsys) -> None:
    options = [
        part
        for text in (
            "task.ris_horizontal=4",
            "task.ris_vertical=4",
            "task.bs_antennas=4",
            "model.options.width=16",
            "data.train_scenes=1000000000",
        )
        for part in ("--set", text)
    ]
    assert (
        main(
            [
                "train",
                "--preset",
                "laptop",
                "--device",
                "cpu",
                "--no-compile",
                *options,
                "--batch-size",
                str(BILLION),
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 5
    )
    assert "training.batch_size = 1,000,000,000 exceeds" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_out_of_memory_names_a_batch_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: 2**26)
    with pytest.raises(OutOfMemory) as caught:
        Trainer(small(scenes=8192, batch=8192))
    size = int(str(caught.value).split("training.batch_size = ")[2].split()[0])
    assert 512 < size < 8192
    Trainer(small(scenes=8192, batch=size))


def test_trainer_notes_a_batch_larger_than_the_epoch() -> None:
    trainer = Trainer(small(scenes=24, batch=BILLION), callbacks=[told := Recorder()])
    assert trainer.fit()["optimizer_steps"] == 1
    (note,) = told.info["notes"]
    assert "is 1,000,000,000, and an epoch has 24 scenes: each step takes all of them" in note
    Trainer(small(scenes=24, batch=24), callbacks=[silent := Recorder()]).fit()
    assert silent.info["notes"] == []


def test_bytes_per_scene_grows_with_the_network() -> None:
    narrow, wide = (Trainer(small(f"model.options.width={width}", "model.options.dropout=0.1")) for width in (32, 128))
    before = torch.random.get_rng_state()
    (scene, saved), (same, more) = bytes_per_scene(narrow), bytes_per_scene(wide)
    assert torch.equal(torch.random.get_rng_state(), before) and scene == same > 0 and more > 1.5 * saved > 0


# ---- what the configuration takes, the optimizer takes
# -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "backbone_lr",
        "head_lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "max_grad_norm",
        "warmup",
        "final_lr",
        "ema_decay",
    ],
)
@pytest.mark.parametrize("end", ["low", "high"])
def test_build_optimizer_takes_every_configured_value(name: str, end: str) -> None:
    rule = {item.name: item.metadata for item in Optimizer.__dataclass_fields__.values()}[name]
    value = rule[end] if rule[end] is not None else 3.4e38
    config = small()
    config = replace(config, optimizer=replace(config.optimizer, **{name: float(value)}))
    build_optimizer(Trainer(small()).model, config)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, SMALLEST_FLOAT / 2])
def test_config_refuses_an_eps_the_optimizer_refuses(value: float) -> None:
    assert torch.finfo(torch.float32).tiny == SMALLEST_FLOAT
    with pytest.raises(ConfigError, match="optimizer.eps"):
        Optimizer(eps=value)
    assert isinstance(Config(optimizer=Optimizer(eps=SMALLEST_FLOAT)), Config)
