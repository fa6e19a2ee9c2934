"""Reads the rows of a run from what a loop printed, one line an epoch or more, and from a table with a header."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from typing import Any

NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf(?:inity)?|nan)(?![\w%/])"
TRAIN, VAL = r"train(?:ing)?", r"(?:val(?:id(?:ation)?)?|eval(?:uation)?|dev|test)"
SPLIT = rf"(?:{TRAIN}|{VAL})"
IS = r"['\"]?\s*(?:[:=]|\bis\b)?\s*"
KIND = r"(?:avg|average|mean|epoch|total|running)"
LOSS = re.compile(
    rf"(?<![A-Za-z_])((?:{SPLIT}(?:\s+set)?[\s_/.:-]*)?(?:{KIND}\.?[\s_-]*)?loss(?:[\s_/.-]*{SPLIT})?){IS}{NUMBER}",
    re.I,
)
BARE = re.compile(rf"(?<![A-Za-z_])({SPLIT})\.?{IS}{NUMBER}", re.I)  # "train 0.217  val 1.922", in a line of an epoch
NORM = re.compile(rf"(?:\|g\||grad(?:ient)?[\s_]*norm){IS}{NUMBER}", re.I)
EPOCH = re.compile(r"\bepochs?\W{0,3}(\d+)", re.I)
DELIMITERS = ",;\t"


def printed_rows(text: str) -> list[dict[str, Any]]:
    """A row an epoch, or a row a line where lines name no epoch, with the last losses printed in it; empty where there
    are none."""
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        epoch, losses = EPOCH.search(line), _losses(line)
        number = int(epoch.group(1)) if epoch else None
        if number is not None and (not rows or rows[-1].get("epoch") != number):
            rows.append({"epoch": number})
        elif losses and not (rows and "epoch" in rows[-1]):
            rows.append({})
        if losses:
            rows[-1].update(losses)
    return [row for row in rows if row.keys() & {"train_loss", "val_loss"}]


def _losses(line: str) -> dict[str, float]:
    labelled = LOSS.findall(line) or (BARE.findall(line) if EPOCH.search(line) else [])
    losses = {"val_loss" if re.search(VAL, label, re.I) else "train_loss": float(value) for label, value in labelled}
    norm = NORM.search(line)
    return losses | ({"grad_norm": float(norm.group(1))} if norm and losses else {})


def table_rows(text: str) -> list[dict[str, Any]]:
    """Rows of a table with a header and numbers under it, those of one epoch put together, since loggers leave cells
    empty; empty where the text is no such table."""
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = max(DELIMITERS, key=lines[0].count) if lines else ","
    if (
        len(lines) < 2
        or not lines[0].count(delimiter)
        or not all(re.match(r"\s*\"?[A-Za-z_]", name) for name in lines[0].split(delimiter))
    ):
        return []
    rows = [
        {
            name.strip(): value
            for name, text in row.items()
            if isinstance(name, str) and (value := _cell(text)) is not None
        }
        for row in csv.DictReader(lines, delimiter=delimiter)
    ]
    return _by_epoch(rows) if any(isinstance(value, (int, float)) for row in rows for value in row.values()) else []


def _cell(text: Any) -> int | float | str | None:
    if not isinstance(text, str) or not text.strip():
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _by_epoch(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row an epoch: later values replace earlier ones."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if kept and "epoch" in row and kept[-1].get("epoch") == row["epoch"]:
            kept[-1].update(row)
        else:
            kept.append(dict(row))
    return kept
