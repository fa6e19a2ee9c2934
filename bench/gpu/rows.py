"""Results of a run on a GPU: one line of JSON a figure, in the file as soon as the figure is known."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ris_fast.report.eventlog import dumps

ROWS, STAGE, TRIAL, COMMIT = "RIS_FAST_GPU_ROWS", "RIS_FAST_GPU_STAGE", "RIS_FAST_GPU_SH_SMOKE", "RIS_FAST_COMMIT"


def note(item: str, **facts: Any) -> None:
    """Appends a row of the stage that this process belongs to. Does nothing outside of `bench/gpu.sh`.

    One write to a file opened for appending, so that rows of several processes do not mix.
    """
    path = os.environ.get(ROWS)
    if path:
        where = {"commit": os.environ.get(COMMIT, "unknown"), "at": round(time.time(), 1)}
        if trial():
            where["trial"] = True
        row = {"stage": os.environ.get(STAGE, ""), "item": item, **where, **facts}
        text = dumps(json.loads(json.dumps(row, default=str))) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(text.encode())


def end_line(path: Path) -> None:
    """Ends the torn last line that a kill has left, so that the next row begins a line of its own."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def trial() -> bool:
    """Whether only the flow of control is tried, in tiny sizes: such rows are no figures."""
    return os.environ.get(TRIAL, "0") not in ("", "0")


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row; the last line of a run that was killed may be torn."""
    return list(_whole(path.read_text(errors="replace").splitlines())) if path.is_file() else []


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
