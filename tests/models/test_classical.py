"""What a classical estimator makes of a network's inputs, for networks that say it and for those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ris_fast.config.schema import Task
from ris_fast.kernels.field.op import aperture_field
from ris_fast.models import build_model
from ris_fast.models.beams import FieldPrior
from ris_fast.models.classical import Classical, classical_estimate
from ris_fast.physics.baselines import mean_covariance
from ris_fast.physics.channel import backproject, effective_channel
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.matched_filter import least_squares_channel, matched_filter, shrunk_nmse
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.report.baselines import MEANINGS
from ris_fast.training.compiled_model import Network
from ris_fast.training.validation import classical_baseline, estimate_nmse, estimate_parts, scene_nmse

TASK = Task(bs_antennas=4, ris_horizontal=4, ris_vertical=3, snapshots=8, max_sources=2)
SIZES = {"width": 32, "layers": 1, "heads": 4, "feedforward": 32, "grid": 5}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(TASK, 48, SceneGenerator(3, "val"))


class Users(nn.Module):
    """A network of the user's, with features of no known kind."""

    def features(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cat([each.flatten(1) for each in (inputs[0], inputs[1])], 1),)

    def trunk(self, features: tuple[torch.Tensor]) -> None:
        raise AssertionError("a classical estimate asks no network")


def test_classical_estimate_of_a_users_network_is_least_squares_of_its_scenes(scenes: Scenes) -> None:
    found = classical_estimate(Users(), None, scenes, static=True)
    assert (found.name, found.field) == ("least_squares", True)
    torch.testing.assert_close(found.factor, least_squares_factor(scenes))


@pytest.mark.parametrize("channel, static", [(True, False), (False, True), (False, False)])
def test_classical_estimate_is_the_matched_filter_where_least_squares_is_not_allowed(
    scenes: Scenes, channel: bool, static: bool
) -> None:
    given = scenes
    if not channel:
        given = replace(scenes, channel=None, effective_channel=effective_channel(scenes.channel, scenes.codes))
    found = classical_estimate(Users(), None, given, static=static)
    assert (found.name, found.field) == ("matched_filter", True)
    assert found.factor.shape == (48, 12, 1 if static else 8, 2)
    if channel:
        expected = matched_filter(backproject(scenes.channel, scenes.codes, scenes.snapshots), static)
        torch.testing.assert_close(found.factor, expected)


def test_classical_estimate_is_none_without_a_channel(scenes: Scenes) -> None:
    assert classical_estimate(Users(), None, replace(scenes, channel=None), static=True) is None


@pytest.mark.parametrize("inputs", ["channel", "effective_channel"])
def test_classical_estimate_of_the_hybrid_is_the_field_that_it_is_shown(scenes: Scenes, inputs: str) -> None:
    model = build_model("hybrid", TASK, inputs=inputs, **SIZES)
    found = classical_estimate(
        model, model.features(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db), scenes, static=True
    )
    products = effective_channel(scenes.channel, scenes.codes)
    channel = scenes.channel if inputs == "channel" else least_squares_channel(products, scenes.codes)
    root = FieldPrior(TASK).root
    expected = aperture_field(channel, scenes.codes, scenes.snapshots, scenes.snr_db, root=root, steps=8)
    assert (found.name, found.field) == ("lmmse", True) and found.name in MEANINGS
    cosine = torch.cosine_similarity(found.factor.flatten(1), expected.flatten(1))  # each scene has a scale of its own
    assert cosine.quantile(0.1) > 0.999


def test_classical_baseline_shrinks_a_field_and_scores_sources_as_they_are(scenes: Scenes) -> None:
    constant, network = mean_covariance([scenes]), Network(Users(), False)
    (shrunk,) = classical_baseline(Users(), network, [scenes[:20], scenes[20:]], constant, True).values()
    assert shrunk == pytest.approx(float(shrunk_nmse(least_squares_factor(scenes), scenes, constant)[0].mean()))
    sources = Users()
    sources.classical = lambda features: ("pursuit", least_squares_factor(scenes))  # a plain pair
    (plain,) = classical_baseline(sources, network, [scenes], constant, True).values()
    found = classical_estimate(sources, None, scenes, static=True)
    assert plain == pytest.approx(float(scene_nmse(found, scenes).double().mean())) and plain > shrunk


def test_estimate_nmse_of_parts_is_that_of_the_whole(scenes: Scenes) -> None:
    constant = mean_covariance([scenes])
    for field in (True, False):
        found = Classical("least_squares", least_squares_factor(scenes), field)
        parts = [
            estimate_parts(found._replace(factor=found.factor[rows]), scenes[rows], constant)
            for rows in (slice(0, 7), slice(7, 48))
        ]
        whole = estimate_nmse(estimate_parts(found, scenes, constant))
        torch.testing.assert_close(estimate_nmse(torch.cat(parts)), whole)


@pytest.mark.parametrize("answer", [None, torch.zeros(1), ("pursuit",), (torch.zeros(1), "pursuit")])
def test_classical_estimate_refuses_another_answer(scenes: Scenes, answer: object) -> None:
    model = Users()
    model.classical = lambda features: answer
    with pytest.raises(TypeError, match="estimator's name and its factor"):
        classical_estimate(model, None, scenes, static=True)
