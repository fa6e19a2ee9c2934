"""A stalled run goes through the usual explanations, each ruled out, likely or not looked at by a measurement."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.health.finding import Finding
from ris_fast.health.monitor.attach import attach_health
from ris_fast.health.monitor.explanations import LIKELY, NOT_LOOKED_AT, ORDER, RULED_OUT, explanations
from ris_fast.health.monitor.history import RunHistory
from ris_fast.physics.baseline_names import CONSTANT_BASELINES
from ris_fast.report.console import outcome_lines
from ris_fast.training.trainer import Trainer
from tests.health.monitor.test_rules import Recorder

NOISY = {"task.snr_min_db": -20.0, "task.snr_max_db": -10.0}  # in which a few epochs lead nowhere


@pytest.fixture(scope="module")
def stalled() -> RunHistory:
    recorder = Recorder()
    Trainer(changed(TWINS["hybrid"](), NOISY | {"training.epochs": 4}), callbacks=[recorder]).fit()
    assert recorder.run.summary["verdict"] == "stalled"
    return recorder.run


def said(run: RunHistory) -> dict[str, str]:
    return {each.reason: each.status for each in explanations(run)}


def test_explanations_are_ranked_and_each_says_by_what(stalled: RunHistory) -> None:
    found = explanations(stalled)
    assert [each.status for each in found] == sorted((each.status for each in found), key=ORDER.index)
    assert all(each.by for each in found) and all(each.next for each in found if each.status != RULED_OUT)
    assert said(stalled)["too few scenes, which are memorised"] == RULED_OUT
    assert said(stalled)["a mistake in the data, the network, the loss or the step"] == NOT_LOOKED_AT


def test_explanations_follow_the_measurements(stalled: RunHistory) -> None:
    slow, long, memorising = (deepcopy(stalled) for _ in range(3))
    for row in slow.steps:
        row["health"]["update_ratio"] = 1e-7
    assert said(slow)["the learning rate is too small"] == LIKELY
    for number, row in enumerate(long.epochs):
        row |= {"step": 1000 * (number + 1), "val_nmse_raw": 0.93, "val_nmse_ema": None}
    assert said(long)["the run is too short"] == RULED_OUT
    for number, row in enumerate(long.epochs):
        row["val_nmse_raw"] = 0.97 - 0.1 * math.log2(number + 1)
    assert said(long)["the run is too short"] == LIKELY
    for number, row in enumerate(long.epochs):  # below the constant answer all the while
        row["val_nmse_raw"] = 0.5 - 0.1 * math.log2(number + 1)
    (short,) = (each for each in explanations(long) if each.reason == "the run is too short")
    assert (short.status, short.next) == (LIKELY, "training.epochs times 2") and "is reached" not in short.by
    for row in long.epochs:
        row["val_nmse_raw"] = 0.3
    assert said(long)["the run is too short"] == RULED_OUT
    memorising.info = {**memorising.info, "fresh": False}
    for row in memorising.epochs:
        row["terms"]["cov_pred"]["raw"] = 0.1
    assert said(memorising)["too few scenes, which are memorised"] == LIKELY


def test_nothing_better_is_possible_only_where_no_estimator_is_better(stalled: RunHistory) -> None:
    near = deepcopy(stalled)
    near.summary |= {"mmse_bound": 0.0146, "best_val_nmse": 0.0188}
    assert said(near)["nothing better is possible"] == LIKELY
    near.info = {**near.info, "baselines": {**near.info["baselines"], "pursuit": 0.0167}}
    assert said(near)["nothing better is possible"] == RULED_OUT


def test_noise_is_ruled_out_only_where_more_is_known_to_be_possible(stalled: RunHistory) -> None:
    reason, run = "the noise is too strong", deepcopy(stalled)
    constants = {name: run.info["baselines"][name] for name in CONSTANT_BASELINES if name in run.info["baselines"]}
    for baselines, bound, status in (
        ({"pursuit": 1.9}, None, LIKELY),
        ({"pursuit": 0.3}, None, RULED_OUT),
        ({"pursuit": 1.9}, 0.5, RULED_OUT),
        ({}, 0.95, LIKELY),
        ({}, None, NOT_LOOKED_AT),
    ):
        run.info = {**run.info, "baselines": {**constants, **baselines}, "training_baselines": {}}
        run.summary |= {"mmse_bound": bound}
        assert said(run)[reason] == status


def test_explanations_do_not_repeat_a_finding(stalled: RunHistory) -> None:
    for row in stalled.steps:
        row["health"]["update_ratio"] = 1e-7
    found = explanations(stalled, [Finding("learning_rate_too_small", "seen.")])
    assert [each.cause for each in found].count("learning_rate_too_small") == 1 and found[0].found


def test_a_stalled_run_ends_with_at_most_eight_lines_of_explanations() -> None:
    trainer = attach_health(Trainer(changed(TWINS["hybrid"](), NOISY | {"training.epochs": 2})), preflight=False)
    summary = trainer.fit()
    lines = [line for line in outcome_lines(summary) if line.startswith("  ") and "more: ris-fast" not in line]
    assert 3 <= len(lines) <= 8 and any(line.startswith("  not looked at: ") for line in lines)
    assert len(summary["explanations"]) > len(lines)
