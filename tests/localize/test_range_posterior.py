"""Posterior ranges: the likelihood's where it is sharp, the prior's where it is flat, the exact integral in between."""

import torch

from ris_fast.localize.range_posterior import range_posterior

LEAST, MOST = 0.5, 10.0


def posterior(inverse: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return range_posterior(inverse, deviation, LEAST, MOST)


def test_a_sharp_likelihood_decides_alone() -> None:
    ranges = torch.linspace(0.6, 9.0, 50)
    deviation = 1e-3 / ranges
    median, spread = posterior(1.0 / ranges, deviation)
    torch.testing.assert_close(median, ranges, rtol=1e-4, atol=0)
    torch.testing.assert_close(spread, ranges.square() * deviation, rtol=2e-2, atol=0)


def test_a_flat_likelihood_leaves_the_prior() -> None:
    median, spread = posterior(torch.tensor([0.1, 1.0, 2.0]), torch.full((3,), 1e4))
    torch.testing.assert_close(median, torch.full((3,), (LEAST + MOST) / 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(spread, torch.full((3,), (MOST - LEAST) / 12**0.5), rtol=1e-3, atol=0)


def test_it_is_the_integral_over_range_inside_the_limits_and_out() -> None:
    generator = torch.Generator().manual_seed(0)
    inverse = 2.6 * torch.rand(60, generator=generator) - 0.3  # as a fit outside the limits would have it
    deviation = 10 ** (2.0 * torch.rand(60, generator=generator) - 2.0)
    median, spread = posterior(inverse, deviation)
    at = torch.linspace(LEAST, MOST, 20_001, dtype=torch.float64)
    for index in range(len(inverse)):
        density = -0.5 * ((1.0 / at - inverse[index]) / deviation[index]).square()
        mass = density.softmax(0)
        mean = (mass * at).sum()
        exact = (mass * (at - mean).square()).sum().sqrt()
        assert (median[index] - at[(mass.cumsum(0) < 0.5).sum()]).abs() < 0.04 * exact + 1e-3
        assert (spread[index] - exact).abs() < 0.04 * exact + 1e-3


def test_errors_of_sources_drawn_from_the_prior_are_as_large_as_said_and_smaller_than_without_it() -> None:
    generator = torch.Generator().manual_seed(1)
    true = LEAST + (MOST - LEAST) * torch.rand(40_000, generator=generator)
    deviation = 0.05 * torch.rand(len(true), generator=generator)
    seen = 1.0 / true + deviation * torch.randn(len(true), generator=generator)
    median, spread = posterior(seen, deviation)
    assert 0.49 < (true < median).float().mean() < 0.51
    error = (median - true).square().mean()
    assert 1.0 < error / spread.square().mean() < 1.1  # least about the mean
    likely = 1.0 / seen.clamp(1.0 / MOST, 1.0 / LEAST)
    assert error < 0.8 * (likely - true).square().mean()
    assert ((median - true).abs() < 1.0).float().mean() > ((likely - true).abs() < 1.0).float().mean() + 0.01


def test_no_deviation_at_all() -> None:
    median, spread = posterior(torch.tensor([0.5, 0.0, 3.0]), torch.zeros(3))
    torch.testing.assert_close(median, torch.tensor([2.0, MOST, LEAST]), rtol=1e-4, atol=0)
    assert (spread < 1e-3).all()
