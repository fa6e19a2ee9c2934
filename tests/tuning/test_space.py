"""The space of a study: what a [tune] table means, and what is wrong with one, by the name of its key."""

from __future__ import annotations

import re
import tomllib

import pytest

from ris_fast.commands.tune import study_space
from ris_fast.config.load import load_config
from ris_fast.config.schema import ConfigError
from ris_fast.tuning.space import Dimension, default_space, read_space, space_toml


def table(text: str) -> object:
    return tomllib.loads(text)["tune"]


def test_space_reads_ranges_and_choices_however_their_keys_are_written() -> None:
    quoted = '[tune]\n"optimizer.backbone_lr" = {low = 1e-4, high = 1, log = true}\n"model.options.width" = [64, 128]\n'
    dotted = "[tune]\nmodel.options.width.choices = [64, 128]\n[tune.optimizer]\nbackbone_lr = "
    dotted += "{low = 1e-4, high = 1, log = true}\n"
    space = read_space(table(quoted))
    assert space == read_space(table(dotted)) == read_space(table(space_toml(space)))
    assert space["optimizer.backbone_lr"] == Dimension("optimizer.backbone_lr", low=1e-4, high=1.0, log=True)
    assert space["model.options.width"].choices == (64, 128)
    whole = read_space({"model.options.depth": {"low": 1, "high": 4}})["model.options.depth"]
    assert (whole.low, whole.high) == (1, 4) and isinstance(whole.low, int)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("task.snapshots", [8, 16], "on the same scenes, with the same budget"),
        ("training.max_seconds", [8, 16], "with the same budget"),
        ("optimizer.backbone_lr", {"low": 1e-2, "high": 1e-4}, "low < high, got 0.01 and 0.0001"),
        ("optimizer.backbone_lr", {"low": 0.0, "high": 1e-4, "log": True}, "begins above 0"),
        ("optimizer.backbone_lr", {"low": 1e-4, "hihg": 1e-2}, "no 'hihg'. Did you mean 'high'?"),
        ("optimizer.backbone_lr", {"low": 1e-4, "high": 1e-2, "log": True, "step": 1e-4}, "no meaning on a log scale"),
        ("optimizer.backbone_lr", 3e-4, "expected a range"),
        ("training.batch_size", [64], "two values or more"),
    ],
)
def test_space_says_what_is_wrong_with_a_key(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"[tune] {key}") + ".*" + re.escape(said)):
        read_space({key: value})


@pytest.mark.parametrize(
    "line, said",
    [
        ('"optimizer.backbone_rl" = [1e-4, 1e-3]', "Did you mean 'backbone_lr'?"),
        ('"optimizer.beta1" = {low = 0.5, high = 1.5}', "optimizer.beta1 = 1.5 is too large"),
        ('"training.batch_size" = [64, 12.5]', "expected a whole number"),
    ],
)
def test_space_is_checked_against_the_settings_before_the_first_trial(line: str, said: str, tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'preset = "laptop"\n[tune]\n{line}\n')
    with pytest.raises(ConfigError, match=re.escape("[tune] ") + ".*" + re.escape(said)):
        study_space(file, lambda params: load_config(file, None, (), dict(params)))
    assert load_config(file) == load_config(preset="laptop")  # train takes the same file


@pytest.mark.parametrize("preset", ["laptop", "original"])
def test_default_spaces_hold_settings_that_exist(preset: str) -> None:
    found = study_space(None, lambda params: load_config(None, preset, (), dict(params)))
    assert found == default_space(load_config(preset=preset).model.name) and len(found) > 6
    assert set(default_space("my_package.my_module:Net")) < {*found, "optimizer.warmup", "optimizer.weight_decay"}
