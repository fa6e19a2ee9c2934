"""The hybrid network: its size, that all of it is used, its invariances, its parts against dense definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ris_fast.config.schema import Loss, Task
from ris_fast.models import build_model
from ris_fast.models.hybrid import _coefficients
from ris_fast.models.hybrid_parts import DiagonalMeans, factor_statistics
from ris_fast.models.modes import has_dropout
from ris_fast.models.prediction import Prediction
from ris_fast.old_names import OldNameWarning
from ris_fast.physics.channel import effective_channel
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes, simulate
from ris_fast.training.loss import CovarianceLoss

TASK = Task(bs_antennas=4, ris_horizontal=4, ris_vertical=3, snapshots=8, max_sources=3)
SMALL = {"width": 32, "layers": 2, "heads": 4, "feedforward": 48, "grid": 9}
SEED_PRESET = Loss(orthogonality=1e-3, cross=1e-3, angle=0.05, range=0.02, chamfer=0.05, subspace=0.05, count=0.1)


@pytest.fixture(params=["channel", "effective_channel"])
def inputs(request: pytest.FixtureRequest) -> str:
    return request.param


def small(inputs: str = "channel") -> nn.Module:
    torch.manual_seed(0)
    return build_model("hybrid", TASK, inputs=inputs, **SMALL)


def scenes(count: int = 6) -> Scenes:
    return simulate(TASK, count, SceneGenerator(seed=1))


def call(model: nn.Module, batch: Scenes) -> Prediction:
    return model(batch.snapshots, batch.channel, batch.codes, batch.snr_db)


def test_hybrid_has_the_parameter_count_of_the_report(inputs: str) -> None:
    sizes = [parameter.numel() for parameter in build_model("hybrid", inputs=inputs).parameters()]
    assert sum(sizes) == 16_339_075 and len(sizes) == 93


def test_hybrid_head_group_is_that_of_the_report() -> None:
    heads = build_model("hybrid").head_parameters()
    assert sum(parameter.numel() for parameter in heads) == 9_657_133
    assert len({id(parameter) for parameter in heads}) == len(heads)


def test_hybrid_presets_terms_reach_every_parameter(inputs: str) -> None:
    model, batch = small(inputs), scenes()
    CovarianceLoss(SEED_PRESET, TASK)(call(model, batch), batch)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.norm() > 0, name


def test_hybrid_every_input_of_the_pool_gets_a_gradient() -> None:
    """The original fed it the imaginary parts of real numbers: half of its inputs were zero."""
    model, batch = small(), scenes()
    CovarianceLoss(SEED_PRESET, TASK)(call(model, batch), batch)[0].backward()
    assert (model.pool.weight.grad.abs().amax(0) > 0).all()


def test_hybrid_prediction_shapes_and_bounds(inputs: str) -> None:
    prediction = call(small(inputs), scenes())
    assert prediction.factor.shape == (6, TASK.elements, 2 * TASK.max_sources, 2)
    assert all(each.shape == (6, TASK.max_sources) and each.dtype == torch.float32 for each in prediction[1:])
    assert (prediction.range_m > 0).all()


@pytest.mark.parametrize(
    "scale", [2.0**-13, 2.0**13]
)  # exact, as a field that is not converged turns rounding into more
def test_hybrid_ignores_the_scale_of_snapshots_and_channel(inputs: str, scale: float) -> None:
    model, batch = small(inputs), scenes()
    expected = call(model, batch)
    scaled = model(scale * batch.snapshots, batch.channel / scale, batch.codes, batch.snr_db)
    for one, other in zip(scaled, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_hybrid_of_zero_snapshots_is_finite(inputs: str) -> None:
    model, batch = small(inputs), scenes()
    prediction = model(torch.zeros_like(batch.snapshots), batch.channel, batch.codes, batch.snr_db)
    sum(each.sum() for each in prediction).backward()
    assert all(each.isfinite().all() for each in prediction)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hybrid_does_not_mix_scenes_of_a_batch(inputs: str) -> None:
    model, batch = small(inputs), scenes()
    for whole, part in zip(call(model, batch), call(model, batch[2:4]), strict=True):
        torch.testing.assert_close(whole[2:4], part, rtol=1e-4, atol=1e-5)


def test_hybrid_effective_channel_takes_h_or_its_products() -> None:
    model, batch = small("effective_channel"), scenes()
    given = model(batch.snapshots, effective_channel(batch.channel, batch.codes), batch.codes, batch.snr_db)
    for one, other in zip(given, call(model, batch), strict=True):
        torch.testing.assert_close(one, other)


def test_hybrid_inputs_collapsed_is_effective_channel() -> None:
    with pytest.warns(OldNameWarning, match="is called 'effective_channel' now"):
        assert small("collapsed").inputs == "effective_channel"


def test_hybrid_effective_channel_cannot_see_what_h_c_hides() -> None:
    """Two channels with the same H c_l for every code: only the back-projection tells them apart."""
    batch = scenes()
    codes = torch.view_as_complex(batch.codes)
    hidden = torch.linalg.svd(codes.conj())[2][codes.shape[0] :].conj().mean(0)
    assert (codes.conj() @ hidden).abs().max() < 1e-5
    other = batch.channel + torch.view_as_real(hidden.conj().resolve_conj())
    for mode, sees in (("effective_channel", False), ("channel", True)):
        model = small(mode)
        changed = model(batch.snapshots, other, batch.codes, batch.snr_db).factor - call(model, batch).factor
        assert bool(changed.abs().max() > 1e-3) is sees


@pytest.mark.parametrize("mode, shape", [("channel", (6, 8, 4, 2)), ("effective_channel", (6, 4, 4, 2))])
def test_hybrid_refuses_a_channel_of_the_wrong_shape(mode: str, shape: tuple[int, ...]) -> None:
    batch = scenes()
    with pytest.raises(ValueError, match="channel is .*inputs='" + mode):
        small(mode)(batch.snapshots, torch.zeros(shape), batch.codes, batch.snr_db)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("hybird", {}, "hybrid"),
        ("hybrid", {"widht": 8}, "width"),
        ("hybrid", {"inputs": "efective_channel"}, "effective_channel"),
        ("hybrid", {"width": 30}, "multiple of 4"),
        ("hybrid", {"grid": 1}, "at least 2"),
    ],
)
def test_build_model_answers_wrong_names_and_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, TASK, **options)


def test_coefficients_of_several_fields_keep_the_pattern_of_one_source() -> None:
    """Symbols differ from snapshot to snapshot; the beams of one source keep their phases against each other."""
    draw = torch.Generator().manual_seed(4)
    beams, symbols = (torch.randn(*size, dtype=torch.complex64, generator=draw) for size in ((5, 1, 2, 3, 4), (5, 7)))
    fields = beams * symbols[:, :, None, None, None]
    several, one = (torch.complex(*_coefficients(each.real, each.imag)) for each in (fields, beams))
    turn = (one.conj() * several).flatten(1).sum(1).sgn()[:, None, None, None]
    torch.testing.assert_close(several, one * turn, rtol=1e-4, atol=1e-5)


def test_coefficients_of_several_fields_follow_the_stronger_source() -> None:
    first, second = torch.eye(2, 12, dtype=torch.complex64).roll(3, 1).mul(1j)  # one beam each, of its own symbols
    first[4] = 0.5
    symbols = torch.tensor([[2.0, 1.5j, -2.0], [0.3, 0.0, 0.3j]], dtype=torch.complex64)
    fields = (symbols[0][:, None] * first + symbols[1][:, None] * second)[None]
    found = torch.complex(*_coefficients(fields.real, fields.imag))[0]
    assert (found[3] / found[4]).angle().item() == pytest.approx((first[3] / first[4]).angle().item(), abs=0.2)


@pytest.mark.parametrize(
    "model, expected",
    [
        (lambda: build_model("hybrid", TASK, **SMALL, dropout=0.1), True),
        (small, False),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), True),
        (lambda: nn.Dropout(0.0), False),
    ],
    ids=["hybrid with", "hybrid without", "layer", "layer at zero"],
)
def test_has_dropout(model: Callable[[], nn.Module], expected: bool) -> None:
    assert has_dropout(model()) is expected


def test_diagonal_means_equal_the_dense_ones() -> None:
    elements = 7
    factor = torch.randn(2, elements, 3, 2, generator=torch.Generator().manual_seed(2))
    unit = to_complex(factor.double())
    unit = unit / unit.abs().square().sum(-1, keepdim=True).sqrt()
    dense = unit @ unit.mH
    lags = torch.stack([dense.diagonal(-lag, 1, 2).mean(-1) for lag in range(elements)], -1)
    anti = torch.stack(
        [dense.flip(2).diagonal(elements - 1 - total, 1, 2).mean(-1) for total in range(2 * elements - 1)], -1
    )
    assert anti.imag.abs().max() < 1e-12
    expected = torch.cat((lags.real, lags.imag[:, 1:], anti.real), -1)
    torch.testing.assert_close(DiagonalMeans(elements)(factor).double(), expected, rtol=0, atol=1e-5)


def rank_two(columns: int) -> Tensor:
    """Equal powers on the first two of `columns` orthogonal columns, nothing on the rest."""
    factor = torch.zeros(1, 12, columns, 2)
    factor[0, 0, 0, 0] = factor[0, 1, 1, 1] = 1.0
    return factor


def test_factor_statistics_count_equal_orthogonal_directions() -> None:
    short, long = factor_statistics(rank_two(6), 3)
    torch.testing.assert_close(short[0], torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(long[0, 6:], torch.full((8,), math.log(2.0)), rtol=0, atol=1e-5)


def test_factor_statistics_entropies_ignore_unitary_mixing() -> None:
    factor = torch.randn(3, 12, 6, 2, generator=torch.Generator().manual_seed(3))
    mixer = torch.linalg.qr(torch.randn(6, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(4)))[0]
    mixed = torch.view_as_real(to_complex(factor) @ mixer)
    torch.testing.assert_close(factor_statistics(mixed, 3)[1][:, 6:11], factor_statistics(factor, 3)[1][:, 6:11])


@pytest.mark.parametrize("factor", [torch.zeros(1, 12, 6, 2), rank_two(6), torch.ones(1, 12, 6, 2)])
def test_factor_statistics_are_finite_for_degenerate_factors(factor: Tensor) -> None:
    short, long = factor_statistics(factor, 3)
    assert short.isfinite().all() and long.isfinite().all()
    assert (long[:, 6:] <= math.log(6) + 1e-6).all() and (short[:, 6] <= 6 + 1e-4).all()  # no more than there can be


@pytest.mark.slow
def test_hybrid_memorises_eight_scenes() -> None:
    torch.manual_seed(0)
    model, batch = build_model("hybrid", TASK, **SMALL | {"width": 64}), scenes(8)
    loss = CovarianceLoss(SEED_PRESET, TASK)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        total, raw = loss(call(model, batch), batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert raw["cov"] < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hybrid_compiles_without_graph_break(inputs: str) -> None:
    model, batch = small(inputs), scenes()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one, other in zip(call(compiled, batch), call(model, batch), strict=True):
        torch.testing.assert_close(one, other)


def test_hybrid_prediction_is_float32_under_autocast() -> None:
    batch = scenes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = call(small(), batch)
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in prediction)
