"""The table of causes: every cause has a page, and findings are reported in the table's order."""

from __future__ import annotations

from pathlib import Path

import pytest

import ris_fast.health.causes
from ris_fast.health.causes import CAUSES, FOLLOWS
from ris_fast.health.finding import Finding, ranked


@pytest.mark.parametrize("name", CAUSES)
def test_cause_page_has_meaning_evidence_and_fix(name: str) -> None:
    cause = CAUSES[name]
    title, meaning, evidence = cause.page.split("\n\n")[:3]
    assert (title, evidence) == (f"# {name}", "## Evidence")
    assert meaning == f"{cause.meaning[0].upper()}{cause.meaning[1:]}." and cause.body.startswith("## Evidence\n\n")
    assert cause.body.count("## ") == 2 and cause.fix
    finding = Finding(name, "seen")
    assert (finding.advice, finding.meaning, finding.severity) == (cause.fix, cause.meaning, cause.level)


def test_cause_pages_are_those_of_the_table() -> None:
    pages = Path(ris_fast.health.causes.__file__).parent / "pages"
    assert sorted(path.stem for path in pages.glob("*")) == sorted(CAUSES)


def test_causes_are_ranked_in_the_order_of_the_table() -> None:
    assert [cause.rank for cause in CAUSES.values()] == list(range(len(CAUSES)))
    levels = list(dict.fromkeys(cause.level for cause in CAUSES.values()))
    assert levels == ["structural", "contract", "gradient", "movement", "outcome"]
    assert sorted(CAUSES.values(), key=lambda cause: levels.index(cause.level)) == list(CAUSES.values())


def test_ranked_puts_certain_first_and_causes_first() -> None:
    order = [
        Finding("ema_cold", ""),
        Finding("unused_head", ""),
        Finding("nonfinite_data", "", certain=False),
        Finding("step_never_called", ""),
        Finding("unused_head", "again"),
    ]
    assert [finding.cause for finding in ranked(order)] == [
        "unused_head",
        "step_never_called",
        "ema_cold",
        "nonfinite_data",
    ]
    assert ranked(order)[0].evidence == ""
    with pytest.raises(ValueError, match="no cause is called"):
        Finding("nonsense", "")


def test_ranked_puts_what_follows_behind_its_cause() -> None:
    assert {*FOLLOWS, *(cause for causes in FOLLOWS.values() for cause in causes)} <= CAUSES.keys()
    certain = [Finding("ema_saved_over_raw", ""), Finding("nonfinite_step", ""), Finding("step_called_twice", "")]
    assert [each.cause for each in ranked(certain)] == ["step_called_twice", "nonfinite_step", "ema_saved_over_raw"]
    doubtful = [Finding("ema_saved_over_raw", ""), Finding("nonfinite_step", "", certain=False)]
    assert [each.cause for each in ranked(doubtful)] == ["ema_saved_over_raw", "nonfinite_step"]


def test_no_two_causes_follow_from_each_other() -> None:
    def before(name: str) -> set[str]:
        found, waiting = set[str](), [name]
        while waiting:
            new = FOLLOWS.get(waiting.pop(), frozenset()) - found
            found, waiting = found | new, [*waiting, *new]
        return found

    assert not [name for name in FOLLOWS if name in before(name)]
