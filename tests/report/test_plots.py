"""Figures hold what they claim: every series, every baseline at its height, and survive numbers that are not finite."""

from __future__ import annotations

import math

import pytest
from matplotlib.image import imread

from ris_fast.report.evaluation_plots import evaluation_figure
from ris_fast.report.eventlog import JsonlReport, current_rows
from ris_fast.report.plots import PlotReport, loss_figure
from ris_fast.report.style import alike

BASELINES = {"zero": 1.0, "identity": 0.987, "mean": 0.978}


def rows(epochs: int = 3) -> list[dict[str, object]]:
    out: list[dict[str, object]] = []
    for epoch in range(1, epochs + 1):
        common = {"step": 10 * epoch, "scenes_seen": 160 * epoch, "train_loss": 1.0 / epoch, "grad_norm": 0.5}
        out += [
            {"event": "step", **common},
            {"event": "epoch", "epoch": epoch, "val_nmse_raw": 1.1 / epoch, "val_nmse_ema": 1.2 / epoch, **common},
        ]
    return out


def lines(figure) -> dict[str, object]:
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_loss_figure_draws_every_series_and_baseline() -> None:
    drawn = lines(loss_figure(rows(), BASELINES))
    assert list(drawn["validation, averaged weights"].get_xdata()) == [160, 320, 480]
    assert list(drawn["validation, raw weights"].get_ydata()) == pytest.approx([1.1, 0.55, 1.1 / 3])
    assert set(drawn["baselines zero 1.00, identity 0.987, mean 0.978"].get_ydata()) == {0.978}
    assert loss_figure(rows(), BASELINES).axes[0].get_yscale() == "log"


def test_loss_figure_leaves_out_values_it_cannot_draw() -> None:
    broken = rows()
    broken[1]["val_nmse_raw"] = math.nan
    broken[3]["val_nmse_raw"] = None
    assert list(lines(loss_figure(broken, BASELINES))["validation, raw weights"].get_xdata()) == [480]


def test_plot_report_continues_the_picture_of_a_resumed_run(tmp_path) -> None:
    log = JsonlReport(tmp_path)
    for row in rows():
        (log.on_log if row["event"] == "step" else log.on_epoch_end)(row)
    report = PlotReport(tmp_path)
    report.on_train_start({"baselines": BASELINES})
    report.on_log({**rows()[2], "train_loss": 0.1})
    drawn = lines(loss_figure(current_rows(report.rows), BASELINES))["training loss"]
    assert list(drawn.get_xdata()) == [160, 320] and list(drawn.get_ydata()) == [1.0, 0.1]
    report.on_train_end({})
    assert imread(tmp_path / "plots" / "loss.png").shape[:2] == (930, 1200)


def test_plot_report_draws_an_empty_run(tmp_path) -> None:
    report = PlotReport(tmp_path)
    report.on_train_start({"baselines": BASELINES})
    report.on_train_end({})
    assert (tmp_path / "plots" / "loss.png").stat().st_size > 1000


def test_evaluation_figure_shows_baselines_and_mmse_bound() -> None:
    group = {"nmse": {"mean": 0.3, "median": 0.2}, "baselines": BASELINES, "mmse_bound": 0.02}
    result = {
        "model": "backprojection",
        "scenes": 8,
        "nmse": {"mean": 0.3, "median": 0.2},
        "by_snr": [{"snr_db": (-5.0, 0.0), **group}],
        "by_count": [{"sources": 2, **group}],
    }
    labels = lines(evaluation_figure({"network": result}))
    assert {"zero / identity / mean", "network, mean", "network, median", "MMSE bound, estimated"} <= set(labels)
    assert list(labels["MMSE bound, estimated"].get_ydata()) == [0.02]


@pytest.mark.parametrize(
    "baselines, span, expected",
    [
        (BASELINES, (0.01, 1.0), [["zero", "identity", "mean"]]),
        (BASELINES | {"pursuit": 0.026}, (0.01, 1.0), [["zero", "identity", "mean"], ["pursuit"]]),
        ({"zero": 1.0, "identity": 0.895, "mean": 0.844}, (0.4, 1.2), [["zero"], ["identity"], ["mean"]]),
        ({"zero": 1.0, "mean": math.nan}, (0.4, 1.2), [["zero"]]),
        ({"zero": [1.0, 1.0], "mean": [0.99, 0.5]}, (0.01, 1.0), [["zero"], ["mean"]]),
    ],
)
def test_alike_groups_baselines_too_close_to_see(baselines, span, expected) -> None:
    assert alike(baselines, span) == expected


@pytest.mark.parametrize("norms", [(0.5, 0.5, 0.5), (0.90, 0.91, 0.92), (0.61, 0.74, 0.89), (1e-3, 1.0, 50.0)])
def test_loss_figure_axes_always_have_numbers(norms: tuple[float, ...]) -> None:
    drawn = rows()
    for row in drawn:
        row["grad_norm"] = norms[row["step"] // 10 - 1]
    figure = loss_figure(drawn, BASELINES)
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        shown = {label.get_text() for label, at in zip(axes.get_yticklabels(), axes.get_yticks()) if low <= at <= high}
        assert len(shown - {""}) >= 2


def test_figure_legends_cover_no_curve() -> None:
    group = {"nmse": {"mean": 0.3, "median": 0.2}, "baselines": BASELINES, "mmse_bound": 0.02}
    result = {
        "model": "m",
        "scenes": 8,
        **group,
        "by_snr": [{"snr_db": (-5.0, 0.0), **group}],
        "by_count": [{"sources": 2, **group}],
    }
    evaluated = evaluation_figure({"network": result})
    for figure in (loss_figure(rows(), BASELINES), evaluated):
        figure.canvas.draw()
        (legend,) = figure.legends
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
        assert len(legend.get_texts()) >= 4 and all(axes.get_legend() is None for axes in figure.axes)
