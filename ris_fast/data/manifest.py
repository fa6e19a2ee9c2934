"""The manifest of a data set of ours: what it says of every shard, and whether it describes the configured task.

It ends with the SHA-256 of all its other entries, so that no digit of it changes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ris_fast.config.load import MANIFEST
from ris_fast.config.schema import Task
from ris_fast.data.arrays import COPY_AGAIN
from ris_fast.data.errors import DataError
from ris_fast.data.shard_columns import COLUMNS, FORMAT, VERSIONS, known_columns
from ris_fast.physics.random import SPLITS

CHECKSUM = "sha256"
# of manifests written before there was a checksum: with another entry, it is one whose checksum was damaged
WITHOUT_CHECKSUM = {"format", "version", "task", "seed", "scenes", "shard_scenes", "splits"}
NO_CHECKSUM = (
    f"the {MANIFEST} of this data set has no checksum of its own: it was written by an older version, and a changed"
    " digit in it would pass unnoticed"
)
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
    file, manifest = path / MANIFEST, read_any_manifest(path)
    there = asdict(Task()) | manifest["task"]  # a setting younger than the data has its default
    asked = {key: value for key, value in task.identity().items() if only is None or key in only}
    if wrong := [key for key in asked if there.get(key) != asked[key]]:
        raise DataError(
            file,
            "task",
            ", ".join(f"{key} {there.get(key)!r}" for key in wrong),
            ", ".join(f"{key} {asked[key]!r}" for key in wrong) + ", as configured",
            todo,
        )
    return manifest


def read_any_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder, of whatever task, as it was written. Raises: DataError."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
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
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or type(manifest.get("version")) is not int
        or manifest["version"] not in VERSIONS
    ):
        raise DataError(
            file,
            "format",
            f"{manifest.get('format') if isinstance(manifest, dict) else manifest!r}",
            f"'{FORMAT}' version {' or '.join(map(str, VERSIONS))}",
            WRITE_AGAIN,
        )
    _check_sum(file, manifest)
    missing = {key for key, kind in _entries(manifest).items() if type(manifest.get(key)) is not kind}
    missing = missing or {split for split in SPLITS if not isinstance(manifest["splits"].get(split), dict)}
    if missing:
        raise DataError(file, sorted(missing)[0], "no such entry", "it", COPY_AGAIN)
    _check_entries(file, manifest)
    return manifest


def sealed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with their checksum, in place of an earlier one."""
    plain = {key: value for key, value in entries.items() if key != CHECKSUM}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(entries: Mapping[str, Any]) -> bool:
    """Whether these entries have the checksum that they were written with."""
    return CHECKSUM in entries and entries[CHECKSUM] == sealed(entries)[CHECKSUM]


def manifest_notes(manifest: Mapping[str, Any]) -> list[str]:
    """What a person should know of a data set before training on it."""
    said = manifest.get("origin", {}).get("notes", [])
    return [*([] if CHECKSUM in manifest else [NO_CHECKSUM]), *said]


def columns_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of every shard."""
    return tuple(manifest.get("columns", COLUMNS))


def _entries(manifest: Mapping[str, Any]) -> dict[str, type]:
    kinds = {"task": dict, "splits": dict}
    return kinds | ({"seed": int} if manifest["version"] == 1 else {"columns": list, "origin": dict})


def _check_sum(file: Path, manifest: dict[str, Any]) -> None:
    old = manifest["version"] == 1 and set(manifest) <= WITHOUT_CHECKSUM
    if not old and not is_sealed(manifest):
        found = f"SHA-256 {str(manifest[CHECKSUM])[:12]}..." if CHECKSUM in manifest else "no such entry"
        expected = f"SHA-256 {sealed(manifest)[CHECKSUM][:12]}..., as the other entries have"
        raise DataError(file, CHECKSUM, f"{found}: an entry is not as it was written", expected, COPY_AGAIN)


def _check_entries(file: Path, manifest: dict[str, Any]) -> None:
    """Every split lists its shards, and their scenes add up. Raises: DataError."""
    if not known_columns(columns_of(manifest)):
        raise DataError(file, "columns", "columns that this version does not know", "known ones", WRITE_AGAIN)
    for split in SPLITS:
        entry = manifest["splits"][split]
        shards = entry.get("shards")
        least = 0 if split == "test" and manifest["version"] > 1 else 1  # other people's files may have no test scenes
        whole = isinstance(shards, list) and len(shards) >= least and all(is_entry(each) for each in shards)
        if (
            not whole
            or type(entry.get("scenes")) is not int
            or entry["scenes"] != sum(each["scenes"] for each in shards)
        ):
            raise DataError(
                file, f"splits.{split}", "no whole list of shards", "every shard with its size and SHA-256", COPY_AGAIN
            )


def is_entry(entry: Any) -> bool:
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
