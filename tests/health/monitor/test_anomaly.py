"""The failing step replayed: the term and the operation that made the first value that is not finite."""

from __future__ import annotations

import torch

from bench.faults.healthy_twins import TWINS
from ris_fast.health.monitor.nan_replay import replay
from ris_fast.training.trainer import Trainer


def test_a_finite_step_has_no_culprit() -> None:
    assert replay(Trainer(TWINS["hybrid"]())) == []


def test_the_term_and_the_operation_are_named_and_nothing_is_changed(monkeypatch) -> None:
    from ris_fast.training import loss_terms as terms

    right = terms.chamfer
    monkeypatch.setattr(terms, "chamfer", lambda gaps, active: right(gaps, active) + (0.0 * gaps).sum((1, 2, 3)).sqrt())
    trainer = Trainer(TWINS["hybrid"]())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    culprits = replay(trainer)
    assert [(culprit.term, culprit.operation) for culprit in culprits] == [("chamfer", "MulBackward0")]
    assert "test_anomaly.py" in culprits[0].place and "term chamfer" in str(culprits[0])
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_culprit_outside_of_the_table_is_seen() -> None:
    trainer = Trainer(TWINS["hybrid"]())
    forward = trainer.loss.forward

    def with_secret(prediction, scenes):
        total, raw = forward(prediction, scenes)
        return total + (0.0 * prediction.factor).square().sum().sqrt(), raw

    trainer.loss.forward = with_secret
    assert [culprit.term for culprit in replay(trainer)] == ["outside the named terms"]
