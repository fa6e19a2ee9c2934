"""A setting that cannot be used is refused where it is given, with what was given and what would do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_fast.config.load import load_config, render_toml
from ris_fast.config.schema import SECTIONS, Config, ConfigError, Data, Health, Model, Optimizer, Task, Training
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate

FLOATS = [(kind, item.name) for kind in SECTIONS.values() for item in fields(kind) if item.type == "float"]


@pytest.mark.parametrize("kind, name", FLOATS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e39])
def test_config_refuses_floats_not_finite_in_float32(kind: type, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__.lower()}.{name} = .* not a finite number"):
        kind(**{name: value})


@pytest.mark.parametrize(
    "kind, given",
    [
        (Task, {"snr_min_db": -101}),
        (Task, {"snr_max_db": 121}),
        (Task, {"wavelength_m": 1e4}),
        (Task, {"rician_max": 1e7}),
        (Task, {"range_max_m": 1e7}),
        (Training, {"seed": 2**63}),
        (Training, {"epochs": 10**30}),
        (Optimizer, {"ema_decay": 1}),
    ],
)
def test_config_refuses_values_out_of_range(kind: type, given: dict[str, float]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(
        ConfigError,
        match=(
            f"{kind.__name__.lower()}.{name} = {float(value) if isinstance(value, float) else value}.* "
            "must be at (least|most)"
        ),
    ):
        kind(**given)


@pytest.mark.parametrize(
    "extreme",
    [
        {"wavelength_m": 1e3},
        {"wavelength_m": 1e-6, "spacing_wavelengths": 1e3},
        {"range_max_m": 1e6},
        {"rician_max": 1e6},
        {"range_min_m": 1e-3, "range_max_m": 1e-3},
        {"snr_min_db": -100.0},
        {"snr_max_db": 120.0},
        {"phase_error_deg": 180.0, "phase_error_surface": 2**63 - 1},
        {"channel_snr_db": 120.0},
    ],
)
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_simulate_is_finite_at_the_limits_of_the_task(extreme: dict[str, float], wavefront: str) -> None:
    task = Task(ris_horizontal=3, ris_vertical=2, bs_antennas=2, snapshots=3, wavefront=wavefront, **extreme)
    drawn = simulate(task, 16, SceneGenerator(2**63 - 1, "train"))
    for tensor in (drawn.snapshots, drawn.channel, drawn.factor):
        assert torch.isfinite(tensor).all() and tensor.abs().amax() > 0


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: Task(ris_horizontal="8"),
            r"task.ris_horizontal = '8' \(str\): expected a whole number. Did you mean 8\?",
        ),
        (lambda: Task(ris_horizontal=8.5), r"8.5 \(float\): expected a whole number.$"),
        (lambda: Task(ris_horizontal=True), r"True \(bool\): expected a whole number"),
        (lambda: Task(wavelength_m=None), r"None \(NoneType\): expected a number"),
        (lambda: Task(snr_min_db=False), r"False \(bool\): expected a number"),
        (lambda: Data(fixed=1), r"data.fixed = 1 \(int\): expected true or false. Did you mean true\?"),
        (lambda: Health(mute=["plateau"]), r"health.mute = \['plateau'\] \(list\): expected text"),
        (lambda: Model(options=3), "model.options = 3 .* a table"),
        (lambda: Training(precision="FP16"), "Did you mean 'fp16'"),
        (lambda: Training(precision=16), r"training.precision = 16 \(int\): expected text"),
        (
            lambda: Config(task={"ris_horizontal": 8}),
            r"Config: task is .* \(dict\); expected ris_fast.config.schema.Task",
        ),
    ],
)
def test_config_names_a_value_of_another_type(make, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_config_makes_numpy_numbers_and_paths_plain(tmp_path: Path) -> None:
    task = Task(ris_horizontal=np.int64(8), wavelength_m=np.float32(0.25), range_max_m=7)
    assert [type(value) for value in (task.ris_horizontal, task.wavelength_m, task.range_max_m)] == [int, float, float]
    config = Config(
        task=task, data=Data(path=tmp_path / 'a "quoted"\nname'), model=Model(options={"width": np.int32(64)})
    )
    file = tmp_path / "config.toml"
    file.write_text(render_toml(config))
    again = load_config(file)
    assert again.task == task and again.data.path == config.data.path and again.model.options == {"width": 64}


@pytest.mark.parametrize(
    "text, said",
    [
        ("task = 3", "'task = 3' is outside a section. task is a section: write \\[task\\] on a line of its own"),
        ("epochs = 3", "'epochs = 3' is outside a section. Write it below \\[training\\]"),
        ('presett = "seed"', "Did you mean 'preset'"),
        ("preset = 3", "There is no preset '3'. There are: laptop, full, original"),
        ("[task]\nsnapshots = []", r"task.snapshots = \[\] \(list\): expected a whole number"),
        ("[training", "is not valid TOML"),
    ],
)
def test_load_config_names_a_mistake_in_a_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(file)
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.fixed=True", "'True' .* expected true or false. Did you mean true?"),
        ("optimizer.backbone_lr=.001", "expected a number. Did you mean 0.001?"),
        ("training.batch_size=1e3", "expected a whole number. Did you mean 1000?"),
        ("training.max_seconds=inf", "not a finite number"),
        ("training.lr=1", "Did you mean 'optimizer.backbone_lr' or 'optimizer.head_lr' or 'optimizer.final_lr'?"),
        (
            "training.learning_rate=1",
            "Did you mean 'optimizer.backbone_lr' or 'optimizer.head_lr' or 'optimizer.final_lr'?",
        ),
        ("training.weight_decay=1", "Did you mean 'optimizer.weight_decay'?"),
        ("training.warmupp=1", r"\[training\] has no key 'warmupp'. Did you mean 'optimizer.warmup'?"),
        ("Training.epochs=1", "Did you mean 'training'"),
    ],
)
def test_load_config_suggests_what_an_override_meant(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        load_config(None, "original", [override])


def test_preset_follows_the_device(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[training]\ndevice = "cuda"\n')
    assert load_config(file).preset == "full" and load_config(None, None, ["training.device=cuda:1"]).preset == "full"
    assert load_config(file, None, (), {"training.device": "cpu"}).preset == "laptop"
