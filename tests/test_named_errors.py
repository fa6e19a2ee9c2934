"""An argument of the wrong kind or value is answered with who, what was given and what is expected, never with Python's
own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ris_fast import CovarianceLoss, RISArray, SceneGenerator, build_model, load_config, simulate, steering
from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.kernels.philox.op import philox_normal
from ris_fast.models import Prediction

CONFIG, TASK, GENERATOR = Config(), Task(), SceneGenerator()
ARRAY, ONE = RISArray(), torch.ones(2)
SCENES = simulate(Task(bs_antennas=2, ris_horizontal=2, ris_vertical=2, snapshots=2, max_sources=1), 2, GENERATOR)
ANSWER = Prediction(torch.ones(2, 4, 2, 2))

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "simulate a config": (
        lambda: simulate(CONFIG, 2, GENERATOR),
        ConfigError,
        "simulate: task is a Config, expected a Task. Pass config.task",
    ),
    "simulate nothing": (lambda: simulate(None, 2, GENERATOR), ConfigError, "simulate: task is a NoneType"),
    "simulate floats": (
        lambda: simulate(TASK, torch.tensor([0.5, 1.0]), GENERATOR),
        TypeError,
        "simulate: scenes is torch.float32",
    ),
    "simulate a mask": (
        lambda: simulate(TASK, torch.tensor([True]), GENERATOR),
        TypeError,
        "simulate: scenes is torch.bool.*nonzero",
    ),
    "simulate true": (lambda: simulate(TASK, True, GENERATOR), TypeError, "simulate: scenes is a bool"),
    "simulate negative numbers": (
        lambda: simulate(TASK, torch.tensor([3, -1]), GENERATOR),
        ValueError,
        "simulate: scenes goes down to -1",
    ),
    "simulate a table": (
        lambda: simulate(TASK, torch.tensor([[0, 1]]), GENERATOR),
        ValueError,
        r"simulate: scenes is \(1, 2\)",
    ),
    "simulate a scalar": (lambda: simulate(TASK, torch.tensor(3), GENERATOR), ValueError, r"simulate: scenes is \(\)"),
    "array of a config": (lambda: RISArray.of(CONFIG), ConfigError, "RISArray.of: task is a Config.* Pass config.task"),
    "array of text": (lambda: RISArray(wavelength_m="0.3"), TypeError, "RISArray: wavelength_m is '0.3'"),
    "array of nan": (
        lambda: RISArray(spacing_m=float("nan")),
        ValueError,
        "RISArray: sizes and lengths must be positive",
    ),
    "array without end": (
        lambda: RISArray(wavelength_m=float("inf")),
        ValueError,
        "RISArray: sizes and lengths must be positive",
    ),
    "range zero": (lambda: steering(ARRAY, ONE, ONE, 0 * ONE), ValueError, "steering: range_m goes down to 0"),
    "range below zero": (
        lambda: steering(ARRAY, ONE, ONE, torch.tensor([1.0, -2.0])),
        ValueError,
        "steering: range_m goes down to -2",
    ),
    "angle a number": (lambda: steering(ARRAY, 0.1, ONE, ONE), TypeError, "steering: azimuth is a float"),
    "range a list": (lambda: steering(ARRAY, ONE, ONE, [1.0, 2.0]), TypeError, "steering: range_m is a list"),
    "steering of a task": (lambda: steering(TASK, ONE, ONE, ONE), TypeError, "steering: array is a Task.*RISArray.of"),
    "seed a float": (lambda: SceneGenerator(0.5), TypeError, "SceneGenerator: seed is 0.5"),
    "seed text": (lambda: SceneGenerator("1"), TypeError, "SceneGenerator: seed is '1'"),
    "philox seed a float": (lambda: philox_normal(torch.arange(2), 1.5, 0, 2), TypeError, "philox_normal: seed is 1.5"),
    "philox index a list": (lambda: philox_normal([1], 1, 0, 2), TypeError, "philox_normal: index is a list"),
    "model of a config": (
        lambda: build_model("hybrid", CONFIG),
        ConfigError,
        "build_model: task is a Config.* Pass config.task",
    ),
    "model by a list": (lambda: build_model(["hybrid"]), ConfigError, r"build_model: there is no model '\['hybrid'\]'"),
    "model of text width": (
        lambda: build_model("backprojection", width="wide"),
        ConfigError,
        "backprojection's width = 'wide'.*whole number",
    ),
    "model of half a width": (
        lambda: build_model("backprojection", width=1.5),
        ConfigError,
        "backprojection's width = 1.5.*whole number",
    ),
    "model of no width": (lambda: build_model("hybrid", width=None), ConfigError, "hybrid's width = None"),
    "no heads": (lambda: build_model("hybrid", heads=0), ConfigError, "hybrid: heads = 0"),
    "layers below none": (lambda: build_model("hybrid", layers=-1), ConfigError, "hybrid: layers = -1"),
    "dropout above one": (lambda: build_model("hybrid", dropout=1.5), ConfigError, "hybrid: dropout = 1.5"),
    "dropout nan": (lambda: build_model("hybrid", dropout=float("nan")), ConfigError, "hybrid: dropout = nan"),
    "inputs a number": (lambda: build_model("hybrid", inputs=3), ConfigError, "hybrid's inputs = 3.*text"),
    "loss of a config": (
        lambda: CovarianceLoss(CONFIG),
        ConfigError,
        "CovarianceLoss: weights is a Config.* Pass config.loss",
    ),
    "loss of a table": (
        lambda: CovarianceLoss({"cov": 1.0}),
        ConfigError,
        "CovarianceLoss: weights is a dict, expected a Loss",
    ),
    "loss for a config": (lambda: CovarianceLoss(CONFIG.loss, CONFIG), ConfigError, "CovarianceLoss: task is a Config"),
    "loss of a factor": (
        lambda: CovarianceLoss()(ANSWER.factor, SCENES),
        TypeError,
        "CovarianceLoss: prediction is a Tensor.*Prediction",
    ),
    "loss of a target": (
        lambda: CovarianceLoss()(ANSWER, SCENES.factor),
        TypeError,
        "CovarianceLoss: scenes is a Tensor.*cov_nmse",
    ),
    "loss turned round": (
        lambda: CovarianceLoss()(SCENES, ANSWER),
        TypeError,
        r"CovarianceLoss: .* Pass loss\(prediction, scenes\)",
    ),
    "overrides one text": (
        lambda: load_config(overrides="training.seed=1"),
        ConfigError,
        r"overrides is 'training.seed=1'.* overrides=\['training.seed=1'\]",
    ),
    "overrides a table": (lambda: load_config(overrides={"training.seed": 1}), ConfigError, "overrides is {.*flags="),
    "overrides numbers": (lambda: load_config(overrides=[1]), ConfigError, r"overrides is \[1\]"),
    "overrides a number": (lambda: load_config(overrides=1), ConfigError, "overrides is 1"),
    "flags text": (lambda: load_config(flags="a"), ConfigError, "flags is 'a'"),
    "path a number": (lambda: load_config(path=3.5), ConfigError, "path is 3.5"),
}


@pytest.mark.parametrize("case", CASES)
def test_public_functions_name_wrong_arguments(case: str) -> None:
    call, kind, says = CASES[case]
    with pytest.raises(kind, match=says):
        call()


def test_public_functions_take_what_is_right() -> None:
    assert load_config(preset="laptop", overrides=(each for each in ["training.seed=3"])).training.seed == 3
    assert torch.equal(
        simulate(TASK, torch.tensor([0, 1], dtype=torch.int32), GENERATOR).snapshots,
        simulate(TASK, 2, GENERATOR).snapshots,
    )
    assert steering(ARRAY, ONE[:0], ONE[:0], ONE[:0]).shape == (0, 144, 2)
    assert build_model("hybrid", width=16, layers=0, heads=2, feedforward=8, grid=3, dropout=0).head_parameters()
    assert CovarianceLoss()(Prediction(torch.ones(2, 4, 2, 2)), SCENES)[0].isfinite()


def test_steering_works_under_torch_func_and_compile() -> None:
    """Where values may not be read, none are."""
    angle = torch.linspace(-0.5, 0.5, 4)
    place = torch.stack((angle, angle / 2, 2 + angle), -1)
    each = torch.vmap(lambda p: steering(ARRAY, p[0], p[1], p[2]))(place)
    whole = steering(ARRAY, *place.unbind(-1))
    torch.testing.assert_close(each, whole)
    assert torch.func.jacrev(lambda p: steering(ARRAY, *p.unbind(-1)))(place).isfinite().all()
    compiled = torch.compile(lambda p: steering(ARRAY, *p.unbind(-1)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(place), whole)
