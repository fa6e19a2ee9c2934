"""Run files that survive a kill: metrics.jsonl, one valid JSON row a report, and JSON files replaced in one move."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ris_fast.files import METRICS, SUMMARY, append_text, write_text, writing
from ris_fast.old_names import current_names
from ris_fast.training.callback import Callback

NONFINITE = "nonfinite"


class JsonlReport(Callback):
    """Appends every event to `metrics.jsonl` and writes `summary.json` at the end.

    The file is opened for each row, so nothing is lost in a buffer when the process dies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        _drop_torn_tail(self.folder / METRICS)

    def on_train_start(self, info: dict[str, Any]) -> None:
        self._append({"event": "start", **info})

    def on_log(self, row: dict[str, Any]) -> None:
        self._append({"event": "step", **row})

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self._append({"event": "epoch", **row})

    def on_train_end(self, summary: dict[str, Any]) -> None:
        write_json(self.folder / SUMMARY, summary)

    def _append(self, row: Mapping[str, Any]) -> None:
        append_text(self.folder / METRICS, dumps(row) + "\n")


def dumps(value: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON. A number that is not finite becomes null, and `nonfinite` says which one it was."""
    notes: dict[str, str] = {}
    plain = _plain(value, "", notes)
    if notes:
        plain[NONFINITE] = notes
    return json.dumps(plain, indent=indent, allow_nan=False)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes `value` so that a reader sees the old file or the new one, never half of either. Raises StorageError."""
    write_text(path, dumps(value, indent=2) + "\n")


def read_events(path: str | Path, *, skip_broken: bool = False, superseded: bool = False) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl (or of the run folder that holds one), numbers that were not finite put back.

    A torn last line (a killed run) is left out. Rows that a resumed run went over again count once: the later ones;
    with `superseded` both are there.
    Raises FileNotFoundError where there is no such file, ValueError with the line number for any other bad line unless
    `skip_broken`.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no '{path}'. Give a run folder, or the metrics.jsonl of one.")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    rows = [_parse(line, number, path, skip_broken) for number, line in enumerate(lines[:-1], start=1) if line.strip()]
    ours = [row for row in rows if row is not None]
    if any("event" in row for row in ours):  # another trainer's rows keep their names
        ours = current_names(ours, text, path)
    return ours if superseded else current_rows(ours)


def current_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those that a resumed run went over again: a row replaces all that are not behind it."""
    kept: list[dict[str, Any]] = []
    last = (-1, False)
    for row in rows:
        place = row_place(row)
        if place is not None and place <= last:
            kept = [each for each in kept if (row_place(each) or (-1, False)) < place]
        last = last if place is None else place
        kept.append(row)
    return kept


def row_place(row: Mapping[str, Any]) -> tuple[int, bool] | None:
    """Order of a row in its run: by step, an epoch's own row after the step's. None for rows without a step."""
    return (row["step"], row.get("event") == "epoch") if isinstance(row.get("step"), int) else None


def _parse(line: str, number: int, path: Path, skip_broken: bool) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object with an event, got {type(row).__name__}.")
        for where, text in row.pop(NONFINITE, {}).items():
            _put(row, where.split("/"), float(text))
        return row
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if skip_broken:
            return None
        said = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(
            said if said.startswith(str(path)) else f"{path}, line {number}: {said}. Remove that line."
        ) from error


def _put(row: Any, keys: list[str], value: float) -> None:
    for key in keys[:-1]:
        row = row[int(key)] if isinstance(row, list) else row[key]
    row[int(keys[-1]) if isinstance(row, list) else keys[-1]] = value


def _plain(value: Any, where: str, notes: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}/{key}".lstrip("/"), notes) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}/{i}".lstrip("/"), notes) for i, each in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays, without importing either
        return _plain(value.tolist(), where, notes)
    if isinstance(value, float) and not math.isfinite(value):
        notes[where] = str(value)
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _drop_torn_tail(path: Path) -> None:
    """A run that was killed while writing leaves half a row; the next row must not be glued to it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with writing(path):
            os.truncate(path, whole)
