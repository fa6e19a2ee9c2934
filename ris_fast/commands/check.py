"""`ris-fast check`: preflight of a configuration, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ris_fast import exit_codes
from ris_fast.config.schema import Config
from ris_fast.report.eventlog import dumps
from ris_fast.report.tables import text_table
from ris_fast.streams import stage


def check_command(config: Config, *, json: bool, graph: bool) -> int:
    """Preflight of a configuration, a line a check. Returns: 4 where a structural mistake is certain, else 0."""
    from ris_fast.health.monitor.watchdog import STOPPING, Watchdog
    from ris_fast.health.preflight.probe import PreflightContext
    from ris_fast.health.preflight.term_gradients import term_gradient_table
    from ris_fast.training.trainer import Trainer

    stage("opening the data and building the network")
    trainer = Trainer(config)
    for note in () if json else [*trainer.source.notes, *trainer.notes]:
        print(f"note: {note}")
    watchdog = Watchdog(trainer)
    found = watchdog.preflight(None if json else lambda result: print(check_line(result), flush=True))
    table = term_gradient_table(PreflightContext(trainer)) if graph else None
    print(_as_json(trainer.source.notes, watchdog, found, table) if json else _as_text(watchdog, found, table))
    return exit_codes.NOT_LEARNED if found and found[0].certain and found[0].severity in STOPPING else exit_codes.DONE


def _as_json(
    notes: Sequence[str], watchdog: Any, found: Sequence[Any], table: Mapping[str, Sequence[Any]] | None
) -> str:
    return dumps(
        {
            "notes": notes,
            "checks": [check.to_json() for check in watchdog.checks],
            "graph": table,
            "could_not_run": [check.name for check in watchdog.checks if check.failed],
            "findings": [finding.to_json() for finding in found],
        },
        indent=2,
    )


def _as_text(watchdog: Any, found: Sequence[Any], table: Mapping[str, Sequence[Any]] | None) -> str:
    from ris_fast.health.preflight.run import unknown

    graph = "" if table is None else "\n" + text_table(table["headers"], table["rows"]) + "\n"
    return f"{graph}\n{conclusion(found, unknown(watchdog.checks))}"


def conclusion(found: Sequence[Any], unknown: str) -> str:
    """All findings that are certain in full, or that there is none; and what could not be looked at."""
    if found:
        from ris_fast.health.finding import explained

        return explained(found) + (f"\n{unknown}" if unknown else "")
    if unknown:
        return f"nothing found by the checks that ran; {unknown}"
    return "nothing found: this run can learn, as far as can be seen before it does"


def check_line(result: Any) -> str:
    """`ok    name  0.12 s  note`; FOUND with the causes, FAILED with what kept the check from running, - where it fell
    short of its goal."""
    word = "FOUND" if result.findings else "FAILED" if result.failed else "ok" if result.reached else "-"
    causes = ", ".join(finding.cause for finding in result.findings)
    failed = f"could not run: {result.failed}" if result.failed else ""
    said = "; ".join(filter(None, (causes, result.note, failed)))
    return f"{word:<7}{result.name:<52}{result.seconds:6.2f} s  {said}".rstrip()
