"""Settings read again: a change that nobody announced is said, one that a callback announces is not."""

from __future__ import annotations

from collections.abc import Callable as Function
from typing import Any

import pytest
from torch import nn

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.health.finding import ranked
from ris_fast.health.monitor.rules import replay
from ris_fast.training.callback import Callback
from ris_fast.training.trainer import Trainer
from tests.health.monitor.test_rules import Recorder

STEPS = 3


class Changing(Callback):
    """Calls `change(trainer)` before the step of this number."""

    def __init__(self, change: Function[[Trainer], Any], at: int = 10) -> None:
        self.change, self.at, self.made = change, at, 0

    def on_step_start(self) -> None:
        self.made += 1
        if self.made == self.at:
            self.change(self.trainer)


class Announced(Changing):
    changes = ("loss.", "optimizer.", "frozen", "dropout")


def findings(callback: Changing, twin: str = "hybrid", **settings: Any) -> list[tuple[str, bool, str]]:
    config = changed(TWINS[twin](), {"training.epochs": STEPS, **settings})
    recorder = Recorder()
    trainer = callback.trainer = Trainer(config, callbacks=[callback, recorder])
    trainer.fit()
    return [(each.cause, each.certain, each.evidence) for each in ranked(replay(recorder.run))]


def halve(trainer: Trainer) -> None:
    trainer.loss.weights["cov"] *= 0.5


def freeze(trainer: Trainer) -> None:
    for parameter in trainer.model.blocks.parameters():
        parameter.requires_grad_(False)


def reclip(trainer: Trainer) -> None:
    trainer.optimizer.max_grad_norm = 0.25


def redecay(trainer: Trainer) -> None:
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.05


def redrop(trainer: Trainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        elif hasattr(module, "dropout"):
            module.dropout = 0.3


CHANGES = {
    "loss.cov from": halve,
    "became frozen": freeze,
    "optimizer.max_grad_norm from": reclip,
    "optimizer.weight_decay of backbone from": redecay,
}


@pytest.mark.parametrize("said", CHANGES)
def test_settings_changed_says_what_changed_unless_a_callback_announces_it(said: str) -> None:
    found = findings(Changing(CHANGES[said]))
    assert [each[:2] for each in found if each[0] == "settings_changed"] == [("settings_changed", False)]
    assert said in next(evidence for cause, _, evidence in found if cause == "settings_changed")
    assert "settings_changed" not in [each[0] for each in findings(Announced(CHANGES[said]))]


def test_settings_changed_sees_a_dropout_rate() -> None:
    found = findings(Changing(redrop), "dropout")
    assert any(cause == "settings_changed" and "to 0.3" in evidence for cause, _, evidence in found)


def test_zero_loss_weight_is_certain_where_no_term_tells_the_truth() -> None:
    def blind(trainer: Trainer) -> None:
        trainer.loss.weights.update(dict.fromkeys(("cov", "cov_pred", "subspace"), 0.0))

    assert ("zero_loss_weight", True) in [each[:2] for each in findings(Changing(blind))]


def test_frozen_parameters_named_in_health_frozen_are_meant() -> None:
    def frozen(meant: str) -> list[str]:
        trainer = Trainer(
            changed(TWINS["hybrid"](), {"training.epochs": 1, "health.frozen": meant}), callbacks=[seen := Recorder()]
        )
        freeze(trainer)
        trainer.fit()
        return [each.cause for each in replay(seen.run)]

    assert "frozen_parameters" in frozen("") and "frozen_parameters" not in frozen("blocks.")
