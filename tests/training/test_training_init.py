"""A new run that starts from the weights of another: the same network, whatever the scenes; nothing else is taken
over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ris_fast.config.schema import ConfigError
from ris_fast.training.checkpoint import CheckpointError, better_weights
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import Recorder, small, weights


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "source"
    Trainer(small("training.seed=3", epochs=2), folder).fit()
    return folder


@pytest.mark.parametrize("place, name", [("", "best"), ("checkpoints/last.safetensors", "last")])
def test_training_init_takes_weights_and_nothing_else(place: str, name: str, source: Path) -> None:
    config = small(f'training.init="{source / place}"', "task.snr_min_db=5.0", "data.seed=9")
    trainer = Trainer(config, callbacks=[told := Recorder()])
    expected, kind, _ = better_weights(source / "checkpoints", name)
    assert all(torch.equal(value, expected[key]) for key, value in weights(trainer).items())
    assert (trainer.state.step, trainer.state.epoch, trainer.optimizer.counters()["applied"]) == (0, 0, 0)
    trainer.fit()
    assert any(
        f"starts from the {kind} weights of epoch" in note and f"'{name}'" in note for note in told.info["notes"]
    )


def test_training_init_is_not_read_again_on_resume(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "gone"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(source / "checkpoints")
    Trainer(small(f'training.init="{copy}"'), tmp_path / "run").fit()
    (copy / "checkpoints").unlink()
    assert Trainer(small(f'training.init="{copy}"', epochs=2), tmp_path / "run", resume=True).fit()["epochs"] == 2


@pytest.mark.parametrize(
    "overrides, place, error, words",
    [
        (("model.options.width=64",), "", CheckpointError, "does not fit this network"),
        ((), "checkpoints/last.json", ConfigError, "no checkpoint"),
        ((), "nowhere", ConfigError, "not there"),
    ],
)
def test_training_init_refuses_another_network_or_file(
    overrides, place: str, error: type, words: str, source: Path
) -> None:
    with pytest.raises(error, match=words):
        Trainer(small(f'training.init="{source / place}"', *overrides))
