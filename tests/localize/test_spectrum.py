"""Low-rank MUSIC and MVDR against their dense definitions, and what factors are refused."""

from __future__ import annotations

import math

import pytest
import torch

from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.localize.angle_map import angle_map
from ris_fast.localize.count import count_sources
from ris_fast.localize.manifold import Manifold
from ris_fast.localize.spectrum import check_factor, decompose, signal_basis, signal_factor
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes, simulate

WAVEFRONTS = ("fresnel", "spherical")


def small(wavefront: str) -> Task:
    """Rows and columns of different length, so that a mixed-up axis shows."""
    return Task(ris_horizontal=6, ris_vertical=5, wavefront=wavefront)


def random_factor(task: Task, columns: int = 7) -> torch.Tensor:
    return torch.randn(3, task.elements, columns, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("wavefront", WAVEFRONTS)
@pytest.mark.parametrize("method", ("music", "mvdr"))
def test_grid_power_is_the_dense_spectrum(wavefront: str, method: str) -> None:
    """1 - |B^H a|^2 is a^H P_noise a for MUSIC and eps a^H (R + eps I)^-1 a for MVDR, R of trace 1."""
    task, loading, count = small(wavefront), 0.03, torch.tensor([1, 2, 4])
    factor = random_factor(task)
    basis = signal_basis(decompose(factor), count, 5 if method == "music" else 7, method, loading)
    manifold = Manifold.of(task, torch.device("cpu"))
    found = 1 - manifold.grid_power(basis.mT.to(torch.complex64))
    f = to_complex(factor.double())
    r = f @ f.mH / f.abs().square().sum((1, 2), keepdim=True)
    value, vector = torch.linalg.eigh(r)
    if method == "music":
        keep = torch.arange(task.elements) < task.elements - count[:, None]
        middle = (vector * keep[:, None]) @ vector.mH
    else:
        middle = loading * torch.linalg.inv(r + loading * torch.eye(task.elements))
    u, v, w = manifold.grid.double().unbind(-1)
    azimuth, elevation = (u / v.asin().cos()).asin(), v.asin()
    a = to_complex(steering(RISArray.of(task), azimuth, elevation, 1 / w)).T
    dense = (a.conj() * (middle @ a)).real.sum(1)
    torch.testing.assert_close(found.double(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wavefront", WAVEFRONTS)
def test_angle_map_is_the_largest_over_range(wavefront: str) -> None:
    task = small(wavefront)
    factor = random_factor(task)[0]
    found = angle_map(factor, task, count=2, shape=(11, 14, 4))
    basis = signal_basis(decompose(factor[None]), torch.tensor([2]), 2)[0]
    near = torch.linspace(1 / task.range_max_m, 1 / task.range_min_m, 4, dtype=torch.float64)
    elevation, azimuth, w = torch.meshgrid(found.elevation.double(), found.azimuth.double(), near, indexing="ij")
    a = to_complex(steering(RISArray.of(task), azimuth, elevation, 1 / w))
    level = 1 / (1 - (a @ basis.conj()).abs().square().sum(-1))
    torch.testing.assert_close(found.level.double(), level.amax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.range_m.double(), 1 / near[level.argmax(-1)], rtol=1e-5, atol=1e-5)


def test_angle_map_peaks_are_the_sources() -> None:
    """One lobe, one peak: at the nearest point of the grid, the most that are asked for."""
    task = Task(max_sources=2)
    scenes = simulate(task, 40, SceneGenerator(2, "test"))
    apart = (scenes.count == 2) & ((scenes.azimuth[:, 0] - scenes.azimuth[:, 1]).abs() > math.radians(30))
    row = int(apart.nonzero()[0])
    found = angle_map(scenes.factor[row], task, shape=(91, 181, 12))
    azimuth, elevation = found.peaks(2)
    order = azimuth.argsort()
    expected, at = scenes.azimuth[row].sort()
    assert (azimuth[order] - expected).abs().max() < math.radians(0.8)
    assert (elevation[order] - scenes.elevation[row][at]).abs().max() < math.radians(0.8)
    assert all(len(each) <= 5 for each in found.peaks(5)) and found.level.min() >= 1


def test_signal_factor_is_the_nearest_of_its_rank() -> None:
    """R less the truncated one leaves exactly the other eigenvalues (Eckart and Young)."""
    parts = decompose(random_factor(small("fresnel")))
    count = torch.tensor([0, 2, 5])
    truncated = signal_factor(parts, count, 5)
    rest = parts.factor @ parts.factor.mH - truncated @ truncated.mH
    for scene, number in enumerate(count.tolist()):
        left = torch.linalg.eigvalsh(rest[scene]).flip(0)[: 7 - number]
        torch.testing.assert_close(left, parts.value[scene, number:], rtol=1e-9, atol=1e-12)


def scenes_of(task: Task, count: int = 60) -> Scenes:
    return simulate(task, count, SceneGenerator(3, "test"))


def test_count_of_an_exact_factor_is_its_rank() -> None:
    """However weak a source is, and whatever unitary matrix mixes the columns."""
    task = Task()
    scenes = scenes_of(task)
    padded = torch.nn.functional.pad(scenes.factor, (0, 0, 0, 3))
    mix = torch.linalg.qr(torch.randn(8, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))[0]
    for factor in (padded, torch.view_as_real(to_complex(padded) @ mix)):
        assert torch.equal(count_sources(decompose(factor), task.max_sources), scenes.count)


def test_count_of_a_noisy_factor_leaves_out_its_noise() -> None:
    """Strong sources count, eigenvalues of noise spread over ten columns do not."""
    task = Task(power="equal", max_sources=3, azimuth_deg=60)
    scenes = scenes_of(task, 200)
    strong = scenes.power.where(scenes.power > 0, torch.inf).amin(1) > 0.1 * scenes.power.sum(1)
    factor = torch.nn.functional.pad(scenes.factor, (0, 0, 0, 7))
    size = factor.square().sum((1, 2, 3), keepdim=True).sqrt()
    noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(0))
    noisy = factor / size + 0.1 * noise / noise.square().sum((1, 2, 3), keepdim=True).sqrt()
    counted = count_sources(decompose(noisy), task.max_sources)
    assert strong.sum() > 60 and (counted == scenes.count)[strong].float().mean() > 0.9


@pytest.mark.parametrize(
    "factor, error, said",
    [
        ([1.0], TypeError, "locate: factor is a list, expected a tensor"),
        (torch.zeros(2, 30, 3), ValueError, r"factor is \(2, 30, 3\), expected \(B, 144, Q, 2\)"),
        (torch.zeros(2, 144, 0, 2), ValueError, r"factor is \(2, 144, 0, 2\)"),
        (torch.zeros(2, 144, 33, 2), ValueError, "33 columns, expected at most 32"),
    ],
)
def test_check_factor_names_what_is_wrong(factor: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        check_factor("locate", factor, Task())


def test_check_factor_names_a_wrong_task() -> None:
    with pytest.raises(ConfigError, match="locate: task is a Config, expected a Task"):
        check_factor("locate", torch.zeros(1, 144, 2, 2), Config())


def test_signal_basis_refuses_what_has_no_meaning() -> None:
    parts = decompose(random_factor(small("fresnel")))
    with pytest.raises(ValueError, match="method is 'esprit', expected one of music, mvdr"):
        signal_basis(parts, torch.ones(3, dtype=torch.int64), 3, "esprit")
    with pytest.raises(ValueError, match="loading is 0.0, expected a share of the trace above 0"):
        signal_basis(parts, torch.ones(3, dtype=torch.int64), 3, "mvdr", 0.0)
