"""Faults in several processes are named at the step where they show, with the rank that has them; healthy ranks are
silent."""

from __future__ import annotations

import pytest

from bench.faults import ranks
from bench.faults.ranks import FAULTS, HEALTHY, STOPPED, found_by, judged


@pytest.mark.slow
def test_two_ranks_name_every_planted_fault() -> None:
    found = found_by(2)
    assert set(found) == {*FAULTS, *HEALTHY, STOPPED}
    missed = {name: found[name][:1] for name in FAULTS if not all(judged(name, found[name], 2))}
    assert not missed
    for name, (_, allowed) in HEALTHY.items():
        assert {each["cause"] for each in found[name]} == allowed, name
    assert found[STOPPED] == [{"cause": "rank_gradient_missing", "step": 1, "evidence": ""}] * 2


def test_every_rank_fault_has_a_cause_of_its_own_page() -> None:
    from ris_fast.health.causes import CAUSES

    assert {each.expect for each in FAULTS.values()} <= CAUSES.keys() and len(FAULTS) >= 16
    assert ranks.everyone(2) == "ranks 0 and 1"
