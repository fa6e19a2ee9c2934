"""The manifest of a converted data set, with what a person should know of the files that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ris_fast.config.schema import Config, Task
from ris_fast.data.arrays import safetensors_arrays
from ris_fast.data.conversion.building import reach_list, together
from ris_fast.data.data_path import ONE_POOL
from ris_fast.data.fingerprints import find_copies, find_overlap, scene_hashes
from ris_fast.data.geometry import CENTRED
from ris_fast.data.npz_load import Facts
from ris_fast.data.npz_notes import NO_CHANNEL, channel_notes, fit_note, geometry_notes, snr_notes
from ris_fast.data.open_source import widened_sector
from ris_fast.data.statistics import merge
from ris_fast.physics.random import SPLITS

CHUNK = 512
Receipts = Mapping[str, list[dict[str, Any]]]


def final_manifest(
    config: Config, origin: str, plan: Mapping[str, Any], receipts: Receipts, folder: Path
) -> dict[str, Any]:
    """The manifest of the shards in `folder`. Its task has a sector that holds the sources as they are served."""
    columns, exact = plan["columns"], "power" in plan["columns"]
    offset = plan["offsets"].get("train", plan["offsets"].get(ONE_POOL, CENTRED))
    seen = SPLITS if ONE_POOL in plan["offsets"] else ("train",)  # as `NpzSource` sees them
    facts = together(exact, tuple(offset), [each["facts"] for split in seen for each in receipts[split]])
    reach = (facts.stored, facts.served) if "azimuth" in columns else None
    wider, notes = widened_sector(config, reach)
    if "target_nmse" in columns:
        facts.fits = list(_column(folder, receipts["train"], "target_nmse"))
    notes = [*_overlap_notes(folder, receipts), *notes, *_notes(config.task, plan, facts, folder, receipts)]
    entries = {split: [each["entry"] for each in receipts[split]] for split in SPLITS}
    return {
        **{key: plan[key] for key in ("format", "version")},
        "task": asdict(wider.task),
        **{key: plan[key] for key in ("scenes", "shard_scenes", "columns")},
        "origin": {
            "format": origin,
            "files": [each[1] for each in plan["files"]],
            "offsets": plan["offsets"],
            "notes": notes,
            **({} if reach is None else {"reach": {"stored": reach_list(reach[0]), "served": reach_list(reach[1])}}),
        },
        "splits": {
            split: {
                "scenes": plan["scenes"][split],
                "shards": shards,
                "statistics": merge([each["statistics"] for each in shards]) if shards else {},
            }
            for split, shards in entries.items()
        },
    }


def _notes(task: Task, plan: Mapping[str, Any], facts: Facts, folder: Path, receipts: Receipts) -> list[str]:
    notes = [NO_CHANNEL] if "channel" not in plan["columns"] else []
    notes += geometry_notes(facts)
    notes += [fit_note(torch.cat(facts.fits))] if facts.fits else []
    notes += channel_notes(facts)
    if others := sum(each["facts"]["other_powers"] for shards in receipts.values() for each in shards):
        notes.append(f"in {others} scenes the given powers are not those of R: those of R are used")
    return notes + snr_notes(torch.cat(list(_column(folder, receipts["train"], "snr_db"))), task)


def _overlap_notes(folder: Path, receipts: Receipts) -> list[str]:
    """Scenes that are there twice; whether training scenes are in validation is looked at whenever a set is opened."""
    hashes = {
        split: np.concatenate(
            [np.empty(0, np.uint64), *(scene_hashes(part) for part in _column(folder, shards, "snapshots"))]
        )
        for split, shards in receipts.items()
    }
    overlaps = [find_overlap(first, hashes[first], "test", hashes["test"]) for first in ("train", "val")]
    notes = [str(overlap) for overlap in overlaps if overlap.count]
    if copies := find_copies(hashes["train"]):
        notes.append(f"{copies} of {len(hashes['train'])} train scenes repeat an earlier one")
    return notes


def _column(folder: Path, shards: list[dict[str, Any]], name: str) -> Iterator[Tensor]:
    """A column of a split, some rows at a time."""
    for each in shards:
        path = folder / each["entry"]["file"]
        rows = safetensors_arrays(path, (name,))[name].chunks(CHUNK, each["entry"]["scenes"])
        yield from (torch.from_numpy(np.ascontiguousarray(part)) for part in rows)
