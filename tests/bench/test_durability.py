"""A sample of the durability campaign: some of its trials, each verdict as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.durability import access, damage, kills
from bench.durability.processes import Server
from bench.durability.tasks import MODES, Prepared, prepare
from bench.durability.trial import CONTINUED, SAID, Outcome, Part, Trial

MODE = "shards"
SAMPLE = [
    (kills.PARTS[0], list(MODES).index(MODE) + len(MODES)),
    (kills.PARTS[1], 1),
    *((part, 1) for part in damage.PARTS),  # number 1 of each has the mode "shards" or none
    (access.PARTS[0], 18),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Prepared]]:
    server = Server()
    yield server, prepare(tmp_path_factory.mktemp("durability") / "prepared", server, only=(MODE,))
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("part, number", SAMPLE, ids=[f"{part.name} {number}" for part, number in SAMPLE])
def test_trial_of_the_campaign_loses_nothing(
    part: Part, number: int, prepared: tuple[Server, Prepared], tmp_path: Path
) -> None:
    server, made = prepared
    trial = Trial(number, 0, tmp_path / "trial", [server], made)
    outcome: Outcome = part.trial(trial)
    assert outcome.verdict in (CONTINUED, SAID), (outcome, trial.story)
