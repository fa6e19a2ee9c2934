"""Laws of the scores: what a perfect answer, a missing, a surplus and a permuted one get, and what the bound's own
errors get."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from ris_fast.localize.bootstrap import Bootstrap
from ris_fast.localize.groups import group_scores, groups, of_axis
from ris_fast.localize.matching import NARROW, WIDE, match
from ris_fast.localize.metrics import COORDINATES, Metrics, Ratios, bound_of, confusion, medians, score
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.physics.scenes import Scenes
from tests.localize.made_up import around, some_bound, some_scenes

PARTS = ("recall_wide", "precision_wide", "recall_narrow", "precision_narrow")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return some_scenes()


@pytest.fixture(scope="module")
def truth(scenes: Scenes) -> Sources:
    return Sources.of_scenes(scenes)


def metrics(estimate: Sources, truth: Sources, bound: Deviations | None = None) -> dict[str, float]:
    scores = score(estimate, truth, bound)
    return Metrics(scores).of(scores.true).values() | medians(scores, scores.true)


def test_perfect_estimates_have_no_error_and_full_recall_and_precision(truth: Sources) -> None:
    found = metrics(truth, truth)
    assert [found[name] for name in (*PARTS, "count_right")] == [1.0] * 5
    assert all(found[f"{kind}_{name}"] == 0.0 for kind in ("rmse", "median") for name in COORDINATES)
    assert math.isnan(found["crb_range_m"]) and math.isnan(found["rmse_over_crb_range"])


def test_order_of_sources_changes_nothing(truth: Sources) -> None:
    """Neither that of the estimates nor that of the truth, whose bound goes with it."""
    bound = some_bound(truth)
    estimate, seed = around(truth, bound), torch.Generator().manual_seed(3)
    key = torch.rand(truth.power.shape, generator=seed) + 2.0 * ~truth.active  # sources stay before the padding
    order = key.argsort(1)
    there, other = (Sources(*(each.gather(1, order) for each in one[:4]), one.count) for one in (estimate, truth))
    expected = metrics(estimate, truth, bound)
    assert metrics(there, truth, bound) == expected
    permuted = metrics(estimate, other, Deviations(*(each.gather(1, order) for each in bound)))
    assert permuted == pytest.approx(expected, rel=1e-12, abs=1e-12)


def with_one_more(truth: Sources) -> Sources:
    """A source far from all others in front of those of each scene."""
    added = (torch.full_like(truth.power[:, :1], value) for value in (1.5, 1.5, 50.0, 1.0))
    return Sources(*(torch.cat(pair, 1) for pair in zip(added, truth[:4])), truth.count + 1)


def test_one_extra_source_lowers_precision_only(truth: Sources) -> None:
    found, share = metrics(with_one_more(truth), truth), truth.count.sum() / (truth.count + 1).sum()
    assert found["recall_wide"] == found["recall_narrow"] == 1.0 and found["count_right"] == 0.0
    assert found["precision_wide"] == found["precision_narrow"] == pytest.approx(share.item())
    assert found["rmse_position_m"] == 0.0


def test_one_missing_source_lowers_recall_only(truth: Sources) -> None:
    several = truth.take(truth.count > 1)
    fewer = several._replace(count=several.count - 1)
    found = metrics(fewer, several)
    assert found["precision_wide"] == found["precision_narrow"] == 1.0 and found["rmse_azimuth_deg"] == 0.0
    assert (
        found["recall_wide"]
        == found["recall_narrow"]
        == pytest.approx((fewer.count.sum() / several.count.sum()).item())
    )


def test_no_estimates_have_no_recall_and_no_precision(truth: Sources) -> None:
    found = metrics(truth._replace(count=torch.zeros_like(truth.count)), truth)
    assert found["recall_wide"] == 0.0 and math.isnan(found["precision_wide"]) and math.isnan(found["rmse_range_m"])


def one_scene(azimuth: list[float], range_m: list[float]) -> Sources:
    degrees = torch.tensor([azimuth]).double().deg2rad()
    return Sources(
        degrees, 0 * degrees, torch.tensor([range_m]).double(), 1 + 0 * degrees, torch.tensor([len(azimuth)])
    )


@pytest.mark.parametrize(
    "estimate, truth, expected",
    [
        (([3.0], [5.0]), ([0.0], [5.0]), [0]),
        (([5.1], [5.0]), ([0.0], [5.0]), [-1]),
        (([0.0], [6.1]), ([0.0], [5.0]), [-1]),  # one coordinate too far is too far
        (([4.0, -6.0], [5.0, 5.0]), ([0.0, 8.0], [5.0, 5.0]), [-1, 0]),  # 4 is as near to 0 as to 8: either is right
        (([4.0, 8.5], [5.0, 5.0]), ([0.0, 4.5], [5.0, 5.0]), [0, 1]),  # most pairs before nearest pairs
        (([1.0, 2.0], [5.0, 5.0]), ([2.1, 0.9], [5.0, 5.0]), [1, 0]),
        (([1.0], [5.0]), ([0.0, 1.1], [5.0, 5.0]), [-1, 0]),
    ],
)
def test_match_makes_most_pairs_then_nearest(estimate, truth, expected) -> None:
    found = match(one_scene(*estimate), one_scene(*truth), WIDE)[0].tolist()
    assert found == expected or (expected == [-1, 0] and found == [0, -1] and len(estimate[0]) == 2)


def test_match_agrees_with_every_assignment_tried() -> None:
    """Three estimates and three sources, close together: brute force over all partial assignments."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        ours, true = (one_scene(*(torch.rand(2, 3, generator=generator) * 2 + 5).tolist()) for _ in range(2))
        error = [
            [((a - t) * 180 / math.pi, r - s) for a, r in zip(ours.azimuth[0], ours.range_m[0])]
            for t, s in zip(true.azimuth[0], true.range_m[0])
        ]
        near = [[abs(a) <= 1.0 and abs(r) <= 0.3 for a, r in row] for row in error]
        most = max(sum(near[k][e] for k, e in enumerate(order)) for order in permutations(range(3)))
        assert int((match(ours, true, NARROW) >= 0).sum()) == most


def test_scores_of_different_scenes_are_refused(truth: Sources) -> None:
    with pytest.raises(ValueError, match="estimates are of 10 scenes and the truth of 1000"):
        score(truth.take(slice(10)), truth)


def test_errors_drawn_from_the_bound_have_ratio_one(truth: Sources) -> None:
    """Within four standard errors: of an RMSE 1/sqrt(2n), of a median about 1.17/sqrt(n)."""
    bound = some_bound(truth)
    found, n = metrics(around(truth, bound), truth, bound), int(truth.count.sum())
    for name in ("azimuth", "elevation", "range", "position"):
        assert found[f"rmse_over_crb_{name}"] == pytest.approx(1.0, abs=8 / math.sqrt(2 * n))
    for name in ("azimuth", "elevation", "range"):
        assert found[f"median_over_crb_{name}"] == pytest.approx(1.0, abs=4 * 1.17 / math.sqrt(n))


def test_errors_twice_the_bound_have_ratio_two(truth: Sources) -> None:
    bound = some_bound(truth)
    wider = around(truth, Deviations(*(2 * each for each in bound)))
    assert metrics(wider, truth, bound)["rmse_over_crb_range"] == pytest.approx(
        2 * metrics(around(truth, bound), truth, bound)["rmse_over_crb_range"], rel=1e-9
    )


def test_bound_of_positions_is_the_trace_of_their_covariance(truth: Sources) -> None:
    """By the Jacobian of the Cartesian position, which autograd knows."""
    bound, few = some_bound(truth), truth.take(slice(20))
    for scene in range(20):
        for k in range(int(few.count[scene])):
            place = torch.tensor([each[scene, k].double() for each in few[:3]])

            def cartesian(place: torch.Tensor) -> torch.Tensor:
                row = place[:, None, None]
                return Sources(*row, torch.ones(1, 1).double(), torch.ones(1).long()).cartesian()[0, 0]

            jacobian = torch.autograd.functional.jacobian(cartesian, place)
            variances = torch.tensor([each[scene, k].square() for each in bound[:3]])
            expected = (jacobian @ variances.diag() @ jacobian.T).trace().sqrt()
            assert bound_of(bound, truth)[scene, k, 3].item() == pytest.approx(expected.item(), rel=1e-6)


def test_sources_without_a_finite_bound_stay_out_of_its_ratio(truth: Sources) -> None:
    bound = some_bound(truth)
    estimate = around(truth, bound)
    lost = Deviations(*(each.index_fill(0, torch.arange(500), torch.inf) for each in bound))
    half = metrics(estimate, truth, lost)
    rows = slice(500, None)
    expected = metrics(estimate.take(rows), truth.take(rows), Deviations(*(each[rows] for each in bound)))
    assert half["rmse_over_crb_azimuth"] == pytest.approx(expected["rmse_over_crb_azimuth"], rel=1e-12)
    assert half["crb_azimuth_deg"] == pytest.approx(expected["crb_azimuth_deg"], rel=1e-12)


def test_bound_recall_is_the_recall_of_errors_drawn_from_the_bound(truth: Sources) -> None:
    """Deviations near the tolerances: a third of the sources is lost."""
    bound = Deviations(*(50 * each for each in some_bound(truth)[:2]), 10 * some_bound(truth).range_m, truth.power)
    apart = truth._replace(count=truth.count.clamp_max(1))  # no other source to be matched to
    found, n = metrics(around(apart, bound), apart, bound), len(truth.count)
    for name in ("wide", "narrow"):
        expected = found[f"bound_recall_{name}"]
        assert 0.05 < expected < 0.95
        assert found[f"recall_{name}"] == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))


def test_resolvable_sources_are_those_of_a_narrow_bound(truth: Sources) -> None:
    bound = some_bound(truth)
    wide = Deviations(*(each.index_fill(0, torch.arange(500), 10.0) for each in bound))
    scores = score(truth, truth, wide)
    assert not scores.resolvable[:500].any() and torch.equal(scores.resolvable[500:], truth.active[500:])
    found = Metrics(scores).of(scores.true).values()
    assert found["share_resolvable"] == pytest.approx((truth.count[500:].sum() / truth.count.sum()).item())
    assert found["resolvable_recall"] == 1.0


def test_confusion_counts_each_scene_once(truth: Sources) -> None:
    found = confusion(score(with_one_more(truth), truth))
    assert found.shape == (5, 7) and found.sum() == 1000
    assert found.diagonal(2).sum() == 1000  # every scene one column to the right of its own


def test_groups_of_a_margin_hold_every_source_once(scenes: Scenes, truth: Sources) -> None:
    bound = some_bound(truth)
    scores = score(around(truth, bound), truth, bound)
    made = group_scores(scores, list(groups(scores.true, scenes.snr_db, truth.range_m)), None)
    (whole,) = of_axis(made)
    assert whole["true_sources"] == int(truth.count.sum()) and whole["scenes"] == 1000
    for axes in (["snr_db"], ["sources"], ["range_m"], ["snr_db", "sources"], ["snr_db", "sources", "range_m"]):
        parts = of_axis(made, *axes)
        for key in ("true_sources", "matched"):
            assert sum(part[key] for part in parts) == whole[key]
        square = sum(part["metrics"]["rmse_range_m"] ** 2 * part["matched"] for part in parts if part["matched"])
        assert math.sqrt(square / whole["matched"]) == pytest.approx(whole["metrics"]["rmse_range_m"])
        assert all(("precision_wide" in part["metrics"]) == ("range_m" not in axes) for part in parts)
    assert [part["sources"] for part in of_axis(made, "sources")] == [1, 2, 3, 4, 5]
    for part in of_axis(made, "range_m"):
        low, high = part["range_m"]
        inside = truth.active & (truth.range_m >= low) & (truth.range_m < high)
        assert part["true_sources"] == int(inside.sum())


def means(values: torch.Tensor, root: bool = False, names: tuple[str, ...] = ("x",)) -> Ratios:
    """Means of the rows, or the roots of these."""
    return Ratios(
        names, values, torch.ones_like(values), torch.tensor([root] * len(values)), torch.arange(values.shape[1])
    )


def test_bootstrap_repeats_bit_for_bit() -> None:
    ratio = means(torch.rand(1, 60, generator=torch.Generator().manual_seed(0)).double())
    assert Bootstrap(60, seed=4).intervals(ratio) == Bootstrap(60, seed=4).intervals(ratio)
    assert Bootstrap(60, seed=4).intervals(ratio) != Bootstrap(60, seed=5).intervals(ratio)


@pytest.mark.parametrize("root", [False, True])
def test_bootstrap_interval_covers_the_true_value(root: bool) -> None:
    """Mean and root of means of squares of 200 scenes, 400 times: 95 % within four standard errors, less what the
    percentiles of a skewed statistic lose."""
    trials = 400
    values = torch.randn(trials, 200, generator=torch.Generator().manual_seed(1)).double().square()  # mean 1, root 1
    intervals = Bootstrap(200, resamples=400).intervals(means(values, root, tuple(map(str, range(trials)))))
    covered = [low <= 1.0 <= high for low, high in intervals.values()]
    assert 0.95 - 0.02 - 4 * math.sqrt(0.95 * 0.05 / trials) < sum(covered) / trials < 0.995


def test_bootstrap_of_nothing_is_not_a_number() -> None:
    nothing = means(torch.zeros(1, 5).double())._replace(below=torch.zeros(1, 5).double())
    assert all(math.isnan(each) for each in Bootstrap(5).intervals(nothing)["x"])
