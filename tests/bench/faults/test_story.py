"""The report that started this project, and what else keeps people from learning: each is named, in time, first."""

from __future__ import annotations

import pytest

from bench.faults.catalogue import all_faults
from bench.faults.score import score_fault

pytestmark = pytest.mark.slow

STORIES = {
    "the whole report: the body of the loop behind it, average validated, loss over the number of batches": (
        "body_behind_the_loop",
        "step_once_per_epoch",
        8,
    ),
    "a NaN gradient every step from one small term, under a sanitiser": (
        "nan_term_under_sanitiser",
        "sanitised_gradients",
        0,
    ),
    "validated weights that never change": ("average_never_updated", "ema_frozen", 0),
    "a main loss weight of zero": ("main_weight_zero", "zero_loss_weight", 0),
    "an input that withholds the channel": ("channel_only_as_products", "inputs_withhold_answer", 0),
    "half of the parameters without gradient": ("heads_without_a_term", "unused_head", 0),
}


@pytest.mark.parametrize("story", STORIES)
def test_first_finding_of_a_story_is_its_cause(story: str) -> None:
    name, cause, latest = STORIES[story]
    outcome = score_fault(all_faults()[name])
    assert not outcome.crashed
    assert outcome.said[:1] == (cause,), outcome
    assert outcome.step <= latest
