"""What `ris-fast check` and `ris-fast why` print: preflight of a configuration, and the cause of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ris_fast.config import Config, ConfigError
from ris_fast.report.eventlog import dumps, read_events
from ris_fast.report.tables import text_table

STOPPED_BY_HEALTH = 4


def run_check(config: Config, *, json: bool = False, graph: bool = False) -> int:
    """Preflight of a configuration, a line a check. Returns 4 where a structural mistake is certain, else 0."""
    from ris_fast.health.graph import graph_table
    from ris_fast.health.subject import Subject
    from ris_fast.health.watchdog import STOPPING, Watchdog
    from ris_fast.training.loop import Trainer

    trainer = Trainer(config)
    watchdog = Watchdog(trainer)
    found = watchdog.preflight(None if json else lambda result: print(check_line(result), flush=True))
    table = graph_table(Subject(trainer)) if graph else None
    if json:
        print(dumps({"checks": [check.to_json() for check in watchdog.checks], "graph": table,
                     "findings": [finding.to_json() for finding in found]}, indent=2))
    else:
        if table is not None:
            print("\n" + text_table(table["headers"], table["rows"]))
        print(f"\n{found[0]}" if found else "\nnothing found: this run can learn, as far as can be seen before it does")
    return STOPPED_BY_HEALTH if found and found[0].certain and found[0].severity in STOPPING else 0


def check_line(result: Any) -> str:
    """`ok    name  0.12 s  note`."""
    word = "ok" if result.passed else "FOUND" if result.findings else "-"
    said = ", ".join(finding.cause for finding in result.findings) or result.note or (f"could not run: {result.failed}" if result.failed else "")
    return f"{word:<6}{result.name:<52}{result.seconds:6.2f} s  {said}".rstrip()


def say_why(run: Path | None, *, json: bool = False) -> int:
    """The ranked cause of a run. Raises ConfigError where there is no run to read."""
    from ris_fast.health.why import summary_beside, why

    if run is None:
        raise ConfigError("why: give a run folder or a metrics.jsonl, or --explain with the name of a cause.")
    summary = summary_beside(run)
    try:
        rows = read_events(run)
    except FileNotFoundError as error:
        if not summary:
            raise ConfigError(f"why: {error}") from error
        rows = []                      # a run that preflight stopped has a summary and no rows
    except ValueError as error:
        raise ConfigError(f"why: {error}") from error
    answer = why(run, rows, summary)
    print(dumps(answer.to_json(), indent=2) if json else answer.text)
    return 0


def explain_cause(name: str) -> int:
    """Prints the page on a cause. Raises ConfigError naming the nearest one."""
    from ris_fast.health.causes import CAUSES
    from ris_fast.health.finding import page
    from ris_fast.settings import nearest

    if name not in CAUSES:
        raise ConfigError(f"why: there is no cause '{name}'.{nearest(name, CAUSES)}")
    print(page(name), end="")
    return 0
