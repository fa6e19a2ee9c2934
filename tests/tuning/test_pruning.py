"""A trial that is behind is ended, one that is not is left alone; trials are compared after the same share of their
budget."""

from __future__ import annotations

from typing import Any

import pytest

optuna = pytest.importorskip("optuna", reason="Optuna comes with the test extra")

from ris_fast.config.load import load_config  # noqa: E402
from ris_fast.tuning.pruning import PARTS, Pruning, TrialPruned, behind  # noqa: E402
from ris_fast.tuning.space import default_space  # noqa: E402
from ris_fast.tuning.study import open_study, quiet, seeded_sampler  # noqa: E402

CONFIG = load_config(preset="laptop", overrides=["training.max_seconds=10", "training.epochs=1000"])


class Heard:
    """A trial that keeps what it hears."""

    def __init__(self, prune: bool = False) -> None:
        self.reports: dict[int, float] = {}
        self.prune = prune

    def report(self, value: float, step: int) -> None:
        assert step not in self.reports  # Optuna would not take it
        self.reports[step] = value

    def should_prune(self) -> bool:
        return self.prune


def row(epoch: int, seconds: float, nmse: float) -> dict[str, Any]:
    return {"epoch": epoch, "seconds": seconds, "val_nmse_raw": nmse, "val_nmse_ema": 2 * nmse}


def test_pruning_reports_the_best_so_far_by_percent_of_the_budget() -> None:
    heard = Heard()
    pruning = Pruning(heard, CONFIG)
    for each in (row(1, 1.0, 0.5), row(2, 1.2, 0.4), row(3, 2.1, 0.6), row(3, 2.101, 0.6), row(4, 10.5, float("nan"))):
        pruning.on_epoch_end(each)
    assert heard.reports == {10: 0.5, 12: 0.4, 21: 0.4, PARTS: 0.4}


def test_pruning_goes_by_epochs_where_no_time_is_set() -> None:
    heard = Heard()
    pruning = Pruning(heard, load_config(preset="laptop", overrides=["training.max_seconds=0", "training.epochs=4"]))
    for epoch in (1, 2):
        pruning.on_epoch_end(row(epoch, 1e4, 1.0 / epoch))
    assert heard.reports == {25: 1.0, 50: 0.5}


def test_pruned_run_is_marked_as_pruned() -> None:
    pruning, summary = Pruning(Heard(prune=True), CONFIG), {"verdict": "stopped"}
    with pytest.raises(TrialPruned, match="NMSE 0.5 after 10% of the budget"):
        pruning.on_epoch_end(row(1, 1.0, 0.5))
    pruning.on_summary(summary)
    assert summary["verdict"] == "pruned"
    Pruning(Heard(prune=True), CONFIG, prune=False).on_epoch_end(row(1, 1.0, 0.5))


def test_behind_compares_what_trials_had_by_the_same_part() -> None:
    others = [{10: 0.9, 50: 0.1}, {30: 0.5}, {20: 0.4, 25: 0.6}, {60: 0.01}]
    assert not behind({29: 0.6}, others, grace=0, fewest=3)  # of the others two had been validated
    assert behind({31: 0.51}, others, grace=0, fewest=3) and not behind({31: 0.5}, others, grace=0, fewest=3)
    assert not behind({31: 0.51}, others, grace=32, fewest=3) and not behind({}, others, grace=0, fewest=3)
    assert behind({31: float("nan")}, others, grace=0, fewest=3)


def curve(trial: Any, final: float) -> str:
    """A trial whose NMSE falls from 1 to `final`; 'pruned' or 'complete'."""
    pruning = Pruning(trial, CONFIG)
    try:
        for epoch in range(1, 21):
            pruning.on_epoch_end(row(epoch, epoch / 2, 1.0 + (final - 1.0) * epoch / 20))
    except TrialPruned:
        return "pruned"
    return "complete"


def test_study_prunes_bad_trials_and_no_good_ones(tmp_path) -> None:
    study = open_study(str(tmp_path / "study.log"), "s", 0, CONFIG, default_space("backprojection"))
    ended = {}
    for number, final in enumerate([0.1, 0.12, 0.11, 0.13, 0.9, 0.05, 0.6, 0.08]):
        trial = study.ask()
        ended[final] = curve(trial, final)
        done = ended[final] == "complete"
        study.tell(trial, final if done else None, state=optuna.trial.TrialState["COMPLETE" if done else "PRUNED"])
        assert trial.number == number
    assert [final for final, how in ended.items() if how == "pruned"] == [0.9, 0.6]
    told = study.trials[4].intermediate_values
    assert max(told) == 20  # the first validation after a fifth of the budget


def test_sampler_draws_by_seed_and_number_of_the_trial() -> None:
    def drawn(seed: int, skip: int = 0) -> list[float]:
        with quiet():
            study = optuna.create_study(sampler=seeded_sampler(seed))
        trials = ((number, study.ask()) for number in range(4))  # the first ones are another process's
        return [trial.suggest_float("x", 0.0, 1.0) for number, trial in trials if number >= skip]

    assert drawn(0) == drawn(0) and drawn(0, skip=2) == drawn(0)[2:]
    assert len({*drawn(0), *drawn(1)}) == 8
