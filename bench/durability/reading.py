"""What a run or a data set left on disk, read without any code of ours: by the formats of safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLOCK = {"seconds"}  # parts of a run's state that time decides, not arithmetic


def tensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Name of each tensor -> type, shape and SHA-256 of its bytes; and the manifest in the header.

    Raises: ValueError for a file that is not as long as its header says.
    """
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    manifest = json.loads(header.pop("__metadata__", {}).get("manifest", "{}"))
    if len(data) != max((entry["data_offsets"][1] for entry in header.values()), default=0):
        raise ValueError(f"{path} has {len(data)} bytes of tensors")
    found = {
        name: f"{entry['dtype']} {entry['shape']} {hashlib.sha256(data[slice(*entry['data_offsets'])]).hexdigest()}"
        for name, entry in header.items()
    }
    return found, manifest


def checkpoint(run: Path, name: str) -> tuple[dict[str, str], dict[str, Any]] | None:
    path = run / "checkpoints" / f"{name}.safetensors"
    return tensors(path) if path.is_file() else None


def best_score(run: Path) -> float | None:
    """Of the best checkpoint, None where there is none yet. Raises: ValueError."""
    found = checkpoint(run, "best")
    return None if found is None else float(found[1]["state"]["best_nmse"])


def result(run: Path) -> dict[str, Any]:
    """All of a finished run that an undisturbed one has to the same bit."""
    found: dict[str, Any] = {}
    for name in ("last", "best"):
        values, manifest = checkpoint(run, name) or ({}, {"state": {}})
        found |= {f"{name} {key}": value for key, value in values.items()}
        found |= {f"{name} state {key}": value for key, value in manifest["state"].items() if key not in CLOCK}
    try:
        found["verdict"] = json.loads((run / "summary.json").read_text())["verdict"]
    except (OSError, ValueError, KeyError) as error:
        found["verdict"] = f"no summary: {type(error).__name__}"
    return found


def epochs(run: Path) -> dict[str, Any]:
    """The validations and training losses that metrics.jsonl has in the end, by epoch."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("val_nmse_raw", "val_nmse_ema", "train_loss")
    return {f"epoch {row['epoch']} {key}": row[key] for row in rows if row.get("event") == "epoch" for key in kept}


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder -> SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def apart(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What differs, in names."""
    return [key for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]
