"""What is printed: the epoch line to the letter, baselines with their meaning, plain text in a file, a bar on a
terminal."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from ris_fast.health.causes import CAUSES
from ris_fast.report.console import ConsoleReport, counter, epoch_line, share_done, validation

INFO = {
    "preset": "laptop",
    "model": "backprojection",
    "parameters": 10_812_345,
    "device": "cpu",
    "precision": "fp32",
    "train_scenes": 16_000,
    "batch_size": 256,
    "accumulate": 2,
    "epochs": 30,
    "max_seconds": 270.0,
    "planned_steps": 100,
    "baselines": {"zero": 1.0, "identity": 0.987, "mean": 0.978},
}
ROW = {
    "event": "epoch",
    "epoch": 1,
    "epochs": 30,
    "step": 50,
    "scenes_seen": 16_000,
    "seconds": 10.5,
    "train_loss": 0.806,
    "val_nmse_raw": 1.921,
    "val_nmse_ema": 1.95,
    "grad_norm": 0.83,
    "clipped": 0.03,
    "skipped": 0.0,
    "scenes_per_s": 1520.0,
    "lr": {"backbone": 1e-3, "head": 1e-3},
    "loss_scale": None,
}
SUMMARY = {
    "verdict": "learned",
    "best_val_nmse": 0.3,
    "baselines": INFO["baselines"],
    "optimizer_steps": 100,
    "scenes_seen": 32_000,
    "seconds": 21.0,
    "scenes_per_s": 1520.0,
    "findings": ["warm-up-too-long"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def transcript(stream: io.StringIO) -> str:
    report = ConsoleReport(stream)
    report.on_train_start(INFO)
    report.on_log(ROW)
    report.on_epoch_end(ROW)
    report.on_epoch_end({**ROW, "epoch": 2, "step": 100, "val_nmse_raw": 0.3})
    report.on_train_end(SUMMARY)
    return stream.getvalue()


def test_epoch_line_to_the_letter() -> None:
    assert (
        epoch_line(ROW)
        == "Epoch 001/030: train 0.806  val 1.921  raw 1.921 ema 1.950  |g| 0.83  clipped 3%  skipped 0%  1520 scenes/s"
    )


def test_epoch_line_shows_three_significant_digits() -> None:
    said = [
        epoch_line({**ROW, "val_nmse_raw": score, "val_nmse_ema": None, "train_loss": 0.02})
        for score in (0.02034, 0.02016, 0.00198)
    ]
    assert [line.split("  ")[1] for line in said] == [
        "val 0.0203",
        "val 0.0202",
        "val 0.00198",
    ] and "train 0.0200 " in said[0]


@pytest.mark.parametrize(
    "raw, ema, expected", [(1.0, 0.5, 0.5), (0.4, None, 0.4), (math.nan, 0.7, 0.7), (0.6, math.inf, 0.6)]
)
def test_validation_is_the_better_of_raw_and_ema(raw, ema, expected) -> None:
    assert validation({"val_nmse_raw": raw, "val_nmse_ema": ema}) == expected


def test_epoch_line_says_nan_when_both_scores_are() -> None:
    line = epoch_line({**ROW, "val_nmse_raw": math.nan, "val_nmse_ema": math.nan})
    assert "val nan  raw nan ema nan" in line


def test_console_report_writes_plain_lines_to_a_file() -> None:
    text = transcript(io.StringIO())
    assert "\x1b" not in text and "\r" not in text
    assert epoch_line(ROW) in text.splitlines()
    assert "10,812,345 parameters" in text and "accumulated 2" in text and "at most 270 s" in text


def test_console_report_explains_baselines_and_outcome() -> None:
    text = transcript(io.StringIO())
    assert "  mean      0.978  the mean training covariance, about the best answer that ignores the input" in text
    assert (
        "learned: best validation NMSE 0.300, below the constant answer (0.978); passed: several sources are seen"
        in text
    )
    assert "warm-up-too-long" in text


@pytest.mark.parametrize(
    "best, baselines, start, said",
    [
        (
            0.0266,
            {"mean": 0.79, "pursuit": 0.0256},
            0.9,
            (
                "0.0266 is below every constant answer (0.79) but not better than pursuit, 0.0256, which the network's"
                " inputs give"
            ),
        ),
        (
            0.640,
            {"mean": 0.98, "pursuit": 0.645},
            0.99,
            "0.64 is below every constant answer (0.98) but not clearly better than pursuit, 0.645",
        ),
        (0.883, {"mean": 0.986, "matched_filter": 0.803}, 0.99, "but not better than matched filter, 0.803"),
        (0.81, {"zero": 1.0, "mean": 0.79, "pursuit": 0.03}, 0.9, "0.81 is no better than the constant answer (0.79)"),
        (0.78, {"mean": 0.79}, 0.9, "0.78 is not clearly below the constant answer (0.79): train longer"),
        (0.40, {"mean": 0.79}, 0.41, "not clearly below what the network scored before its first step (0.41)"),
        (None, {"mean": 0.79}, 0.9, "not measured"),
    ],
)
def test_console_report_explains_a_stall(best, baselines, start, said) -> None:
    stream = io.StringIO()
    ConsoleReport(stream).on_train_end(
        {**SUMMARY, "verdict": "stalled", "best_val_nmse": best, "baselines": baselines, "initial_val_nmse": start}
    )
    first = stream.getvalue().splitlines()[0]
    assert first.startswith("stalled: best validation NMSE ") and said in first


def test_console_report_says_that_a_run_stands_still_above_its_inputs() -> None:
    """Preset `original` as it stood at 0.856: "train longer" would be wrong."""
    stream, found = io.StringIO(), "stalled_above_inputs"
    ended = {"verdict": "stalled", "best_val_nmse": 0.856, "baselines": {"mean": 0.98, "matched_filter": 0.8}}
    ConsoleReport(stream).on_train_end({**SUMMARY, **ended, "findings": [found]})
    said = stream.getvalue()
    assert "not better than matched filter, 0.8, which the network's inputs give without it: it stands still" in said
    assert found in CAUSES and f"findings, most certain first: {found}" in said


def test_console_report_shows_the_mmse_bound_of_the_scenes() -> None:
    stream = io.StringIO()
    report = ConsoleReport(stream)
    report.on_train_start({**INFO, "mmse_bound": 0.0161})
    report.on_train_end({**SUMMARY, "best_val_nmse": 0.0180, "mmse_bound": 0.0161})
    said = stream.getvalue()
    assert "  MMSE bound 0.0161  about what the best possible estimator" in said
    assert "passed: near blind maximum likelihood; 1.12 times the MMSE bound of these scenes (0.0161)" in said


def test_console_report_explains_the_peak_matmul_rate_once() -> None:
    stream = io.StringIO()
    ConsoleReport(stream).on_train_start({**INFO, "peak_matmul_flop_per_s": 143.4e9})
    (line,) = [line for line in stream.getvalue().splitlines() if "peak matmul rate" in line]
    assert line.startswith("the peak matmul rate: 143 GFLOP/s, one large fp32 matrix product on this machine")
    assert "peak matmul rate" not in transcript(io.StringIO())


def test_console_report_hides_milestones_for_another_task() -> None:
    stream = io.StringIO()
    report = ConsoleReport(stream, standard_task=False)
    report.on_train_start(INFO)
    report.on_train_end(SUMMARY)
    assert "Bayes" not in stream.getvalue() and "passed" not in stream.getvalue()


def test_console_report_draws_a_coloured_bar_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = transcript(Terminal())
    assert "epoch 1/30" in text and "\x1b[1;32m" in text
    assert "left 0:00:10" in text or "left 0:00:11" in text  # 50 of 100 steps took 10.5 s


def test_console_report_respects_no_color(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    text = transcript(Terminal())
    assert "epoch 1/30" in text and "\x1b[1;32m" not in text and "\x1b[32m" not in text and "[38;" not in text


def test_console_report_keeps_forced_colour_out_of_a_file(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in transcript(io.StringIO())


def test_console_report_prints_notes_of_the_data() -> None:
    stream = io.StringIO()
    ConsoleReport(stream).on_train_start({**INFO, "notes": ["no H_full in the files"]})
    assert "note: no H_full in the files" in stream.getvalue().splitlines()


def test_counter_counts_on_a_terminal_and_not_in_a_file() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        show = counter("scenes", stream)
        show(1000, 2000)
        show(2000, 2000)
    half, whole = terminal.getvalue().split("\r\x1b[2K")[1:]
    assert half == f"scenes [{'=' * 12}{' ' * 12}] 1,000 of 2,000, 0 s left"
    assert whole == f"scenes [{'=' * 24}] 2,000 of 2,000\n" and file.getvalue() == ""


def test_console_report_takes_a_best_nmse_of_none() -> None:
    stream = io.StringIO()
    ConsoleReport(stream).on_train_end({**SUMMARY, "verdict": "stopped", "best_val_nmse": None})
    assert "stopped: best validation NMSE not measured" in stream.getvalue()


def test_share_done_follows_whichever_limit_comes_first() -> None:
    assert share_done({"step": 50, "seconds": 10.0}, {"planned_steps": 100, "max_seconds": 12.5}) == 0.8
    assert share_done({"step": 50, "seconds": 10.0}, {"planned_steps": 100, "max_seconds": 0}) == 0.5
    assert share_done({"step": 50, "seconds": 10.0}, {}) == 0.0


def test_console_report_shows_a_finding_at_once_and_at_the_end(monkeypatch) -> None:
    from ris_fast.health.finding import Finding

    monkeypatch.setenv("TERM", "xterm")
    finding = Finding("learning_rate_too_small", "the median tensor moves by 1e-12.", 8)
    for stream in (Terminal(), io.StringIO()):
        report = ConsoleReport(stream, run=Path("runs/my run"))
        report.on_train_start(INFO)
        report.on_log(ROW)
        report.found(finding)
        shown = stream.getvalue()
        assert "found at step 8: learning_rate_too_small: the median tensor moves by 1e-12." in shown
        assert f"fix: {finding.advice}" in shown and "ris-fast why --explain learning_rate_too_small" in shown
        assert not stream.isatty() or shown.rindex("epoch 1/30") > shown.index(
            "found at"
        )  # the bar is drawn again below
        report.on_train_end({**SUMMARY, "findings": [finding.cause], "evidence": [finding.to_json()]})
        last = stream.getvalue()[len(shown) :]
        assert "seen: the median tensor" in last and "fix: " in last and "more: ris-fast why 'runs/my run'" in last


def test_console_report_says_that_a_run_lost_what_it_learned() -> None:
    stream = io.StringIO()
    ConsoleReport(stream).on_train_end(
        {**SUMMARY, "findings": ["collapsed"], "val_nmse_raw": 2.31, "val_nmse_ema": math.nan}
    )
    assert "lost again: the last validation NMSE is 2.31" in stream.getvalue().splitlines()[1]
