"""torch's default dtype is the user's: scenes and what is found in them are float32 whatever it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.models import build_model
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate

TASK = Task(bs_antennas=4, ris_horizontal=6, ris_vertical=4, snapshots=8, max_sources=3)


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def another_default(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def scenes() -> Scenes:
    return simulate(TASK, torch.arange(12), SceneGenerator(0, "train"))


EXPECTED = scenes()
MODELS = {name: build_model(name, TASK, width=16) for name in ("backprojection", "hybrid")}


def answer(name: str, given: Scenes) -> torch.Tensor:
    return MODELS[name](given.snapshots, given.channel, given.codes, given.snr_db).factor


@pytest.mark.usefixtures("another_default")
def test_simulate_ignores_the_default_dtype() -> None:
    found = scenes()
    for name in ("snapshots", "channel", "codes", "factor", "azimuth", "range_m", "power", "snr_db"):
        assert torch.equal(getattr(found, name), getattr(EXPECTED, name)), name


@pytest.mark.parametrize("name", MODELS)
def test_networks_ignore_the_default_dtype(name: str, another_default: None) -> None:
    found = answer(name, EXPECTED)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, answer(name, EXPECTED), rtol=0, atol=0)


@pytest.mark.usefixtures("another_default")
def test_features_are_float32_under_another_default_dtype() -> None:
    model = build_model("backprojection", TASK, width=16)
    assert (
        model.extract.grid.dtype
        == torch.float32
        == model.features(EXPECTED.snapshots, EXPECTED.channel, EXPECTED.codes, EXPECTED.snr_db).inputs.dtype
    )
