"""A data set while it is written: a folder OUT.partial with a plan, whole shards, and a receipt beside each of them.

A receipt is what the manifest will say of the shard, made from the bytes in memory before they are written, and has a
checksum of its own: a shard is kept by a later call only if every byte of both is as it was meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ris_fast.config.schema import ConfigError
from ris_fast.data.data_path import PLAN
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import MANIFEST, file_hash, is_entry, is_sealed, sealed
from ris_fast.files import locked, make_folder, replacing, write_text, writing

REMOVE = "Remove it or choose another --out."
RECEIPT = ".json"  # NAME.json beside NAME.safetensors


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def unfinished(out: Path, plan: Mapping[str, Any], bytes_needed: float, scenes: int) -> Iterator[Path]:
    """OUT.partial, made and held alone within the block, with this plan.

    Args: plan: what determines every byte of the data set. bytes_needed: of all its shards.
    Raises: DataError where OUT is not empty, where the work there is of another data set, or the disk is too small;
        ConfigError where another process writes there; StorageError.
    """
    partial = partial_of(out)
    with writing(out):
        _check_target(out, partial, plan)
        _check_room(partial, bytes_needed, scenes)
    make_folder(partial)
    with _alone(partial):
        _check_target(out, partial, plan)  # another process may have finished while this one looked
        write_text(partial / PLAN, json.dumps(plan, indent=1) + "\n")
        yield partial


def write_shard(path: Path, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a shard and returns `entry` with its name, size and SHA-256; `keep` makes it a receipt.

    The hash is of the bytes in memory: what a disk or a memory changes on the way is found later, and not taken for
    right.
    """
    raw = save(dict(tensors))
    with replacing(path) as file, open(file, "wb") as stream:
        stream.write(raw)
    return {"file": path.name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), **entry}


def keep(folder: Path, entry: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
    """Leaves the receipt of a shard. Args: facts: what else a later call must know of it, as plain JSON."""
    receipt = sealed({"entry": entry, "facts": facts or {}})
    write_text((folder / entry["file"]).with_suffix(RECEIPT), json.dumps(receipt) + "\n")


def kept(path: Path, rows: int) -> dict[str, Any] | None:
    """The receipt {entry, facts} of a shard that an earlier call finished; None where any byte is not as it was
    written."""
    try:
        receipt = json.loads(path.with_suffix(RECEIPT).read_text(encoding="utf-8"))
        entry = receipt["entry"] if isinstance(receipt, dict) and is_sealed(receipt) else None
        if not is_entry(entry) or (entry["file"], entry["scenes"]) != (path.name, rows):
            return None
        return receipt if file_hash(path) == entry["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def finish(partial: Path, out: Path, manifest: Mapping[str, Any]) -> None:
    """Gives the folder its name, and then takes away the plan, the receipts and what killed writers left.

    In this order: a call that is killed in between leaves a whole data set, and never work without its receipts.
    """
    write_text(partial / MANIFEST, json.dumps(sealed(manifest), indent=1) + "\n")
    with writing(out):
        os.replace(partial, out)
    _tidy(out)


def completed(out: Path, plan: Mapping[str, Any]) -> bool:
    """Whether OUT is this very data set, but for the tidying before which a call was killed; tidies it then."""
    if not (out / MANIFEST).is_file() or read_plan(out) != json.loads(json.dumps(plan)):
        return False
    _tidy(out)
    return True


def _tidy(out: Path) -> None:
    """The plan last: while it is there, the same command again does the rest."""
    with suppress(OSError):
        for left in (*out.glob(f"*-*{RECEIPT}"), *out.glob(".*.partial"), out / PLAN):
            left.unlink(missing_ok=True)


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keeps two processes from writing one data set. Raises: ConfigError."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(partial))
        except BlockingIOError:
            raise ConfigError(
                f"{partial}: another process is writing this data set. Wait for it or stop it, or choose another --out."
            ) from None
        yield


def _check_target(out: Path, partial: Path, plan: Mapping[str, Any]) -> None:
    """The target is new or empty, and unfinished work there is of this very data set. Raises: DataError."""
    expected = "a new or empty folder"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(out, "", "something there already", expected, REMOVE)
    if out.is_symlink():
        raise DataError(out, "", "a link that leads in a circle", expected, REMOVE)
    if out.is_mount():
        raise DataError(
            out,
            "",
            "a mount point, which no finished data set can take the name of",
            "a folder within it",
            f"Give --out {shlex.quote(str(out / 'scenes'))}.",
        )
    begun = any(path.name != PLAN for path in partial.glob("[!.]*"))
    there = read_plan(partial)
    if begun and there is None:
        todo = f"Get the right to read it, or remove {shlex.quote(str(partial))} to begin anew."
        raise DataError(partial / PLAN, "", "no file that can be read as a plan", "that of the unfinished work", todo)
    if begun and there != json.loads(json.dumps(plan)):
        raise DataError(
            partial,
            "",
            "the unfinished work of another data set",
            "the same task, seed and sizes, from the same files",
            "Remove it, or run the earlier command again to finish it.",
        )


def _check_room(partial: Path, bytes_needed: float, scenes: int) -> None:
    """Refuses a data set that the disk cannot hold before hours of work, not after. A disk without size passes."""
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    disk = shutil.disk_usage(next(folder for folder in (partial, *partial.parents) if folder.exists()))
    if disk.total and bytes_needed - there > disk.free:
        raise DataError(
            partial,
            "",
            f"{disk.free / 1e9:,.1f} GB free",
            f"{(bytes_needed - there) / 1e9:,.1f} GB for {scenes:,} scenes",
            "Free space there, or write elsewhere (--out).",
        )


def read_plan(partial: Path) -> Any:
    try:
        return json.loads((partial / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
