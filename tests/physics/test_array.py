"""Laws of the surface: unit norm, centring, near field against far field, codes on their grid."""

from __future__ import annotations

import math

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.codes import dft_codes
from ris_fast.physics.real_complex import power, to_complex


def directions(count: int, range_m: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    azimuth = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * 2.0
    elevation = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * 1.0
    return azimuth, elevation, torch.full_like(azimuth, range_m)


@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
@pytest.mark.parametrize("shape", [(12, 12), (5, 7), (1, 1), (32, 32)])
def test_steering_has_unit_norm(wavefront: str, shape: tuple[int, int]) -> None:
    vectors = steering(RISArray(*shape, wavefront=wavefront), *directions(16, 2.0))
    assert vectors.shape == (16, shape[0] * shape[1], 2)
    torch.testing.assert_close(power(vectors).sum(-1), torch.ones(16, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ris_array_positions_are_centred_horizontal_fastest() -> None:
    x, y = RISArray(4, 3).positions()
    assert x.sum().abs() < 1e-6 and y.sum().abs() < 1e-6
    torch.testing.assert_close(x[1] - x[0], torch.tensor(0.15))
    assert y[0] == y[1] and y[4] > y[3]


def test_fresnel_steering_is_the_written_formula() -> None:
    array = RISArray(3, 2)
    azimuth, elevation, range_m = (torch.tensor([value], dtype=torch.float64) for value in (0.4, -0.2, 1.7))
    x, y = array.positions(dtype=torch.float64)
    u, v = math.sin(0.4) * math.cos(-0.2), math.sin(-0.2)
    phase = 2 * math.pi / 0.3 * (u * x + v * y - (x**2 + y**2) / (2 * 1.7))
    expected = torch.polar(torch.full_like(phase, 6**-0.5), phase)
    torch.testing.assert_close(to_complex(steering(array, azimuth, elevation, range_m))[0], expected)


def test_fresnel_steering_meets_spherical_far_away() -> None:
    gaps = []
    for range_m in (0.5, 5.0, 50.0, 500.0):
        place = directions(200, range_m)
        fresnel, spherical = (
            to_complex(steering(RISArray(wavefront=kind), *place)) for kind in ("fresnel", "spherical")
        )
        gaps.append((1 - (fresnel.conj() * spherical).sum(-1).abs()).mean().item())
    assert gaps[0] > 0.1 and gaps == sorted(gaps, reverse=True)
    assert gaps[3] == pytest.approx(gaps[2] / 100, rel=0.1)  # the neglected phase falls as 1/r, its effect as 1/r^2


def test_spherical_steering_keeps_its_phase_in_float32() -> None:
    azimuth, elevation, range_m = directions(50, 1000.0)
    exact = to_complex(steering(RISArray(wavefront="spherical"), azimuth, elevation, range_m))
    single = to_complex(steering(RISArray(wavefront="spherical"), azimuth.float(), elevation.float(), range_m.float()))
    assert (exact - single).abs().max() * 12 < 1e-4


def test_dft_codes_are_quantised_beams() -> None:
    task = Task()
    codes = dft_codes(task, dtype=torch.float64)
    assert codes.shape == (16, 144, 2)
    torch.testing.assert_close(power(codes), torch.ones(16, 144, dtype=torch.float64))
    steps = torch.atan2(codes[..., 1], codes[..., 0]) / (2 * math.pi / 8)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(codes[0, :, 0], torch.ones(144, dtype=torch.float64))  # beam 0 points ahead


def test_steering_names_a_wrong_wavefront_and_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="wavefront is 'flat'"):
        RISArray(wavefront="flat")
    with pytest.raises(ValueError, match="must have one shape"):
        steering(RISArray(), torch.zeros(2), torch.zeros(3), torch.ones(2))


def test_ris_array_points_a_task_to_ris_array_of() -> None:
    with pytest.raises(TypeError, match=r"RISArray: horizontal is a Task, expected .* RISArray.of\(task\)"):
        RISArray(Task())
    with pytest.raises(TypeError, match="RISArray: vertical is a float"):
        RISArray(12, 12.0)
    with pytest.raises(ValueError, match="must be positive"):
        RISArray(0)
