"""Words match figures; tables line up."""

from __future__ import annotations

import math

import pytest

from ris_fast.report.baselines import baseline_lines, judge
from ris_fast.report.tables import text_table


@pytest.mark.parametrize(
    "nmse, words",
    [
        (1.9, "no better than"),
        (0.978, "no better than"),
        (0.9, "below"),
        (0.3, "several sources"),
        (math.nan, "not a number"),
        (None, "not measured"),
    ],
)
def test_judge_compares_with_the_constant_answer(nmse, words: str) -> None:
    assert words in judge(nmse, {"zero": 1.0, "mean": 0.978})


def test_judge_says_how_far_above_the_mmse_bound_and_never_that_it_passed_it() -> None:
    said = judge(0.0180, {"mean": 0.978, "pursuit": 0.0256}, mmse_bound=0.0161)
    assert said == (
        "0.0180, below the constant answer (0.978); passed: near blind maximum likelihood; 1.12 times the MMSE bound of"
        " these scenes (0.0161)"
    )
    for nmse in (0.5, 0.0161, 0.001):
        said = judge(nmse, {"mean": 0.978}, mmse_bound=0.0161)
        assert "bound" not in said.partition("passed: ")[2].partition(";")[0] and said.count("bound") == 1
    assert "bound" not in judge(0.018, {"mean": 0.978}) and "bound" not in judge(0.99, {"mean": 0.978}, mmse_bound=0.01)


def test_judge_names_what_the_inputs_say_without_the_network() -> None:
    said = judge(0.856, {"mean": 0.98, "matched_filter": 0.8, "pursuit": 0.0256})
    assert said.startswith(
        "0.856, below the constant answer (0.980); not below the matched filter (0.800), not below the pursuit (0.0256)"
    )


def test_baseline_lines_show_the_mmse_bound_behind_the_baselines() -> None:
    lines = baseline_lines({"zero": 1.0, "matched_filter": 0.8}, 0.0161)
    assert [line.split("  ")[1] for line in lines] == ["zero", "matched filter", "MMSE bound"]
    assert "0.0161  about what the best possible estimator" in lines[-1] and len(baseline_lines({"zero": 1.0})) == 1


def test_text_table_aligns_numbers_to_the_right() -> None:
    table = text_table(["name", "NMSE", "scenes"], [["a", 0.123456, 1200], ["longer", None, 3]])
    assert table.splitlines() == [
        "name      NMSE  scenes",
        "------  ------  ------",
        "a       0.1235   1,200",
        "longer       -       3",
    ]
