"""The watch attached to a trainer is its last callback and leaves its findings in the summary."""

from __future__ import annotations

import pytest

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.health import watched
from ris_fast.health.monitor.attach import attach_health
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import Recorder


def test_attach_health_adds_its_findings_to_the_summary() -> None:
    config = changed(TWINS["backprojection"](), {"training.epochs": 1})
    told = Recorder()
    trainer = attach_health(Trainer(config, callbacks=[told]), preflight=False)
    watchdog = trainer.callbacks[-1]
    assert isinstance(watchdog, Watchdog) and trainer.callbacks[0] is told
    summary = trainer.fit()
    assert told.summary == summary and summary["ruled_out"]["rules"] == watchdog.ruled_out["rules"] != []
    assert summary["findings"] == [finding.cause for finding in watchdog.findings]
    assert [each["cause"] for each in summary["evidence"]] == summary["findings"]


def test_watched_is_attach_health_with_a_warning() -> None:
    trainer = Trainer(TWINS["backprojection"]())
    with pytest.warns(FutureWarning, match="ris_fast.health.watched is attach_health now"):
        assert watched(trainer, preflight=False) is trainer
    assert isinstance(trainer.callbacks[-1], Watchdog)
