"""The figure of `ris-fast mismatch` tells its series apart, and calls runs by their names."""

from __future__ import annotations

from itertools import combinations

from ris_fast.report.mismatch import mismatch_figure, mismatch_text

RESULT = {
    "runs": ["r_plain", "r_spher"],
    "base": {},
    "tests": [
        {
            "test": {},
            "data": None,
            "scenes": 9,
            "mmse_bound": None,
            "runs": {
                name: {
                    "trained": name == "r_plain",
                    "nmse": {"mean": nmse, "median": nmse},
                    "baselines": {"mean": 0.98, "pursuit": 2 * nmse, "lmmse": 3 * nmse, "matched_filter": 0.8},
                }
                for name, nmse in (("r_plain", 0.1), ("r_spher", 0.2))
            },
        }
    ],
}
NAMES = ["pursuit", "LMMSE", "matched filter", "pursuit of r_spher", "LMMSE of r_spher", "r_plain", "r_spher"]


def test_mismatch_figure_gives_each_series_a_marker_of_its_own() -> None:
    lines = [line for line in mismatch_figure(RESULT).axes[0].get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == NAMES
    assert all(one.get_marker() != other.get_marker() for one, other in combinations(lines, 2))


def test_mismatch_table_has_the_same_names() -> None:
    text = mismatch_text(RESULT)
    assert all(name in text for name in NAMES)
