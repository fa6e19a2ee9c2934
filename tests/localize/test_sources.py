"""The record of sources: order, padding and the coordinates it goes to and from."""

import torch

from ris_fast.config.schema import Task
from ris_fast.localize.sources import Sources
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate

TRUTH = Sources.of_scenes(simulate(Task(), 64, SceneGenerator(0, "test")))


def test_truth_is_sorted_by_power_and_zero_beyond_count() -> None:
    assert (TRUTH.power[:, :-1] >= TRUTH.power[:, 1:]).all()
    assert ((TRUTH.range_m > 0) == TRUTH.active).all()
    assert (TRUTH.active.sum(1) == TRUTH.count).all()


def test_cosines_and_back_is_identity() -> None:
    back = Sources.of_cosines(TRUTH.cosines(), TRUTH.power, TRUTH.count)
    for one, other in zip(back, TRUTH):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_weaker_rows_beyond_count_become_zero() -> None:
    fewer = Sources.of_cosines(TRUTH.cosines(), TRUTH.power, TRUTH.count.clamp_max(1))
    assert not fewer.power[:, 1:].any() and not fewer.range_m[:, 1:].any()
    torch.testing.assert_close(fewer.power[:, 0], TRUTH.power[:, 0])


def test_cartesian_has_length_range() -> None:
    torch.testing.assert_close(TRUTH.cartesian().norm(dim=-1), TRUTH.range_m)
    single = Sources(*(torch.tensor([[x]]) for x in (0.0, 0.0, 2.0, 1.0)), torch.tensor([1]))
    torch.testing.assert_close(single.cartesian(), torch.tensor([[[0.0, 0.0, 2.0]]]))
