"""Plain text tables that line up on a terminal, in a file and in a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns two spaces apart; numbers to the right, texts to the left; a float has four significant digits."""
    cells = [[_cell(each) for each in row] for row in rows]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells)]
    lines = [_line(headers, widths, right), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_line(row, widths, right) for row in cells])


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = (text.rjust(width) if end else text.ljust(width) for text, width, end in zip(cells, widths, right))
    return "  ".join(aligned).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
