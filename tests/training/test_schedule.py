"""Laws of the schedule: never zero, peak reached, monotone after it, ends low, and planned from time where time is
short."""

from __future__ import annotations

import pytest

from ris_fast.training.schedule import Plan, learning_rate_factor, steps_in_epoch


@pytest.mark.parametrize("planned", [1, 2, 10, 240, 4680])
def test_learning_rate_factor_over_a_whole_run(planned: int) -> None:
    factors = [learning_rate_factor(step, planned, 0.05, 0.01) for step in range(planned)]
    assert factors[0] > 0 and max(factors) == pytest.approx(1.0)
    peak = factors.index(max(factors))
    assert peak <= max(1, 0.1 * planned)
    assert all(late <= early for early, late in zip(factors[peak:], factors[peak + 1 :]))
    if planned > 100:
        assert factors[-1] <= 1.05 * 0.01


def test_learning_rate_factor_stays_low_beyond_the_plan() -> None:
    assert learning_rate_factor(500, 100, 0.1, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("scenes", "batch", "accumulate", "steps"),
    [(640, 64, 1, 10), (641, 64, 1, 11), (640, 64, 4, 3), (1, 64, 4, 1), (128, 16, 4, 2)],
)
def test_steps_in_epoch_follow_from_the_data(scenes: int, batch: int, accumulate: int, steps: int) -> None:
    assert steps_in_epoch(scenes, batch, accumulate) == steps


def test_plan_update_shortens_for_time_and_never_lengthens() -> None:
    plan = Plan(1000, max_seconds=100.0)
    assert plan.update(10, 2.0) == 500
    assert plan.update(20, 1.0) == 1000
    assert plan.update(90, 99.0) == pytest.approx(91, abs=1)
    assert Plan(1000).update(10, 1e9) == 1000
