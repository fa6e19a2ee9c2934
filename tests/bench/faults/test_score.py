"""The measurement of the rules, with watchdogs whose answers are known."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bench.faults import score, trial
from bench.faults.afterwards import score_afterwards
from bench.faults.catalogue import FIRST, HELD_OUT_SUITE, SETS, SUITE, all_faults
from bench.faults.healthy import from_npz, from_shards, healthy_config
from bench.faults.healthy_twins import EPOCH_STEPS, changed
from bench.faults.loops.catalogue import all_loops
from bench.faults.loops.trial import Judged, LoopOutcome
from ris_fast.training.callback import Callback
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer

FAULTS = all_faults()


@dataclass(frozen=True)
class Finding:
    cause: str
    evidence: str = "seen"
    certain: bool = True


class Told(Callback):
    """A watchdog that says `cause` once `step` optimizer steps were attempted; at 0 in its preflight."""

    def __init__(self, trainer: Trainer, cause: str | None, step: int = 0) -> None:
        self.trainer, self.cause, self.at = trainer, cause, step
        self.findings: list[Finding] = []

    def preflight(self) -> list[Finding]:
        return [Finding(self.cause)] if self.cause and self.at == 0 else []

    def on_log(self, row: Any) -> None:
        if self.cause and self.trainer.state.step >= self.at:
            self.findings = [Finding(self.cause)]


def told(cause: str | None, step: int = 0) -> trial.Build:
    return lambda trainer: Told(trainer, cause, step)


def test_score_fault_names_a_cause_found_in_preflight() -> None:
    outcome = trial.score_fault(FAULTS["rate_zero"], told("zero_learning_rate"))
    assert outcome.detected and outcome.named and outcome.step == 0 and not outcome.crashed


def test_score_fault_detects_but_does_not_name_another_cause() -> None:
    outcome = trial.score_fault(FAULTS["rate_zero"], told("frozen_parameters"))
    assert outcome.detected and not outcome.named


def test_score_fault_counts_a_late_cause_as_missed() -> None:
    outcome = trial.score_fault(FAULTS["rate_zero"], told("zero_learning_rate", 4))
    assert outcome.step == 4 and outcome.limit == 0 and outcome.ever and not outcome.detected and not outcome.named


@pytest.mark.parametrize(
    "name, limit",
    [
        ("never_cleared", 5),
        ("adam_epsilon_of_one", 40),
        ("body_behind_the_loop", 1),
        ("eval_after_first_validation", EPOCH_STEPS + 5),
    ],
)
def test_score_fault_limit_in_steps(name: str, limit: int) -> None:
    assert trial.score_fault(FAULTS[name], told("dead_units")).limit == limit


def test_score_fault_of_a_silent_watchdog_is_a_miss() -> None:
    watchdogs: list[Told] = []

    def silent(trainer: Trainer) -> Told:
        watchdogs.append(Told(trainer, None))
        return watchdogs[-1]

    outcome = trial.score_fault(FAULTS["average_decay_of_one"], silent)
    (watchdog,) = watchdogs
    latest = trial.PATIENCE + max(outcome.limit, trial.GRACE_REPORTS * EPOCH_STEPS)
    assert outcome.step is None and not outcome.ever and outcome.limit < watchdog.trainer.state.step <= latest


def test_with_twins_discounts_what_the_twin_reports_too() -> None:
    outcome = trial.score_fault(FAULTS["rate_zero"], told("zero_learning_rate"))
    twin = trial.score_fault(trial.twin_fault("hybrid"), told("zero_learning_rate"))
    assert not score.with_twins([outcome], {"hybrid": twin})[0].detected


def test_score_fault_records_where_a_watchdog_crashed() -> None:
    def broken(trainer: Trainer) -> trial.Watching:
        raise KeyError("reading")

    outcome = trial.score_fault(FAULTS["rate_zero"], broken)
    assert "KeyError" in outcome.crashed and "test_score.py" in outcome.crashed and not outcome.detected


def test_score_fault_notes_a_stop_by_the_trainer() -> None:
    outcome = trial.score_fault(FAULTS["step_in_a_dead_branch"], told(None))
    assert outcome.stopped and not outcome.detected


def small(number: int) -> Any:
    return changed(
        healthy_config(number),
        {"training.epochs": 1, "training.batch_size": 16, "training.accumulate": 1, "data.train_scenes": 32},
    )


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6, 7])
def test_score_healthy_is_silent_without_findings(number: int) -> None:
    assert from_shards(number) == (number in (6, 7)) and from_npz(number) == (number in (2, 3))
    outcome = trial.score_healthy(number, told(None), small(number))
    assert not (outcome.said or outcome.stopped or outcome.crashed)


def test_score_healthy_counts_a_stop_as_a_false_alarm() -> None:
    class Stopping(Told):
        def on_log(self, row: Any) -> None:
            raise RunStopped("enough", "made_up")

    config = changed(small(0), {"report.every_steps": 1})
    outcome = trial.score_healthy(0, lambda trainer: Stopping(trainer, None), config)
    assert outcome.stopped == "made_up" and score.summary([], [outcome])["healthy"]["stopped"] == 1


def test_healthy_config_covers_models_and_sizes() -> None:
    configs = [healthy_config(number) for number in range(200)]
    assert {c.model.name for c in configs} == {"hybrid", "backprojection"}
    assert {c.training.precision for c in configs} == {"fp32", "bf16"}
    sizes, counts = {c.training.batch_size for c in configs}, {c.training.accumulate for c in configs}
    assert {16, 1024} <= sizes and {1, 8} <= counts and len({c.training.seed for c in configs}) == 200
    assert {c.loss.cov for c in configs} == {0.2, 1.0, 5.0} and {"fresnel", "spherical"} == {
        c.task.wavefront for c in configs
    }
    assert {"static", "per_snapshot"} == {c.task.symbols for c in configs} and 20 <= sum(
        map(from_npz, range(200))
    ) <= 30
    assert 40 <= sum(from_shards(number) for number in range(200)) <= 60


def test_score_summary_keeps_tuned_and_held_out_apart() -> None:
    base = trial.score_fault(FAULTS["rate_zero"], told("zero_learning_rate"))
    missed = replace(base, name="x", held_out=True, said=(), step=None)
    result = score.summary([base, missed], [])
    assert result["tuned"]["total"]["named_first"] == 1.0 and result["held_out"]["total"]["detected"] == 0.0
    assert result["all"]["loop"]["detected"] == 0.5


def tell_nothing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The command scores these faults, by a watchdog without an answer."""
    monkeypatch.setattr(trial.score_fault, "__defaults__", (told(None),))
    monkeypatch.setattr(score, "chosen", lambda arguments: [FAULTS[name] for name in names])


@pytest.mark.slow
def test_score_command_prints_hidden_sets_as_totals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_nothing(monkeypatch, "rate_zero", "loss_clamped", "answer_behind_a_relu")
    unseen = {name for name, fault in FAULTS.items() if fault.hidden}
    assert score.main(["--no-loops", "--json", str(tmp_path / "score.json")]) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "score.json").read_text())
    assert "rate_zero" in printed and not any(name in printed for name in unseen)
    assert "held_out" in printed and FIRST in printed
    assert {o["name"] for o in written["outcomes"]} >= {"rate_zero", "loss_clamped"}
    assert "answer_behind_a_relu" not in str(written) and list(written["summary"][FIRST]) == ["total"]
    assert written["summary"]["all"]["total"]["faults"] == 2 and written["summary"][FIRST]["total"]["faults"] == 1
    tell_nothing(monkeypatch, "answer_behind_a_relu")
    assert score.main(["--no-loops", "--show"]) == 0 and "answer_behind_a_relu" in capsys.readouterr().out


@pytest.mark.parametrize("found, of, low, high", [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (40, 40, 0.9124, 1.0)])
def test_wilson_interval_is_that_of_the_tables(found: int, of: int, low: float, high: float) -> None:
    assert score.wilson(found, of) == pytest.approx([low, high], abs=1e-4)


def test_score_chooses_sets_by_a_part_of_their_names() -> None:
    parse = score.parser().parse_args
    written = lambda *given: {fault.written for fault in score.chosen(parse(given))}  # noqa: E731
    assert written() == set(SETS) and written("--all") == {SUITE, HELD_OUT_SUITE}
    assert written("--set", "tuned") == {SUITE} and written("--set", "2026-11", "held_out") == {*SETS} - {SUITE}
    assert not score.chosen(parse(["--set", "loops"])) and len(score.chosen_loops(parse(["--set", "loops"]))) >= 40
    assert not score.chosen_loops(parse(["--set", "2026-11 first"])) and score.chosen_loops(parse([]))
    with pytest.raises(SystemExit, match="2026-11 second"):
        score.sets_of(["2026-12"])


def test_score_everything_runs_all_kinds_of_cases() -> None:
    kinds = Counter(kind for kind, _ in score.cases_of(score.parser().parse_args(["--everything"])))
    assert kinds["fault"] == kinds["fault afterwards"] == len(FAULTS) and kinds["healthy"] == 500
    right = [loop for loop in all_loops().values() if not loop.expect]
    assert kinds["loop"] == len(all_loops()) and kinds["right loop 1"] == len(right) >= 100
    assert kinds["twin"] == kinds["twin afterwards"] == len({fault.twin_name for fault in FAULTS.values()})


def test_score_totals_of_loops_count_mistakes_and_accusations() -> None:
    right = LoopOutcome("x", "g", False, ("dead_units",), (), (), "", 0.0)
    wrong = replace(right, wrong=True, said=("dead_units",), certain=(True,))
    judged = [
        Judged(right, wrong),
        Judged(replace(right, said=("dead_units",), certain=(False,)), wrong),
        Judged(right),
    ]
    totals = score.loop_totals(judged)["all"]
    assert totals["mistakes"] == 2 and totals["detected"] == totals["named_first"] == 0.5
    assert totals["right"] == 3 and totals["accused"] == pytest.approx(1 / 3) and totals["accused_certainly"] == 0.0


def test_score_totals_tell_certain_accusations_of_what_is_right() -> None:
    right = Judged(LoopOutcome("x", "g", False, (), (), (), "", 0.0))
    doubted = Judged(replace(right.twin, said=("dead_units",), certain=(False,)))
    accused = Judged(replace(doubted.twin, certain=(True,)))
    run = trial.Outcome("healthy 0", "healthy", False, (), ("dead_units",), "", 3, 0, "", "", 1.0, certain=(False,))
    found = {"loop": [right, doubted], "right loop 1": [right, accused]}
    result, _ = score.results({**found, "healthy": [run, replace(run, certain=(True,)), replace(run, stopped="x")]})
    assert result["right_loops"]["kinds"] == 1 and result["right_loops"]["runs"] == 4
    assert result["right_loops"]["accused"] == 0.5 and result["right_loops"]["accused_certainly"] == 0.25
    assert result["healthy"]["false_alarms"] == 3 and result["healthy"]["accused_certainly"] == pytest.approx(2 / 3)
    assert "4 loops of 1 kinds" in score.table(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "rows_in_a_small_ball"])
def test_twin_is_watched_as_long_as_any_fault_of_it(name: str) -> None:
    twin = trial.twin_fault(name)
    longest = trial.score_fault(twin, told(None)).limit
    faults = [fault for fault in FAULTS.values() if fault.twin_name == name]
    assert not twin.expect and longest == max(trial.score_fault(fault, told("dead_units")).limit for fault in faults)


def test_score_command_lists_faults_for_an_unknown_one() -> None:
    with pytest.raises(SystemExit, match="rate_zero"):
        score.main(["--only", "rate_zeroo"])


# ---- what a run leaves behind
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_score_afterwards_names_a_fault_and_spares_its_twin() -> None:
    outcome, twin = (score_afterwards(fault) for fault in (FAULTS["never_cleared"], trial.twin_fault("hybrid")))
    assert outcome.named and outcome.said[0] == "gradients_never_cleared" and not outcome.crashed
    assert twin.said == () and not twin.crashed


@pytest.mark.slow
def test_score_afterwards_misses_a_fault_without_a_trace() -> None:
    outcome = score_afterwards(FAULTS["backbone_frozen"])
    assert not outcome.crashed and outcome.named == ("frozen_parameters" in outcome.said[:1])


@pytest.mark.slow
def test_score_command_afterwards_reads_rows_beside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_nothing(monkeypatch, "never_cleared")
    assert score.main(["--afterwards", "--no-loops"]) == 0
    watched, afterwards = (line for line in capsys.readouterr().out.splitlines() if " never_cleared " in line)
    assert "by step" in watched and "MISSED" in watched
    assert afterwards.startswith("named") and "gradients_never_cleared" in afterwards and "by step" not in afterwards
