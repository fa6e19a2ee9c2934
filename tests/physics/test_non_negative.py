"""Non-negative least squares: the Karush-Kuhn-Tucker conditions, and what it says of systems without one answer."""

from __future__ import annotations

import torch

from ris_fast.physics.non_negative import non_negative_least_squares


def test_non_negative_least_squares_is_the_optimum() -> None:
    """p >= 0, the gradient G p - r is >= 0 everywhere and 0 where p > 0."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(200, 6, 4, generator=generator, dtype=torch.float64)
    gram, right = root.mT @ root, torch.randn(200, 4, generator=generator, dtype=torch.float64)
    power = non_negative_least_squares(gram, right, sweeps=5000)
    gradient = (gram @ power[..., None])[..., 0] - right
    assert (power >= 0).all() and ((power == 0).any(1) & (power > 0).any(1)).sum() > 50
    assert gradient.min() > -1e-6 and (gradient * power).abs().max() < 1e-6


def test_non_negative_least_squares_of_absent_and_equal_sources() -> None:
    """A zero row gets nothing; of two equal rows only the sum is determined."""
    gram = torch.tensor([[[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    power = non_negative_least_squares(gram, torch.tensor([[6.0, 6.0, 0.0]], dtype=torch.float64))
    assert (power >= 0).all() and power[0, 2] == 0
    torch.testing.assert_close(power.sum(), torch.tensor(3.0, dtype=torch.float64))
