"""Rules over the epochs and the end of a run: what a collapse, a gap, a falling loss and a stall are called."""

from __future__ import annotations

from typing import Any

import pytest

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.health.monitor.history import RunHistory
from ris_fast.health.monitor.rules import replay
from ris_fast.training.trainer import Trainer


def history(train: list[float], val: list[float], **info: Any) -> RunHistory:
    """A run of these training and validation NMSE, epoch by epoch; fresh scenes, constants at 1."""
    rows = [
        {
            "event": "epoch",
            "step": 50 * (i + 1),
            "train_loss": t,
            "terms": {"cov": {"raw": t, "weighted": t}},
            "val_loss": v,
            "val_nmse_raw": v,
            "val_nmse_ema": None,
        }
        for i, (t, v) in enumerate(zip(train, val, strict=True))
    ]
    return RunHistory(info={"baselines": {"zero": 1.0}, "fresh": True, "train_scenes": 64} | info, epochs=rows)


LEARNED_AND_LOST = [0.5, 0.06, 0.054, 2.3, 2.31, 2.3]
STORIES = {
    "sign flipped": (history([0.6, 0.07, 0.058, 2.2, 2.3, 2.3], LEARNED_AND_LOST), "collapsed", True, 250),
    "validation broken on the way": (
        history([0.6, 0.07, 0.058, 0.057, 0.056, 0.055], LEARNED_AND_LOST),
        "validation_apart",
        True,
        300,
    ),
    "validation never right": (history([0.6, 0.3, 0.2, 0.2], [1.92] * 4), "validation_apart", True, 200),
    "few scenes, never right": (history([0.6, 0.3, 0.2, 0.2], [1.92] * 4, fresh=False), "validation_apart", False, 200),
    "few scenes, memorised": (
        history([0.6, 0.2, 0.1, 0.05, 0.02, 0.009], [0.5, 0.2, 0.13, 0.13, 0.14, 0.15], fresh=False),
        "overfitting",
        False,
        300,
    ),
    "few scenes, memorised for long": (
        history([0.5 / n for n in range(1, 41)], [0.2 + 0.003 * abs(n - 6) for n in range(40)], fresh=False),
        "overfitting",
        False,
        1500,
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_epoch_rules_name_training_and_validation_that_part(story: str) -> None:
    run, cause, certain, step = STORIES[story]
    found = replay(run)
    assert {finding.cause for finding in found} == {cause} and found[0].certain == certain and found[0].step == step


@pytest.mark.parametrize(
    "run",
    [
        history([0.6, 0.07, 0.058, 2.2, 0.1], [0.5, 0.06, 0.054, 2.3, 0.1]),
        history([0.9, 0.9, 0.9, 0.9], [1.1, 1.0, 1.1, 1.0]),
        history([0.6, 0.3, 0.2, 0.1], [0.7, 0.35, 0.22, 0.12], fresh=False),
        history([0.6, 0.2, 0.1, 0.05, 0.02, 0.01], [0.5, 0.3, 0.2, 0.1, 0.09, 0.08], fresh=False),
        history([0.2] * 4, [1.9] * 4, blend=0.3),
    ],
    ids=["one bad epoch", "learns nothing", "learns", "validation still falls", "training is blended"],
)
def test_epoch_rules_allow_training_and_validation_together(run: RunHistory) -> None:
    assert replay(run) == []


def test_dominating_term_names_the_terms_of_the_loss() -> None:
    run = history([1.1] * 5, [1.126, 1.13, 1.15, 1.16, 1.174])
    for row, loss in zip(run.epochs, (0.129, 0.125, 0.12, 0.118, 0.115)):
        row |= {
            "val_loss": loss,
            "train_loss": 0.101,
            "terms": {"cov": {"raw": 1.1, "weighted": 0.001}, "cross": {"raw": 0.4, "weighted": 0.1}},
        }
    (finding,) = replay(run)
    assert finding.cause == "dominating_term" and not finding.certain and "cross (99% of the loss)" in finding.evidence


def test_dominating_term_sees_what_is_beside_the_terms() -> None:
    """A penalty that outweighs them while nothing is learned; no small one, nor one beside what is learned."""
    for values, outside, expected in (
        ([1.0, 0.99, 0.98], 20.0, ["dominating_term"]),
        ([1.0, 0.4, 0.1], 20.0, []),
        ([1.0, 0.99, 0.98], 1.0, []),
    ):
        run = history(values, values)
        for row in run.epochs:
            row["train_loss"] += outside
        assert list(dict.fromkeys(finding.cause for finding in replay(run))) == expected


def test_collapsed_does_not_end_the_run() -> None:
    from ris_fast.health.monitor.attach import attach_health

    trainer = attach_health(Trainer(changed(TWINS["backprojection"](), {"training.epochs": 12})), preflight=False)
    forward = trainer.loss.forward

    def turned(prediction: Any, scenes: Any) -> Any:
        total, terms = forward(prediction, scenes)
        return (-total if trainer.state.step >= 48 else total), terms

    trainer.loss.forward = turned
    assert trainer.fit()["epochs"] == 12
    found = trainer.callbacks[-1].findings
    assert [finding.cause for finding in found if finding.certain] == ["collapsed"] and found[
        0
    ].step < trainer.state.step


# ---- a certain stall
# --------------------------------------------------------------------------------------------------


BASELINES = {"zero": 1.0, "identity": 0.98, "mean": 0.97}


def flat(
    epochs: int = 6, *, train: float = 0.0, val: float = 0.0, steps: int = 50, cut: int = 0, **summary: Any
) -> RunHistory:
    """A run at the baseline, whose losses fall by these shares from its first epoch to its last."""

    def row(i: int) -> dict[str, Any]:
        share = i / max(1, epochs - 1)
        return {
            "event": "epoch",
            "step": (i + 1) * steps,
            "train_loss": 0.98 * (1 - train * share),
            "val_nmse_raw": 0.97 * (1 - val * share),
            "val_nmse_ema": None,
            "health": {"cut_short": i >= epochs - cut},
        }

    return RunHistory(
        epochs=[row(i) for i in range(epochs)],
        summary={"verdict": "stalled", "best_val_nmse": 0.968, "baselines": BASELINES} | summary,
    )


def test_stalled_at_baseline_is_certain() -> None:
    (finding,) = replay(flat())
    assert finding.cause == "stalled_at_baseline" and finding.certain and finding.severity == "outcome"
    assert (
        "300 steps and 6 whole epochs" in finding.evidence and "0.97 for the constant answer 'mean'" in finding.evidence
    )


@pytest.mark.parametrize(
    "run",
    [
        flat(2),
        flat(4, cut=2),
        flat(steps=10),
        flat(train=0.05),
        flat(val=0.05),
        flat(best_val_nmse=0.9),
        flat(best_val_nmse=None),
        flat(verdict="stopped"),
        flat(verdict="learned"),
        flat(train=float("nan")),
        flat(baselines={}),
    ],
    ids=[
        "few epochs",
        "cut short",
        "few steps",
        "training moves",
        "validation moves",
        "below the baseline",
        "no figure",
        "stopped",
        "learned",
        "not a number",
        "no baselines",
    ],
)
def test_stalled_at_baseline_needs_a_fair_chance(run: RunHistory) -> None:
    assert replay(run) == []


def test_stalled_at_baseline_is_certain_only_at_the_end() -> None:
    """Rates that move no weight far enough to matter: no step breaks a contract, and nothing is learned."""
    from ris_fast.health.monitor.attach import attach_health

    config = changed(
        TWINS["backprojection"](),
        {"training.epochs": 13, "data.fixed": True, "optimizer.backbone_lr": 1e-7, "optimizer.head_lr": 1e-7},
    )
    trainer = attach_health(Trainer(config), preflight=False)
    summary = trainer.fit()
    certain = [finding.cause for finding in trainer.callbacks[-1].findings if finding.certain]
    assert "stalled_at_baseline" in certain and trainer.state.step == 104 and summary["verdict"] == "stalled"
