"""Reads the rows of a run for `ris-fast why`: our own, or another trainer's with its keys renamed to ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ris_fast.files import METRICS
from ris_fast.health.diagnose.printed_rows import printed_rows, table_rows
from ris_fast.report.eventlog import read_events

ALIASES = {
    "train_loss": (
        "train_loss",
        "train_loss_epoch",
        "loss",
        "training_loss",
        "loss_train",
        "train",
        "loss_training",
        "loss_epoch",
        "avg_loss",
        "average_loss",
        "train_loss_step",
    ),
    "val_loss": (
        "val_loss",
        "valid_loss",
        "validation_loss",
        "loss_val",
        "val",
        "valid",
        "validation",
        "eval_loss",
        "dev_loss",
        "test_loss",
        "val_loss_epoch",
        "valid_loss_epoch",
    ),
    "grad_norm": ("grad_norm", "gradient_norm", "train_grad_norm"),
    "batches": ("batches", "num_batches", "steps_per_epoch"),
}
EXPECTED = (
    "Expected a run folder, its metrics.jsonl, one JSON object a line (an epoch) with train_loss and val_loss, a CSV"
    " with such columns, or the text that a loop printed, like 'Epoch 1/30: train loss 0.21, val loss 0.34'."
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run folder, of a metrics.jsonl, or of another trainer's file: an object a line, one list of objects, a
    table with a header, or a text log.

    Raises: FileNotFoundError; ValueError with the file and what was expected, where it has no rows with losses.
    """
    path = path / METRICS if path.is_dir() else path
    if not path.exists():
        return read_events(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text. {EXPECTED}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty. {EXPECTED}")
    try:
        rows = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    except ValueError:
        rows = [] if _has_json_line(text) else table_rows(text) or printed_rows(text)
        if not rows:
            raise
    if any("event" in row for row in rows):
        return rows
    return normalize_keys(path, rows)


def _has_json_line(text: str) -> bool:
    """Whether any line is a JSON object: then the file is damaged rows of ours, and not printed text."""
    for line in text.splitlines():
        try:
            if isinstance(json.loads(line), dict):
                return True
        except ValueError:
            pass
    return False


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}). {EXPECTED}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a list, but not of objects. {EXPECTED}")
    return rows


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    """Rows, one JSON object a line; a last line without its newline counts if it is complete."""
    try:
        rows = read_events(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error} {EXPECTED}") from error
    last = "" if text.endswith("\n") else text.rpartition("\n")[2]
    try:
        whole = json.loads(last) if last.strip() else None
    except json.JSONDecodeError as error:
        if not rows:
            raise ValueError(f"{path}: not JSON ({error.msg}). {EXPECTED}") from error
        whole = None  # a torn tail of a killed run
    return [*rows, whole] if isinstance(whole, dict) else rows


def normalize_keys(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows under our keys. Raises ValueError with the keys that were found, where no loss is among them."""
    rows = list(rows)
    renamed = [_rename_keys(row) for row in rows]
    if not any("train_loss" in row or "val_loss" in row or "grad_norm" in row for row in renamed):
        keys = sorted({str(key) for row in rows for key in row})
        raise ValueError(
            f"{path}: {len(rows)} rows with the keys {', '.join(keys[:12]) or '(none)'}; none of them is a loss."
            f" Expected {' or '.join(ALIASES['train_loss'][:3])} for training, {', '.join(ALIASES['val_loss'][:4])} for"
            " validation."
        )
    if not any(_number(row.get(key)) is not None for row in renamed for key in ("train_loss", "val_loss", "grad_norm")):
        raise ValueError(
            f"{path}: {len(rows)} rows name a loss and none of them has a number for it. Expected numbers."
        )
    return renamed


def _rename_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        str(key).lower().replace("/", "_").replace("-", "_").replace(" ", "_").replace(".", "_"): value
        for key, value in row.items()
    }
    kept = {key: value for key, value in row.items() if key != "step" or isinstance(value, int)}
    for name, others in ALIASES.items():
        value = next((number for other in others if (number := _number(plain.get(other))) is not None), None)
        kept |= {} if value is None else {name: value}
    return kept


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
