"""The failing step replayed: the term and the operation that made the first value that is not finite."""

from __future__ import annotations

import pytest
import torch

from bench.faults.healthy_twins import TWINS
from ris_fast.health.monitor.nan_replay import replay
from ris_fast.training.trainer import Trainer


def test_nan_replay_finds_no_culprit_in_a_finite_step() -> None:
    assert replay(Trainer(TWINS["hybrid"]())) == []


def test_nan_replay_names_term_and_operation(monkeypatch) -> None:
    from ris_fast.training import loss_terms as terms

    right = terms.chamfer
    monkeypatch.setattr(terms, "chamfer", lambda gaps, active: right(gaps, active) + (0.0 * gaps).sum((1, 2, 3)).sqrt())
    trainer = Trainer(TWINS["hybrid"]())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    culprits = replay(trainer)
    assert [(culprit.term, culprit.operation) for culprit in culprits] == [("chamfer", "MulBackward0")]
    assert "test_nan_replay.py" in culprits[0].place and "term chamfer" in str(culprits[0])
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.slow
def test_nan_replay_sees_a_culprit_outside_the_terms() -> None:
    trainer = Trainer(TWINS["hybrid"]())
    forward = trainer.loss.forward

    def with_secret(prediction, scenes):
        total, raw = forward(prediction, scenes)
        return total + (0.0 * prediction.factor).square().sum().sqrt(), raw

    trainer.loss.forward = with_secret
    assert [culprit.term for culprit in replay(trainer)] == ["outside the named terms"]
