"""The objective through the code path of training: identities, invariances, refusals, precision."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from ris_fast.config.schema import Loss, Task
from ris_fast.models.prediction import Prediction
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training import loss_terms as terms
from ris_fast.training.loss import TERMS, TRUTH_TERMS, CovarianceLoss

TASK = Task(bs_antennas=4, ris_horizontal=4, ris_vertical=4, snapshots=8, max_sources=3)
ALL = Loss(**dict.fromkeys(TERMS, 1.0))
NONE = Loss(**dict.fromkeys(TERMS, 0.0))


def scenes(count: int = 8) -> Scenes:
    return simulate(TASK, count, SceneGenerator(seed=3))


def truth(batch: Scenes) -> Prediction:
    """What a perfect network says; slots to spare repeat the first source."""
    active = terms.active_sources(batch.count, TASK.max_sources)
    index = torch.where(active, torch.arange(TASK.max_sources), 0)
    located = (each.gather(1, index) for each in (batch.azimuth, batch.elevation, batch.range_m))
    logits = 60.0 * torch.nn.functional.one_hot(batch.count - 1, TASK.max_sources).float()
    return Prediction(torch.cat((batch.factor, 0.3 * batch.factor), dim=2), *located, logits)


def guess(batch: Scenes, dtype: torch.dtype = torch.float32) -> Prediction:
    generator = torch.Generator().manual_seed(5)
    size, sources = batch.snapshots.shape[0], TASK.max_sources

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator).to(dtype).requires_grad_()

    return Prediction(
        normal(TASK.elements, 2 * sources, 2),
        normal(sources),
        normal(sources),
        normal(sources).detach().exp().requires_grad_(),
        normal(sources),
    )


def test_covariance_loss_of_the_truth_is_every_terms_minimum() -> None:
    batch = scenes()
    _, raw = CovarianceLoss(ALL, TASK)(truth(batch), batch)
    assert set(raw) == set(TERMS)
    for name in ("cov", "cov_pred", "cross", "angle", "range", "chamfer", "subspace", "count"):
        assert abs(raw[name].item()) < 1e-6, name
    _, random = CovarianceLoss(ALL, TASK)(guess(batch), batch)
    assert raw["contrast"] < random["contrast"]


@pytest.mark.parametrize("options", [{}, {"loading": 1.0}, {"shrink": 1e-3}, {"loading": 0.1, "shrink": 1e-2}])
def test_covariance_loss_of_the_truth_is_zero_in_any_setting(options: dict[str, float]) -> None:
    batch = scenes()
    total, _ = CovarianceLoss(Loss(**options), TASK)(truth(batch), batch)
    assert abs(total.item()) < 1e-6


def test_covariance_loss_zero_factor_scores_one() -> None:
    batch = scenes()
    _, raw = CovarianceLoss(Loss(), TASK)(Prediction(torch.zeros_like(batch.factor)), batch)
    assert raw["cov"].item() == 1.0 and raw["cov_pred"].item() == 1.0


def test_covariance_loss_identity_scores_its_closed_form() -> None:
    """|T - I|^2/|T|^2 = 1 - N/|T|^2 for a target of trace N."""
    batch = scenes()
    eye = torch.eye(TASK.elements).expand(batch.batch, -1, -1)
    _, raw = CovarianceLoss(Loss(), TASK)(Prediction(torch.stack((eye, torch.zeros_like(eye)), -1)), batch)
    factor = torch.view_as_complex(batch.factor.double())
    energy = (factor.mH @ factor).abs().square().sum((1, 2)) / factor.abs().square().sum((1, 2)).square()
    expected = (1.0 - 1.0 / (TASK.elements * energy)).mean()
    torch.testing.assert_close(raw["cov"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_covariance_loss_ignores_the_scale_of_both_sides(scale: float) -> None:
    batch = scenes()
    loss, prediction = CovarianceLoss(ALL, TASK), guess(batch)
    expected, _ = loss(prediction, batch)
    for scaled in (
        loss(prediction._replace(factor=scale * prediction.factor), batch),
        loss(prediction, replace(batch, factor=scale * batch.factor)),
    ):
        torch.testing.assert_close(scaled[0], expected, rtol=1e-4, atol=1e-5)


def test_covariance_loss_total_is_the_weighted_sum_of_terms() -> None:
    weights = Loss(**{name: 0.1 * (k + 1) for k, name in enumerate(TERMS)})
    batch = scenes()
    total, raw = CovarianceLoss(weights, TASK)(guess(batch), batch)
    torch.testing.assert_close(total, sum(getattr(weights, name) * raw[name] for name in TERMS))
    assert all(value.dim() == 0 and value > 0 for value in raw.values())


def test_covariance_loss_is_the_mean_over_scenes() -> None:
    batch = scenes(8)
    loss, prediction = CovarianceLoss(ALL, TASK), guess(batch)
    whole, _ = loss(prediction, batch)
    parts = [
        loss(Prediction(*(each[rows] for each in prediction)), batch[rows])[0] * share
        for rows, share in ((slice(0, 5), 5 / 8), (slice(5, 8), 3 / 8))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_covariance_loss_skips_terms_of_weight_zero(name: str) -> None:
    batch = scenes()
    weights = replace(NONE, cov=1.0)
    prediction = guess(batch)
    assert set(CovarianceLoss(weights, TASK)(prediction, batch)[1]) == {"cov"}
    gradients = [
        torch.autograd.grad(
            CovarianceLoss(replace(weights, **{name: weight}), TASK)(prediction, batch)[0],
            list(prediction),
            allow_unused=True,
            materialize_grads=True,
        )
        for weight in (2.0, 3.0)
    ]
    assert any(not torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_covariance_loss_reaches_every_output_of_the_model() -> None:
    batch = scenes()
    prediction = guess(batch)
    CovarianceLoss(ALL, TASK)(prediction, batch)[0].backward()
    for name, value in prediction._asdict().items():
        assert value.grad.isfinite().all() and value.grad.abs().max() > 0, name


def test_covariance_loss_needs_a_covariance_weight() -> None:
    with pytest.raises(ValueError) as refusal:
        CovarianceLoss(replace(NONE, angle=1.0, count=1.0, orthogonality=1.0), TASK)
    assert all(f"loss.{name}" in str(refusal.value) for name in TRUTH_TERMS)


def test_covariance_loss_refuses_too_many_sources_to_match() -> None:
    with pytest.raises(ValueError, match="loss.angle.*task.max_sources = 12"):
        CovarianceLoss(Loss(angle=1.0), Task(max_sources=12))
    CovarianceLoss(Loss(chamfer=1.0), Task(max_sources=12))


@pytest.mark.parametrize(
    "name, missing", [("angle", "azimuth"), ("range", "range_m"), ("chamfer", "elevation"), ("count", "count_logits")]
)
def test_covariance_loss_names_an_output_the_model_lacks(name: str, missing: str) -> None:
    batch = scenes()
    with pytest.raises(ValueError, match=f"loss.{name} .*{missing}.*the model"):
        CovarianceLoss(Loss(**{name: 1.0}), TASK)(guess(batch)._replace(**{missing: None}), batch)


@pytest.mark.parametrize("name, missing", [("angle", "azimuth"), ("subspace", "factor"), ("contrast", "factor")])
def test_covariance_loss_names_a_truth_the_scenes_lack(name: str, missing: str) -> None:
    batch = scenes()
    dense = replace(batch, covariance=torch.zeros(batch.batch, TASK.elements, TASK.elements, 2), **{missing: None})
    with pytest.raises(ValueError, match=f"loss.{name} .*{missing}.*the scenes"):
        CovarianceLoss(Loss(**{name: 1.0}), TASK)(guess(batch), dense)


def test_covariance_loss_cross_needs_two_halves_of_a_factor() -> None:
    batch = scenes()
    prediction = guess(batch)
    with pytest.raises(ValueError, match="loss.cross.*5 columns"):
        CovarianceLoss(Loss(cross=1.0), TASK)(prediction._replace(factor=prediction.factor[:, :, :5]), batch)


def test_covariance_loss_dense_target_scores_as_its_factor() -> None:
    batch = scenes()
    factor = torch.view_as_complex(batch.factor)
    dense = replace(batch, factor=None, covariance=torch.view_as_real(factor @ factor.mH))
    loss, prediction = CovarianceLoss(Loss(), TASK), guess(batch)
    torch.testing.assert_close(loss(prediction, dense)[0], loss(prediction, batch)[0], rtol=1e-5, atol=0)


def test_covariance_loss_is_float32_under_autocast() -> None:
    batch = scenes()
    loss, prediction = CovarianceLoss(ALL, TASK), guess(batch)
    expected, _ = loss(prediction, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, raw = loss(prediction, batch)
    assert total.dtype == torch.float32 and torch.equal(total, expected)
    half, _ = loss(Prediction(*(each.bfloat16() for each in prediction)), batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=2e-2, atol=0)


def test_covariance_loss_blend_reaches_cov_and_not_cov_pred() -> None:
    batch = scenes()
    _, raw = CovarianceLoss(Loss(beta=0.5), TASK)(truth(batch), batch)
    assert raw["cov"] > 1e-3 and abs(raw["cov_pred"].item()) < 1e-6


def test_least_squares_factor_solves_the_normal_equations() -> None:
    """Against a dense solve in float64: exact when iterated to the end, near in the default number of steps."""
    task = replace(TASK, snr_min_db=20.0, snr_max_db=20.0, max_sources=1)
    batch = simulate(task, 4, SceneGenerator(seed=4))
    channel, codes = torch.view_as_complex(batch.channel.double()), torch.view_as_complex(batch.codes.double())
    operator = (channel[:, None] * codes[None, :, None]).flatten(1, 2)
    ridge = channel.abs().square().sum((1, 2)) / (task.bs_antennas * 100.0)
    measured = torch.view_as_complex(batch.snapshots.double()).flatten(1, 2)
    normal = operator.mH @ operator + ridge[:, None, None] * torch.eye(task.elements)
    exact = torch.linalg.solve(normal, (operator.mH @ measured[..., None]))
    errors = [
        (torch.view_as_complex(each.double().contiguous()) - exact).norm() / exact.norm()
        for each in (least_squares_factor(batch), least_squares_factor(batch, steps=60))
    ]
    assert errors[0] < 0.3 and errors[1] < 1e-4
    with pytest.raises(ValueError, match="loss.beta"):
        least_squares_factor(replace(batch, channel=None))


def test_loss_weights_of_the_config_are_the_terms() -> None:
    settings = {"beta", "loading", "shrink", "own", "own_weight"}
    assert {item.name for item in fields(Loss)} - settings == set(TERMS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_covariance_loss_compiles_without_graph_break() -> None:
    batch = scenes()
    loss, prediction = CovarianceLoss(ALL, TASK), guess(batch)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(prediction, batch)[0], loss(prediction, batch)[0])
