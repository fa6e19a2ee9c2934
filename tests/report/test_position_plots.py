"""Figures of positions hold what they claim, on axes with numbers, in series that grey print tells apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from ris_fast.commands.position_figures import Found, position_figures
from ris_fast.localize.angle_map import AngleMap
from ris_fast.localize.matching import WIDE
from ris_fast.localize.sources import Sources
from ris_fast.report.evaluation import figures
from ris_fast.report.position_plots import bound_shares, count_figure, error_figure, percent, rmse_figure, shares_below
from ris_fast.report.scene_plot import Example, scene_figure
from ris_fast.report.style import LOOKS, save
from tests.localize.made_up import around, some_bound, some_scenes


@pytest.fixture(scope="module")
def made():
    """Figures and scores of two estimators of 300 scenes, the second one with a source too few in each."""
    scenes = some_scenes(300)
    truth = Sources.of_scenes(scenes)
    bound = some_bound(truth)
    estimates = {"network": around(truth, bound), "other": around(truth, bound, 5)}
    estimates["other"] = estimates["other"]._replace(count=truth.count - 1)
    return position_figures(Found(truth, bound, scenes.snr_db, estimates, {}, dict.fromkeys(estimates, 1.0)), "words")


def test_rmse_figure_draws_each_estimator_and_the_bound(made) -> None:
    estimators = made[0]["estimators"]
    figure = rmse_figure(estimators)
    groups = [
        group for group in estimators["other"]["groups"] if set(group) & {"snr_db", "sources", "range_m"} == {"snr_db"}
    ]
    for axes, name in zip(figure.axes, ("azimuth_deg", "elevation_deg", "range_m")):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        assert set(lines) == {"network", "other", "Cramer-Rao bound"}
        assert lines["other"] == [group["metrics"][f"resolvable_rmse_{name}"] for group in groups]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["-5..0", "0..5", "5..10", "10..15", "15..20"]


def test_error_curves_rise_to_the_recall(made) -> None:
    results, scores = made
    for axes in error_figure(scores).axes:
        for line in axes.get_lines()[:2]:
            recall = results["estimators"][line.get_label()]["groups"][0]["metrics"]["recall_wide"]
            height = np.asarray(line.get_ydata())
            assert (np.diff(height) >= 0).all() and height[-1] == pytest.approx(recall)


def test_shares_below_counts_errors_and_lost_sources() -> None:
    errors = torch.tensor([0.1, 0.2, torch.nan, 0.4], dtype=torch.float64)
    assert shares_below(errors, np.array([0.05, 0.1, 0.3, 9.0])).tolist() == [0.0, 0.25, 0.5, 0.75]


def test_bound_shares_end_at_the_bounds_recall(made) -> None:
    results, scores = made
    bound = scores["network"].bound[scores["network"].true]
    expected = results["estimators"]["network"]["groups"][0]["metrics"]["bound_recall_wide"]
    for column, widest in enumerate(WIDE):
        shares = bound_shares(bound, column, np.array([widest / 1e6, widest / 100, widest]))
        assert (np.diff(shares) > 0).all() and shares[-1] == pytest.approx(expected)


def test_count_figure_shows_all_scenes_of_each_row(made) -> None:
    right, wrong = count_figure(made[1]).axes
    assert [text.get_text() for text in right.texts] == ["100"] * 5
    assert [text.get_position() for text in wrong.texts] == [(each, each) for each in range(5)]  # one too few
    assert "100 % right" in right.get_title() and wrong.get_title() == "other: 0 % right"


def test_count_figure_of_one_has_its_title_whole_and_a_runs_name_as_it_is(made) -> None:
    figure = count_figure({"my_first_run": made[1]["network"]})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_title().startswith("my_first_run: ")
    for text in (figure._suptitle, axes.title):
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize("share, text", [(0.0, "0"), (1.0, "100"), (0.9999, "99.9"), (0.5, "50.0"), (0.0001, "<0.1")])
def test_percent_never_rounds_to_all_or_none(share: float, text: str) -> None:
    assert percent(share) == text


def test_looks_are_told_apart_without_colour() -> None:
    assert all(one.marker != other.marker and one.line != other.line for one, other in combinations(LOOKS, 2))


def example() -> Example:
    truth = Sources.of_scenes(some_scenes(20))
    row = int((truth.count == 3).nonzero()[0])
    one = truth.take(slice(row, row + 1))
    angles = torch.linspace(-1, 1, 13), torch.linspace(-0.5, 0.5, 7)
    spectrum = AngleMap(*angles, 1 + torch.rand(7, 13), torch.ones(7, 13))
    return Example(row, 12.5, spectrum, one, one)


def test_scene_figure_marks_true_and_found_sources_alike() -> None:
    figure = scene_figure(example())
    left, right, _ = figure.axes
    for axes in (left, right):
        true, found = axes.get_lines()
        assert (true.get_label(), found.get_label()) == ("true source", "found source")
        assert len(true.get_xdata()) == 3 and np.array_equal(true.get_xydata(), found.get_xydata())
    assert "3 sources at 12.5 dB" in figure.get_suptitle()


def test_every_axis_has_numbers_and_no_legend_covers_a_curve(made) -> None:
    for figure in (rmse_figure(made[0]["estimators"]), error_figure(made[1]), scene_figure(example())):
        figure.canvas.draw()
        (legend,) = figure.legends
        for axes in figure.axes:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
            for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
                shown = {tick.get_text() for tick in ticks if tick.get_visible()} - {""}
                assert (
                    len(shown) >= 2 or axes.get_shared_y_axes().get_siblings(axes) != [axes] or axes is figure.axes[-1]
                )


def test_x_labels_do_not_touch(made) -> None:
    for figure in (rmse_figure(made[0]["estimators"]), error_figure(made[1])):
        figure.canvas.draw()
        for axes in figure.axes:
            low, high = axes.get_xlim()
            boxes = [
                tick.get_window_extent()
                for tick, at in zip(axes.get_xticklabels(), axes.get_xticks())
                if low <= at <= high
            ]
            assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:]))


def test_figures_are_saved_as_png_and_as_vectors(made, tmp_path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        save(rmse_figure(made[0]["estimators"]), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    save(rmse_figure(made[0]["estimators"]), tmp_path / "b.pdf")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()  # no date in it


def test_figures_without_positions_are_those_of_the_nmse() -> None:
    group = {"scenes": 8, "nmse": {"mean": 0.3, "median": 0.2}, "baselines": {"zero": 1.0}, "mmse_bound": None}
    entries = {"by_snr": [{"snr_db": (-5.0, 0.0), **group}], "by_count": [{"sources": 2, **group}]}
    result = {"model": "m", "positions": None, **group, **entries}
    assert list(figures({"run": result}, {}, None)) == [""]
    both = figures({"one": result, "two": result}, {}, None)[""]
    assert {"one, mean", "two, mean"} <= {line.get_label() for line in both.axes[0].get_lines()}
