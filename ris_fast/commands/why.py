"""`ris-fast why`: the most likely cause why a finished or stopped run did not learn, and the page on a cause."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ris_fast import exit_codes
from ris_fast.config.schema import ConfigError
from ris_fast.config.spelling import did_you_mean
from ris_fast.files import METRICS, SUMMARY
from ris_fast.old_names import current_cause
from ris_fast.report.eventlog import dumps
from ris_fast.report.verdict import explanation_lines, lost_again, stalled_because


def why_command(run: Path | None, *, explain: str | None, json: bool, every: bool) -> int:
    """Prints the page on the cause `explain`, or else the ranked causes of a run."""
    return explain_cause(explain) if explain is not None else say_why(run, json=json, every=every)


def say_why(run: Path | None, *, json: bool = False, every: bool = False) -> int:
    """The ranked causes of a run. `every`: with all explanations of a run that stalled, one a line. Raises ConfigError
    where there is no run to read."""
    from ris_fast.health.diagnose.why import why

    if run is None:
        raise ConfigError("why: give a run folder or a metrics.jsonl, or --explain with the name of a cause.")
    rows, summary = _read(run)
    try:
        answer = why(run, rows, summary)
        reason = _reason(run, rows, summary, answer, every)
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # entries that no writer of rows leaves out
        raise ConfigError(
            f"why: the rows of {run} cannot be judged ({type(error).__name__}: {error}): {METRICS} or {SUMMARY} is"
            " damaged. Restore them, or continue the run: its checkpoints have checksums of their own."
        ) from error
    if json:
        print(dumps(answer.to_json() | ({"reason": reason} if reason else {}), indent=2))
    else:
        print("\n".join(filter(None, (answer.text, reason))))
    return exit_codes.DONE


def _read(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary; a run that preflight stopped has a summary and no rows. Raises ConfigError."""
    from ris_fast.health.diagnose.rows import read_rows
    from ris_fast.health.diagnose.why import summary_beside

    summary: dict[str, Any] = {}
    try:
        summary = summary_beside(run)
        return read_rows(run), summary
    except FileNotFoundError as error:
        if not summary:
            raise ConfigError(f"why: {error}") from error
        return [], summary
    except ValueError as error:
        raise ConfigError(f"why: {error}") from error


def _reason(run: Path, rows: list[dict[str, Any]], summary: Mapping[str, Any], answer: Any, every: bool) -> str:
    """What the findings alone do not say: why the run is called stalled, or that it has not ended."""
    from ris_fast.commands.run_folder import how_to_resume

    if rows and not summary and not answer.plain and run.is_dir():
        return f"The run has not come to its end: it was killed, or is still training. {how_to_resume(run)}"
    if answer.verdict != "stalled":
        return " ".join(lost_again(summary))
    looked = explanation_lines({**summary, "explanations": answer.explanations}, every=every)
    return "\n".join([f"stalled: best validation NMSE {stalled_because(summary)}", *looked])


def explain_cause(name: str) -> int:
    """Prints the page on a cause. Raises ConfigError naming the nearest one."""
    from ris_fast.health.causes import CAUSES

    name = current_cause(name)
    if name not in CAUSES:
        raise ConfigError(f"why: there is no cause '{name}'.{did_you_mean(name, CAUSES)}")
    print(CAUSES[name].page, end="")
    return exit_codes.DONE
