"""Least squares of the symbols: derivatives by the positions, parts of a point, description lengths."""

import math

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.kernels.pursuit.search import TANGENTS
from ris_fast.localize.measurement import Measurement, Point
from ris_fast.localize.order import PARAMETERS, description
from ris_fast.localize.sources import Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate

SMALL = {"bs_antennas": 4, "ris_horizontal": 6, "ris_vertical": 5, "snapshots": 8, "max_sources": 3}


def measured(**options: str) -> tuple[Measurement, Point]:
    """A few scenes in float64, a little off their true positions."""
    task = Task(**SMALL, **options)
    scenes = simulate(task, 16, SceneGenerator(3, "test"))
    given = (each.double() for each in (scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db))
    measurement = Measurement(task, *given)
    true = Sources.of_scenes(scenes)
    position = true.cosines().double() + torch.tensor([0.02, -0.03, 0.05], dtype=torch.float64)
    return measurement, measurement.at(measurement.inside(position), true.active)


def steered(measurement: Measurement, point: Point) -> torch.Tensor:
    """G a of every source, complex (B, S, R, K)."""
    real, imag = measurement._images(point.position, point.active).chunk(2, dim=-1)
    return torch.complex(real, imag)[..., ::TANGENTS]


@pytest.mark.parametrize("options", [{}, {"symbols": "per_snapshot"}, {"wavefront": "spherical"}])
def test_slope_is_the_derivative_of_the_objective(options: dict[str, str]) -> None:
    measurement, point = measured(**options)
    step = 1e-5
    for column in range(point.slope.shape[1]):
        move = torch.zeros_like(point.position).flatten(1)
        move[:, column] = step
        move = move.view_as(point.position) / measurement.search.scale
        ahead, behind = (measurement.at(point.position + sign * move, point.active).objective for sign in (1, -1))
        torch.testing.assert_close(point.slope[:, column], (behind - ahead) / (4 * step), rtol=1e-5, atol=1e-5)


def test_information_is_the_curvature_where_nothing_is_left_over() -> None:
    measurement, point = measured()
    symbols = torch.randn(point.amplitude.shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    measurement.y = torch.view_as_real((steered(measurement, point) @ symbols[..., None])[..., 0])
    measurement.energy = measurement.y.square().sum((1, 2, 3))
    measurement.ridge = torch.full_like(measurement.ridge, 1e-12)
    exact, step = measurement.at(point.position, point.active), 1e-4
    for column in range(3):  # of the first source
        move = torch.zeros_like(point.position)
        move[:, 0, column] = step / measurement.search.scale[column]
        ahead, behind = (measurement.at(point.position + sign * move, point.active).cost for sign in (1, -1))
        curvature = (ahead + behind) / (2 * step**2)
        torch.testing.assert_close(exact.information[:, column, column], curvature, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_fewer_sources_need_no_new_look(symbols: str) -> None:
    measurement, point = measured(symbols=symbols)
    rows = torch.tensor([[2, 0]]).expand(len(point.active), -1)
    active = point.active.gather(1, rows)
    known = measurement.among(point, rows, active)
    anew = measurement.at(point.position.gather(1, rows[..., None].expand(-1, -1, 3)), active)
    for name, one, other in zip(Point._fields, known, anew):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_description_is_the_likelihood_of_gaussian_symbols(symbols: str) -> None:
    measurement, point = measured(symbols=symbols)
    steer = steered(measurement, point)
    power = measurement.mean_square(point)[:, None, None].to(steer.dtype)
    rows, noise = steer.shape[2], measurement.noise
    covariance = (steer * power) @ steer.mH + noise[:, None, None, None] * torch.eye(rows)
    y = torch.view_as_complex(measurement.y)[..., None]
    quadratic = (y.mH @ torch.linalg.solve(covariance, y)).real.sum((1, 2, 3))
    spread = (torch.linalg.slogdet(covariance).logabsdet - rows * noise[:, None].log()).sum(1)
    parameters = PARAMETERS / 2 * math.log(2 * measurement.size) * point.active.sum(1)
    torch.testing.assert_close(description(measurement, point, "mdl"), quadratic + spread + parameters)


def test_left_over_is_what_the_sources_do_not_explain() -> None:
    measurement, point = measured()
    none = point._replace(amplitude=torch.zeros_like(point.amplitude))
    operator = measurement.operator.unflatten(2, (-1, 2))
    adjoint = torch.view_as_complex(operator.contiguous()).mH
    y = torch.view_as_complex(measurement.y)[:, 0, :, None]
    torch.testing.assert_close(torch.view_as_complex(measurement.left_over(none))[:, 0], (adjoint @ y)[..., 0])
    field = torch.view_as_complex(measurement.left_over(point))[:, 0]
    real, imag = measurement.search.steer(point.position).chunk(2, dim=2)
    seen = (torch.complex(real, imag).mH @ field[..., None])[..., 0]  # zero at least squares, but for the ridge
    expected = measurement.ridge[:, None] * point.amplitude[:, 0]
    torch.testing.assert_close(seen[point.active], expected[point.active], atol=1e-9, rtol=1e-6)
