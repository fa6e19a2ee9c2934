"""Mistakes that show around an optimizer's steps are named, and loops that look alike are left alone."""

from __future__ import annotations

import pytest
import torch

from tests.health.watch import step_loops

EXPECTED = {
    "wrong_rate_zero_from_step_8": ("zero_learning_rate", True),
    "wrong_rate_decays_to_nothing": ("learning_rate_too_small", True),
    "wrong_rate_below_zero": ("learning_rate_off_plan", False),
    "wrong_schedule_never_advanced": ("schedule_per_epoch", False),
    "wrong_decay_jumps": ("settings_changed", False),
    "wrong_noise_every_16th_step": ("weights_changed_outside", False),
    "wrong_from_step_20_on": ("weights_changed_outside", False),
    "wrong_average_over_raw": ("ema_saved_over_raw", False),
    "wrong_update_by_hand_too": ("weights_changed_outside", False),
    "wrong_put_back": ("weights_reset", False),
    "wrong_second_optimizer": ("duplicate_parameters", False),
    "wrong_optimizer_built_anew": ("optimizer_state_lost", False),
    "wrong_step_moves_nothing": ("step_without_effect", True),
    "wrong_step_moves_some": ("step_without_effect", False),
    "wrong_half_weights_stand_still": ("low_precision_weights", True),
    "wrong_weights_rounded": ("low_precision_weights", False),
    "wrong_epsilon": ("epsilon_swallows_signal", False),
    "wrong_declared_frozen": ("settings_changed", True),
    "wrong_rounded_outputs": ("non_differentiable", True),
    "wrong_dead_layer": ("dead_units", False),
    "wrong_both_factors_zero": ("zero_product_init", True),
    "wrong_hook_zeroes": ("zeroed_gradients", False),
    "wrong_cleared_every_16th_step": ("gradients_cleared_before_step", False),
    "wrong_turned_round_at_times": ("loss_sign", False),
    "wrong_micro_batches_cleared": ("last_micro_batch_only", False),
    "wrong_steps_end": ("step_never_called", False),
    "wrong_scale_divided_again": ("unscaled_twice", True),
    "wrong_scale_divided_twice_by_hand": ("unscaled_twice", False),
    "wrong_clipped_while_scaled": ("clip_before_unscale", True),
    "wrong_frozen_from_step_20": ("frozen_parameters", False),
}
RIGHT = [name for name in vars(step_loops) if name.startswith("right_")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_every_wrong_loop_is_expected() -> None:
    assert EXPECTED.keys() == {name for name in vars(step_loops) if name.startswith("wrong_")} and len(RIGHT) > 25


@pytest.mark.parametrize("name", EXPECTED)
def test_watch_names_what_happens_around_steps(name: str) -> None:
    found = getattr(step_loops, name)().report()
    assert found, name
    assert (found[0].cause, found[0].certain) == EXPECTED[name], found


@pytest.mark.parametrize("name", RIGHT)
def test_watch_leaves_right_loops_alone(name: str) -> None:
    assert getattr(step_loops, name)().report() == []
