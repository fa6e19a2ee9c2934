"""Rules over ranks: silent about healthy ones, and each says which rank breaks its contract, and since when."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.history import RunHistory, named
from ris_fast.health.monitor.rank_rules import RANK_RULES

Ranks = dict[str, Any]


def healthy(size: int, scenes: int = 16, seed: int = 0) -> Ranks:
    """A reading of `size` ranks with `scenes` each, the last of them with none where there are more than three."""
    draw = random.Random(seed)
    counts = [scenes] * (size - 1) + [scenes if size < 4 else 0]
    own = [[draw.gauss(0, 1) * (count > 0) for _ in range(2)] for count in counts]
    return {
        "weights": ["0a"] * size,
        "scenes": counts,
        "nonfinite": [0] * size,
        "grad_norm": [float(count > 0) for count in counts],
        "share": [count / sum(counts) for count in counts],
        "as_numbered": [None if count == 0 else True for count in counts],
        "own": own,
        "summed": [[sum(each) for each in zip(*own)]] * size,
        "shared": [],
    }


def found(*readings: Ranks) -> list[Finding]:
    """What the last of several steps in a row shows."""
    run = RunHistory(steps=[{"step": at + 1, "epoch": 1, "health": {"call": at + 1, "ranks": each}}
                            for at, each in enumerate(readings)])  # fmt: skip
    return [finding for rule in RANK_RULES for finding in rule(run)]


def only(*readings: Ranks) -> tuple[str, str]:
    (finding,) = found(*readings)
    assert finding.certain and finding.severity in ("structural", "contract")
    return finding.cause, finding.evidence


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_rank_rules_find_nothing_in_healthy_ranks(size: int) -> None:
    assert found(healthy(size), healthy(size, seed=1)) == []
    alone = RunHistory(steps=[{"step": 1, "epoch": 1, "health": {"call": 1}}])
    assert [each for rule in RANK_RULES for each in rule(alone)] == []


def test_rank_rules_say_nothing_of_rounding_or_of_a_skipped_step() -> None:
    rounded = healthy(4)
    rounded["summed"] = [[value + 2e-7 for value in rounded["summed"][0]]] * 4
    skipped = healthy(4)
    skipped["nonfinite"][1], skipped["own"][1], skipped["grad_norm"][1] = 3, [float("nan")] * 2, float("inf")
    skipped["summed"] = [[float("nan")] * 2] * 4
    assert found(rounded) == found(skipped) == []


@pytest.mark.parametrize(
    "size, changed, seen",
    [(2, [1], "rank 1 holds other weights than rank 0"), (3, [1], "rank 1 of 3 holds"), (3, [0], "rank 0 of 3 holds"),
     (8, [2, 5], "ranks 2 and 5 of 8 hold"), (4, [2, 3], "ranks 2 and 3 of 4 hold")],
)  # fmt: skip
def test_ranks_diverged_names_the_minority_and_the_step(size: int, changed: list[int], seen: str) -> None:
    apart = healthy(size)
    for rank in changed:
        apart["weights"][rank] = "0b"
    cause, evidence = only(healthy(size), healthy(size), apart)
    assert cause == "ranks_diverged" and seen in evidence
    assert "before step 3" in evidence and "before step 2 all held the same" in evidence


def test_ranks_diverged_is_silent_where_the_gradient_explains_it() -> None:
    alone, apart = healthy(2), healthy(2)
    alone["summed"], apart["weights"] = alone["own"], ["0a", "0b"]
    assert only(alone)[0] == "rank_gradient_missing"
    assert found(alone, apart) == []


def test_rank_sees_other_data_names_the_rank() -> None:
    same = healthy(3)
    same["shared"], same["as_numbered"] = [[0, 1, 16]], [True, False, True]
    assert only(same) == ("rank_sees_other_data", "in step 1 rank 1 is shown 16 scenes of rank 0 instead of its own.")
    other = healthy(3)
    other["as_numbered"] = [True, False, False]  # what rank 1 makes of rank 2's number is another data set's, too
    cause, evidence = only(other)
    assert cause == "rank_sees_other_data" and "rank 1 is shown other scenes" in evidence and "rank 2" not in evidence
    two = healthy(2)
    two["as_numbered"] = [False, False]
    assert "rank 1 is shown" in only(two)[1]


def test_a_copy_in_the_data_is_no_finding() -> None:
    copied, few = healthy(2), healthy(2, scenes=1)
    copied["shared"], few["shared"] = [[0, 1, 3]], [[0, 1, 1]]
    assert found(copied) == found(few) == []
    assert only(few, few)[0] == "rank_sees_other_data"


def test_rank_gradient_missing_names_the_rank() -> None:
    zero = healthy(3)
    zero["own"][1], zero["grad_norm"][1] = [0.0, 0.0], 0.0
    zero["summed"] = [[sum(each) for each in zip(*zero["own"])]] * 3
    assert "the gradient of rank 1 is zero over 16 scenes" in only(zero)[1]

    left_out = healthy(3)
    left_out["summed"] = [[a - b for a, b in zip(left_out["summed"][0], left_out["own"][1])]] * 3
    assert "the gradient of rank 1 of 3 is not in the sum" in only(left_out)[1]

    first_only = healthy(2)
    first_only["summed"] = [first_only["own"][0]] * 2
    assert "the gradient of rank 1 of 2 is not in the sum" in only(first_only)[1]

    twice = healthy(3)
    twice["summed"] = [[a + b for a, b in zip(twice["summed"][0], twice["own"][1])]] * 3
    assert "the gradient of rank 1 of 3 counts 2 times in the sum" in only(twice)[1]

    alone = healthy(3)
    alone["summed"] = [alone["summed"][0], alone["own"][1], alone["summed"][2]]
    assert "rank 1 of 3 steps with its own gradient alone" in only(alone)[1]

    odd = healthy(3)
    odd["summed"] = [odd["summed"][0], [7.0, -3.0], odd["summed"][2]]
    assert "rank 1 of 3 steps with another gradient than the sum" in only(odd)[1]
    assert {only(each)[0] for each in (zero, left_out, first_only, twice, alone, odd)} == {"rank_gradient_missing"}


def test_a_wrong_scale_of_the_sum_or_of_a_share_is_found() -> None:
    mean, shares = healthy(4), healthy(2)
    mean["summed"] = [[value / 4 for value in mean["summed"][0]]] * 4
    assert only(mean) == (
        "accumulation_not_divided",
        "in step 1 all 4 ranks step with 0.25 times the sum of their gradients.",
    )
    shares["share"] = [1.0, 1.0]
    assert "ranks 0 and 1 of 2 weigh losses by another share" in only(shares)[1]


def test_named_shortens_long_lists() -> None:
    assert (named([3]), named([1, 4]), named([1, 2, 3])) == ("rank 3", "ranks 1 and 4", "ranks 1, 2 and 3")
    assert named(range(50)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 42 more"
