"""The gradient checks for a person: a row per operator, backend and dtype, the verdict, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ris_fast.report.tables import text_table

if TYPE_CHECKING:
    from ris_fast.gradcheck import Row

HEADERS = (
    "operator",
    "backend",
    "dtype",
    "value error",
    "allowed",
    "gradient error",
    "allowed",
    "gradcheck",
    "graph",
    "",
)


def gradcheck_text(rows: Sequence[Row]) -> str:
    """Table, the notes of the rows that failed, and one line of verdict."""
    table = text_table(HEADERS, [_cells(row) for row in rows])
    failed = [row for row in rows if not row.passed]
    notes = [f"{row.operator}, {row.backend}, {row.dtype}: {row.note or row.gradcheck}" for row in failed]
    verdict = f"{len(failed)} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed"
    return "\n".join([table, "", *notes, verdict])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.operator,
        row.backend,
        row.dtype,
        *_error(row.value_error, row.value_allowed),
        *_error(row.gradient_error, row.gradient_allowed),
        row.gradcheck[:24],
        row.graph[:24],
        "ok" if row.passed else "FAILED",
    )


def _error(error: float, allowed: float) -> tuple[str, str]:
    """A limit of zero means that nothing was compared, unless something was found."""
    return (f"{error:.1e}", f"{allowed:.1e}") if error or allowed else ("-", "-")
