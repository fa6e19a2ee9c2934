"""The peers compute what ours computes: only then is a ratio of times a ratio of the same work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ris_fast.benchmarks.peers.eager import DenseLoss, EagerLoop, with_dense_target
from ris_fast.benchmarks.peers.original import AntiDiagonalPool, OriginalLoop
from ris_fast.benchmarks.peers.original_loss import effective, normalised, original_loss, subspace
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, Loss
from ris_fast.models import build_model
from ris_fast.models.prediction import Prediction
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import adjoint_matmul, to_complex
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training import loss_terms as terms
from ris_fast.training.loss import CovarianceLoss

CPU = torch.device("cpu")


def small(overrides: list[str] | None = None) -> Config:
    return load_config(
        None,
        "original",
        [
            "training.precision=fp32",
            "task.ris_horizontal=4",
            "task.ris_vertical=3",
            "task.bs_antennas=4",
            "model.options.width=32",
            "model.options.layers=1",
            "model.options.grid=5",
            *(overrides or []),
        ],
        {"training.device": "cpu"},
    )


def dense_scenes(config: Config, count: int = 6) -> Scenes:
    return with_dense_target(simulate(config.task, count, SceneGenerator(1, "train")))


def prediction_of(config: Config, scenes: Scenes) -> Prediction:
    torch.manual_seed(0)
    model = build_model("hybrid", config.task, **config.model.options)
    return model(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)


def test_dense_loss_equals_covariance_loss() -> None:
    config = small()
    scenes = dense_scenes(config)
    prediction = prediction_of(config, scenes)
    (ours, raw), (theirs, dense) = (
        kind(config.loss, config.task)(prediction, scenes) for kind in (CovarianceLoss, DenseLoss)
    )
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(dense["cov"], raw["cov"])


@pytest.mark.parametrize("setting", ["beta", "loading", "shrink"])
def test_dense_loss_refuses_settings_it_leaves_out(setting: str) -> None:
    config = small([f"loss.{setting}=0.1"])
    scenes = dense_scenes(config)
    with pytest.raises(ValueError, match="DenseLoss"):
        DenseLoss(config.loss, config.task)(prediction_of(config, scenes), scenes)


def test_original_loss_equals_covariance_loss_without_loading() -> None:
    config, weights = small(), Loss(cov=1.0, cov_pred=0.0)
    scenes = dense_scenes(config)
    prediction = prediction_of(config, scenes)
    ours, _ = CovarianceLoss(weights, config.task)(prediction, scenes)
    torch.testing.assert_close(original_loss(prediction, scenes, weights), ours, rtol=1e-5, atol=1e-6)


def test_original_subspace_term_equals_ours() -> None:
    config = small()
    scenes = dense_scenes(config)
    factor = prediction_of(config, scenes).factor
    field = to_complex(factor)
    steer = terms.unit_columns(scenes.factor)
    ours = terms.subspace(terms.gram(factor), adjoint_matmul(steer, factor), terms.gram(steer)).mean()
    torch.testing.assert_close(
        subspace(field @ field.mH, to_complex(scenes.factor), scenes.count), ours, rtol=1e-3, atol=1e-5
    )


def test_effective_loading_of_one_averages_with_the_identity() -> None:
    columns = torch.randn(2, 5, 5, dtype=torch.complex64)
    cov = normalised(columns @ columns.mH)
    eye = torch.eye(5, dtype=torch.complex64)
    torch.testing.assert_close(effective(cov, torch.zeros(2), 1.0, 0.0), 0.5 * (cov + eye))


def test_anti_diagonal_pool_is_the_mean_of_anti_diagonals() -> None:
    factor = torch.randn(2, 4, 3, 2)
    a = to_complex(factor)
    a = a / a.abs().square().sum(2, keepdim=True).sqrt()
    cov = a @ a.mH

    def mean(total: int) -> Tensor:
        places = [(i, total - i) for i in range(4) if 0 <= total - i < 4]
        return torch.stack([cov[:, i, j] for i, j in places]).mean(0)

    means = torch.stack([mean(total) for total in range(7)], 1)
    torch.testing.assert_close(
        AntiDiagonalPool(4)(factor), torch.cat((means.real, means.imag), 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("peer", [EagerLoop, OriginalLoop])
def test_peer_loops_learn(peer: type) -> None:
    torch.manual_seed(0)
    config = small(["loss.beta=0.0"])
    config = replace(config, optimizer=replace(config.optimizer, backbone_lr=2e-3, head_lr=2e-3))
    loop, scenes = peer(config, CPU), dense_scenes(config)
    losses = [float(loop.step(scenes)) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    changed = [
        not torch.equal(a, b)
        for a, b in zip(
            loop.average.values() if isinstance(loop.average, dict) else loop.average, loop.model.parameters()
        )
    ]
    assert any(changed)
