"""The manifest of a data set of ours: what it says of every shard, and whether it describes the configured task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ris_fast.config.load import MANIFEST
from ris_fast.config.schema import Task
from ris_fast.data.arrays import COPY_AGAIN
from ris_fast.data.errors import DataError
from ris_fast.physics.random import SPLITS

FORMAT = "ris-fast scenes"
VERSION = 1
COLUMNS = ("snapshots", "channel", "azimuth", "elevation", "range_m", "power", "snr_db", "count")
ENTRY = {"file": str, "scenes": int, "bytes": int, "sha256": str, "statistics": dict}
OWN_TASK = (
    "A data set brings its own task, which every command and load_config take from it: leave these settings away, or"
    " write a data set of this task with `ris-fast simulate`."
)
WRITE_AGAIN = "Write the data set again with `ris-fast simulate`, or copy it again."


def read_manifest(path: Path, task: Task, only: Collection[str] | None = None, todo: str = OWN_TASK) -> dict[str, Any]:
    """The manifest, if it describes this very task, or one that agrees in the settings `only`.

    Raises: DataError, with the advice `todo` for one of another task.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(
            path,
            "",
            f"no {MANIFEST}",
            "a data set written by `ris-fast simulate`",
            "Give the right --data DIR, or write one.",
        ) from None
    except (ValueError, OSError, RecursionError) as problem:
        raise DataError(file, "", f"no readable JSON ({problem})", "a manifest", COPY_AGAIN) from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise DataError(
            file,
            "format",
            f"{manifest.get('format') if isinstance(manifest, dict) else manifest!r}",
            f"'{FORMAT}' version {VERSION}",
            WRITE_AGAIN,
        )
    missing = {
        key
        for key, kind in (("task", dict), ("seed", int), ("splits", dict))
        if not isinstance(manifest.get(key), kind)
    }
    missing = missing or {split for split in SPLITS if not isinstance(manifest["splits"].get(split), dict)}
    if missing:
        raise DataError(file, sorted(missing)[0], "no such entry", "it", COPY_AGAIN)
    _check_entries(file, manifest)
    there = asdict(Task()) | manifest["task"]  # a setting younger than the data has its default
    asked = {key: value for key, value in asdict(task).items() if only is None or key in only}
    if wrong := [key for key in asked if there.get(key) != asked[key]]:
        raise DataError(
            file,
            "task",
            ", ".join(f"{key} {there.get(key)!r}" for key in wrong),
            ", ".join(f"{key} {asked[key]!r}" for key in wrong) + ", as configured",
            todo,
        )
    return manifest


def _check_entries(file: Path, manifest: dict[str, Any]) -> None:
    """Every split lists its shards, and their scenes add up. Raises: DataError."""
    for split in SPLITS:
        entry = manifest["splits"][split]
        shards = entry.get("shards")
        whole = isinstance(shards, list) and len(shards) > 0 and all(_is_entry(each) for each in shards)
        if (
            not whole
            or type(entry.get("scenes")) is not int
            or entry["scenes"] != sum(each["scenes"] for each in shards)
        ):
            raise DataError(
                file, f"splits.{split}", "no whole list of shards", "every shard with its size and SHA-256", COPY_AGAIN
            )


def _is_entry(entry: Any) -> bool:
    """Whether this is what a manifest says of a shard, which lies beside it."""
    return (
        isinstance(entry, dict)
        and all(type(entry.get(key)) is kind for key, kind in ENTRY.items())
        and entry["scenes"] > 0
        and Path(entry["file"]).name == entry["file"]
        and entry["file"].isprintable()
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
