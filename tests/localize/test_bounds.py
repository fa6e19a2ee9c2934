"""Cramer-Rao bounds: the closed form for one source, published tables, the likelihood's own curvature."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.localize.bounds import _covariance, deterministic_bound, gaussian_fisher, stochastic_bound
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes, simulate

SMALL = {"bs_antennas": 4, "ris_horizontal": 6, "ris_vertical": 5, "snapshots": 12, "range_max_m": 3.0}
DEGREE = math.degrees(1.0)


def scenes_of(task: Task, count: int, wanted: int, seed: int = 1) -> Scenes:
    """The first scenes of a task with this many sources."""
    made = simulate(task, 8 * wanted, SceneGenerator(seed, "test"))
    return made[(made.count == count).nonzero()[:wanted, 0]]


def clean_field(task: Task, scenes: Scenes, place: Tensor, symbols: Tensor) -> Tensor:
    """G A x of every snapshot, complex (B, L, M); place (B, K, 3) of azimuth, elevation, range, symbols (B, S, K)."""
    steer = to_complex(steering(RISArray.of(task), *place.unbind(-1)))  # (B, K, N)
    field = (symbols @ steer).expand(-1, scenes.snapshots.shape[1], -1)
    return (to_complex(scenes.channel.double())[:, None] @ (to_complex(scenes.codes.double()) * field)[..., None])[
        ..., 0
    ]


def by_differences(task: Task, scenes: Scenes, symbols: Tensor, step: float = 1e-5) -> Tensor:
    """Deviations of azimuth, elevation and range by the Fisher matrix of differences of the mean: (B, K, 3)."""
    true = Sources.of_scenes(scenes)
    place = torch.stack((true.azimuth, true.elevation, true.range_m), dim=-1).double()
    batch, sources = true.power.shape
    real = torch.view_as_real(symbols)

    def mean(at: Tensor) -> Tensor:
        where, what = at[:, : 3 * sources].view(place.shape), at[:, 3 * sources :].reshape(real.shape)
        return clean_field(task, scenes, where, torch.view_as_complex(what.contiguous())).flatten(1)

    point = torch.cat((place.flatten(1), real.flatten(1)), dim=1)
    columns = []
    for parameter in range(point.shape[1]):
        move = torch.zeros_like(point)
        move[:, parameter] = step * point[:, parameter].abs()
        columns.append((mean(point + move) - mean(point - move)) / (2 * move[:, parameter, None]))
    jacobian = torch.stack(columns, dim=2)
    noise = mean(point).abs().square().mean(1) * 10 ** (-scenes.snr_db.double() / 10)
    fisher = 2.0 / noise[:, None, None] * (jacobian.mH @ jacobian).real
    scale = torch.diagonal(fisher, dim1=1, dim2=2).rsqrt()
    inverse = torch.linalg.inv(fisher * scale[:, :, None] * scale[:, None])
    variance = torch.diagonal(inverse, dim1=1, dim2=2) * scale.square()
    return variance[:, : 3 * sources].sqrt().view(batch, sources, 3)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_deterministic_bound_is_the_curvature_of_the_likelihood(symbols: str, wavefront: str) -> None:
    task = Task(**SMALL, max_sources=2, symbols=symbols, wavefront=wavefront)
    scenes = scenes_of(task, 2, 12)
    drawn = torch.randn(12, 1 if symbols == "static" else 12, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    drawn = torch.view_as_complex(drawn)
    order = scenes.power.argsort(dim=1, descending=True)
    bound = deterministic_bound(task, scenes, drawn)
    expected = by_differences(task, scenes, drawn.gather(2, order[:, None].expand(-1, drawn.shape[1], -1)))
    torch.testing.assert_close(torch.stack(bound[:3], dim=-1), expected, rtol=1e-3, atol=0)


def test_one_source_has_a_closed_form() -> None:
    task = Task(max_sources=1, snr_min_db=10.0, snr_max_db=10.0)
    scenes = simulate(task, 500, SceneGenerator(1, "test"))
    array, azimuth, elevation = RISArray.of(task), scenes.azimuth.double(), scenes.elevation.double()
    x, y = (each.var(unbiased=False) for each in array.positions(dtype=torch.float64))
    bend = torch.stack(array.positions(dtype=torch.float64)).square().sum(0).var(unbiased=False)
    fisher = 2.0 * task.snapshots * task.bs_antennas * 10.0 * array.wavenumber**2  # over the variance of each slope
    by_u, by_v, by_w = ((fisher * each) ** -0.5 for each in (x, y, bend / 4))
    turned = (elevation.sin() * azimuth.sin() / elevation.cos()) * by_v
    expected = Deviations(
        (by_u**2 + turned**2).sqrt() / (azimuth.cos() * elevation.cos()),
        by_v / elevation.cos(),
        by_w * scenes.range_m.double().square(),
        torch.empty(0),
    )
    for bound in (deterministic_bound(task, scenes), stochastic_bound(task, scenes)):
        ratio = [(one / other).median().item() for one, other in zip(bound[:3], expected)]
        assert ratio == pytest.approx([1.0, 1.0, 1.0], rel=0.01) and ratio[2] == pytest.approx(1.0, rel=0.005)


# Medians of the deterministic bound with static symbols, of azimuth and elevation in degrees and range in metres, at
# -5, 5 and 15 dB: the project's own earlier Monte Carlo on other scenes of RIS-12x12
MEDIANS = {
    1: ((0.51, 0.45, 0.68), (0.17, 0.14, 0.27), (0.051, 0.045, 0.064)),
    2: ((0.89, 0.65, 0.96), (0.26, 0.21, 0.25), (0.090, 0.065, 0.14)),
    3: ((1.45, 1.11, 1.95), (0.44, 0.36, 0.51), (0.13, 0.10, 0.18)),
    5: ((2.30, 1.83, 2.68), (0.83, 0.68, 0.91), (0.23, 0.17, 0.32)),
}


@pytest.mark.parametrize("sources", MEDIANS)
def test_medians_agree_with_an_earlier_table(sources: int) -> None:
    """A bound scales with the SNR exactly, so that the three rows of the table are three draws of one figure: angles
    agree row by row, the range, whose medians scatter from row to row by 50 %, in its mean over the rows."""
    task = Task(max_sources=sources, snr_min_db=5.0, snr_max_db=5.0)
    bound = deterministic_bound(task, scenes_of(task, sources, 250))
    median = [each.median().item() * unit for each, unit in zip(bound, (DEGREE, DEGREE, 1.0))]
    scaled = [[value * 10 ** (snr / 20) for value in row] for snr, row in zip((-10, 0, 10), MEDIANS[sources])]
    for row in scaled:
        assert median[:2] == pytest.approx(row[:2], rel=0.15)
    assert median[2] == pytest.approx(math.prod(row[2] for row in scaled) ** (1 / 3), rel=0.15)


def test_fisher_of_gaussian_symbols_is_the_trace_formula() -> None:
    generator = torch.Generator().manual_seed(0)

    def covariance(b: Tensor, noise: Tensor) -> Tensor:
        return b @ b.mH + noise * torch.eye(b.shape[1])

    columns = torch.randn(1, 3, 6, 2, 3, dtype=torch.complex128, generator=generator)
    noise = torch.tensor([0.7], dtype=torch.float64)
    b, step = columns[0, ..., 0], 1e-6
    changes = []
    for source in range(2):
        moves = [b * 0.5, columns[0, ..., 1], columns[0, ..., 2]]  # by log power: b / 2
        for move in moves:
            only = torch.zeros_like(b)
            only[:, :, source] = step * move[:, :, source]
            changes.append((covariance(b + only, noise) - covariance(b - only, noise)) / (2 * step))
    changes.append(noise * torch.eye(6, dtype=torch.complex128).expand(3, 6, 6))
    white = [torch.linalg.solve(covariance(b, noise), change) for change in changes]
    expected = torch.tensor([[torch.einsum("sij,sji->", one, other).real for other in white] for one in white])
    torch.testing.assert_close(gaussian_fisher(columns, noise)[0], expected, rtol=1e-6, atol=1e-6)


def test_outside_table_of_a_compressed_near_field_array() -> None:
    """Three sources seen by 64 elements at 28 GHz through 8 random phase combiners, 64 snapshots; the published figures
    are degrees and metres at 5 dB, means over the sources (github.com/rvsenyuva/nearfield-clkl, MIT licence)."""
    wavelength, elements, chains, snapshots = 3e8 / 28e9, 64, 8, 64
    spacing, generator = wavelength / 2, torch.Generator().manual_seed(0)
    place = torch.arange(elements, dtype=torch.float64) - (elements - 1) / 2
    rayleigh = 2 * ((elements - 1) * spacing) ** 2 / wavelength
    found: dict[str, list[list[float]]] = {"compressed": [], "full": []}
    for _ in range(200):
        drawn = torch.rand(2, 3, dtype=torch.float64, generator=generator)
        angle, range_m = torch.deg2rad(20 + 40 * drawn[0]), rayleigh * (0.05 + 0.95 * drawn[1])
        bend = math.pi * spacing**2 / wavelength * angle.sin().square()
        line = 2 * math.pi * spacing / wavelength * angle.cos()
        phase = line * place[:, None] - bend / range_m * place.square()[:, None]
        steer = torch.polar(torch.full_like(phase, 3**-0.5), phase)  # of power 1/3 each
        columns = torch.stack((steer, 1j * place[:, None] * steer, -1j * place.square()[:, None] * steer), dim=-1)
        turns = 2 * math.pi * torch.rand(elements, chains, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(torch.polar(torch.ones_like(turns), turns))[0]  # whitens the noise behind the combiner
        slope = torch.stack((2 * math.pi * spacing / wavelength * angle.sin(), bend / range_m.square()))
        for name, seen in (("compressed", torch.tensordot(basis.mH, columns, 1)), ("full", columns)):
            noise = torch.tensor([10**-0.5], dtype=torch.float64)
            fisher = snapshots * gaussian_fisher(seen[None, None], noise)
            variance = torch.diagonal(_covariance(fisher, torch.ones(1, 10, dtype=torch.bool)), dim1=1, dim2=2)
            deviation = variance[0, :9].view(3, 3)[:, 1:].sqrt() / slope.T
            found[name].append(deviation.mean(0).tolist())
    for name, published in (("compressed", (0.0824, 8.02)), ("full", (0.0202, 2.02))):
        angle, range_m = torch.tensor(found[name]).median(0).values.tolist()
        assert (angle * DEGREE, range_m) == pytest.approx(published, rel=0.12), name


def test_known_symbols_change_little() -> None:
    task = Task(**SMALL, max_sources=2, snr_min_db=10.0)
    scenes = scenes_of(task, 2, 40)
    fitted = deterministic_bound(task, scenes)
    true = Sources.of_scenes(scenes)
    exact = simulate(replace(task, snr_min_db=100.0, snr_max_db=100.0), scenes.index, SceneGenerator(1, "test"))
    known = deterministic_bound(task, replace(scenes, snapshots=exact.snapshots))
    assert true.count.eq(2).all()
    for one, other in zip(fitted, known):
        assert (one / other - 1).abs().median() < 0.1


def test_two_sources_in_one_place_have_no_bound() -> None:
    task = Task(**SMALL, max_sources=2)
    scenes = scenes_of(task, 2, 6)
    place = {name: getattr(scenes, name).clone() for name in ("azimuth", "elevation", "range_m")}
    for each in place.values():
        each[0, 1] = each[0, 0]
    scenes = replace(scenes, **place)
    for bound in (deterministic_bound(task, scenes), stochastic_bound(task, scenes)):
        assert torch.isinf(bound.azimuth[0]).all() and torch.isfinite(bound.azimuth[1:]).all()


def test_padding_is_zero_and_order_is_that_of_sources() -> None:
    task = Task(**SMALL, max_sources=3)
    scenes = simulate(task, 32, SceneGenerator(1, "test"))
    true = Sources.of_scenes(scenes)
    for bound in (deterministic_bound(task, scenes), stochastic_bound(task, scenes)):
        for each in bound:
            assert ((each > 0) == true.active).all()
    turned = scenes.apply(lambda value: value.flip(1) if value.shape == scenes.power.shape else value)
    again = deterministic_bound(task, turned)
    torch.testing.assert_close(again.azimuth, deterministic_bound(task, scenes).azimuth)


@pytest.mark.parametrize("field, lack", [("channel", "channel"), ("azimuth", "geometry")])
def test_what_the_scenes_lack_is_named(field: str, lack: str) -> None:
    task = Task(**SMALL)
    scenes = replace(simulate(task, 2, SceneGenerator(1, "test")), **{field: None})
    with pytest.raises(ValueError, match=f"deterministic_bound: the scenes carry no {lack}"):
        deterministic_bound(task, scenes)
