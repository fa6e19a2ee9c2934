"""Which rules a row sets off, and the replay of a whole run: findings are the same while it runs and afterwards."""

from __future__ import annotations

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.end_rules import END_RULES
from ris_fast.health.monitor.epoch_contracts import CONTRACT_RULES
from ris_fast.health.monitor.epoch_rules import WHILE_IT_RUNS
from ris_fast.health.monitor.figure_rules import apart_by_mode, impossible_figures
from ris_fast.health.monitor.gradient_rules import GRADIENT_RULES
from ris_fast.health.monitor.history import Rule, RunHistory
from ris_fast.health.monitor.rank_rules import RANK_RULES
from ris_fast.health.monitor.scene_rules import SCENE_RULES, SERVED_RULES
from ris_fast.health.monitor.settings_rules import SETTINGS_RULES, settings_changed
from ris_fast.health.monitor.standstill import stalled_above_inputs
from ris_fast.health.monitor.step_rules import STEP_RULES

EPOCH_RULES: tuple[Rule, ...] = (*CONTRACT_RULES, *WHILE_IT_RUNS, apart_by_mode, *SCENE_RULES, settings_changed)

STEP_ROWS: tuple[Rule, ...] = (
    *RANK_RULES,
    *STEP_RULES,
    *SETTINGS_RULES,
    *GRADIENT_RULES,
    *SERVED_RULES,
    impossible_figures,
    stalled_above_inputs,
)


def rules_of(event: str) -> tuple[Rule, ...]:
    """The rules that a row of this kind can set off: "step", "epoch" or "finish"."""
    return {"step": STEP_ROWS, "epoch": EPOCH_RULES, "finish": END_RULES}[event]


def replay(run: RunHistory) -> list[Finding]:
    """The findings of a whole run, as they would have come while it ran."""
    growing, found = RunHistory(run.info), []
    rows = sorted(
        [(row["step"], 0, row) for row in run.steps] + [(row["step"], 1, row) for row in run.epochs],
        key=lambda each: each[:2],
    )
    for _, is_epoch, row in rows:
        (growing.epochs if is_epoch else growing.steps).append(row)
        found += [finding for rule in rules_of("epoch" if is_epoch else "step") for finding in rule(growing)]
    growing.summary = run.summary
    return found + [finding for rule in END_RULES for finding in rule(growing)]
