"""What `ris-fast check` and `ris-fast why` print: preflight of a configuration, and the cause of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ris_fast.commands.streams import stage
from ris_fast.config.schema import Config, ConfigError
from ris_fast.report.eventlog import dumps
from ris_fast.report.tables import text_table
from ris_fast.report.verdict import lost_again, ruled_out, stalled_because

STOPPED_BY_HEALTH = 4


def run_check(config: Config, *, json: bool = False, graph: bool = False) -> int:
    """Preflight of a configuration, a line a check. Returns 4 where a structural mistake is certain, else 0."""
    from ris_fast.health.monitor.watchdog import STOPPING, Watchdog
    from ris_fast.health.preflight.probe import PreflightContext
    from ris_fast.health.preflight.run import unknown
    from ris_fast.health.preflight.term_gradients import term_gradient_table
    from ris_fast.training.trainer import Trainer

    stage("opening the data and building the network")
    trainer = Trainer(config)
    for note in () if json else [*trainer.source.notes, *trainer.notes]:
        print(f"note: {note}")
    watchdog = Watchdog(trainer)
    found = watchdog.preflight(None if json else lambda result: print(check_line(result), flush=True))
    table = term_gradient_table(PreflightContext(trainer)) if graph else None
    if json:
        print(
            dumps(
                {
                    "notes": trainer.source.notes,
                    "checks": [check.to_json() for check in watchdog.checks],
                    "graph": table,
                    "could_not_run": [check.name for check in watchdog.checks if check.failed],
                    "findings": [finding.to_json() for finding in found],
                },
                indent=2,
            )
        )
    else:
        if table is not None:
            print("\n" + text_table(table["headers"], table["rows"]))
        print(f"\n{conclusion(found, unknown(watchdog.checks))}")
    return STOPPED_BY_HEALTH if found and found[0].certain and found[0].severity in STOPPING else 0


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
    said = "; ".join(
        filter(
            None,
            (
                ", ".join(finding.cause for finding in result.findings),
                result.note,
                f"could not run: {result.failed}" if result.failed else "",
            ),
        )
    )
    return f"{word:<7}{result.name:<52}{result.seconds:6.2f} s  {said}".rstrip()


def say_why(run: Path | None, *, json: bool = False) -> int:
    """The ranked cause of a run. Raises ConfigError where there is no run to read."""
    from ris_fast.commands.run_folder import how_to_resume
    from ris_fast.health.diagnose.rows import read_rows
    from ris_fast.health.diagnose.why import summary_beside, why

    if run is None:
        raise ConfigError("why: give a run folder or a metrics.jsonl, or --explain with the name of a cause.")
    summary: dict[str, Any] = {}
    try:
        summary = summary_beside(run)
        rows = read_rows(run)
    except FileNotFoundError as error:
        if not summary:
            raise ConfigError(f"why: {error}") from error
        rows = []  # a run that preflight stopped has a summary and no rows
    except ValueError as error:
        raise ConfigError(f"why: {error}") from error
    answer = why(run, rows, summary)
    reason = stall_text(summary) if answer.verdict == "stalled" else " ".join(lost_again(summary))
    if rows and not summary and not answer.plain and run.is_dir():
        reason = f"The run has not come to its end: it was killed, or is still training. {how_to_resume(run)}"
    print(
        dumps(answer.to_json() | ({"reason": reason} if reason else {}), indent=2)
        if json
        else "\n".join(filter(None, (answer.text, reason)))
    )
    return 0


def stall_text(summary: Mapping[str, Any]) -> str:
    """Why a run is called stalled, and, where no rule found a cause, what was looked for and not found."""
    return "\n".join(
        [
            f"stalled: best validation NMSE {stalled_because(summary)}",
            *([] if summary.get("findings") else ruled_out(summary)),
        ]
    )


def explain_cause(name: str) -> int:
    """Prints the page on a cause. Raises ConfigError naming the nearest one."""
    from ris_fast.config.load import nearest
    from ris_fast.health.causes import CAUSES

    if name not in CAUSES:
        raise ConfigError(f"why: there is no cause '{name}'.{nearest(name, CAUSES)}")
    print(CAUSES[name].page, end="")
    return 0
