"""What to say of test scenes whose figures mean nothing: copies of training scenes, and targets of other scenes."""

from __future__ import annotations

import torch

from ris_fast.commands.scene_figures import CHUNK, scene_batches
from ris_fast.config.schema import Task
from ris_fast.data.fingerprints import find_overlap, scene_hashes
from ris_fast.data.npz_load import APART, clearly_apart
from ris_fast.data.source import SceneSource
from ris_fast.health.preflight.pairing import as_believed, belonging, with_factor
from ris_fast.health.preflight.probe import FEWEST


def training_scenes(source: SceneSource, size: int) -> list[str]:
    """What is to be said of test scenes that are training scenes, bit for bit; simulated splits have nothing in
    common."""
    if source.name == "simulate":
        return []
    hashes = {
        split: [value for scenes in scene_batches(source, split, most) for value in scene_hashes(scenes.snapshots)]
        for split, most in (("train", source.size("train")), ("test", size))
    }
    found = find_overlap("train", hashes["train"], "test", hashes["test"])
    return (
        [f"{found.count} of {found.total} test scenes are training scenes: these figures say nothing of new scenes"]
        if found.count
        else []
    )


@torch.no_grad()
def wrong_targets(source: SceneSource, task: Task, size: int) -> list[str]:
    """What is to be said of test targets that are not those of their scenes: neither of the sources in the files nor of
    the snapshots."""
    if source.name == "simulate":
        return []
    fit = source.target_fit("test")[:size] if hasattr(source, "target_fit") else torch.zeros(0)
    apart = clearly_apart(fit)
    if apart:
        return [
            f"in {apart} of {size} test scenes R does not belong to the scene's sources (NMSE of R on them"
            f" {float(fit[fit > APART].median()):.2g} at the median), or the task's array is not the files': these"
            " figures compare with wrong targets"
        ]
    few = torch.linspace(0, size - 1, min(size, CHUNK), device=source.index_device).long()
    scenes = as_believed(with_factor(source.batch("test", few)), task)
    if scenes.channel is None or scenes.factor is None:
        return []
    found = belonging(scenes, task.symbols == "static")
    if not found.mixed_up and int(found.broken.sum()) < max(FEWEST, 0.01 * int(found.decided.sum())):
        return []
    return [
        f"the sources of {len(few)} test scenes explain {max(found.group()[0], 0):.0%} of what the SNR promises of"
        " their snapshots: targets, channel and snapshots (or the snr labels) are not of the same scenes, so that"
        " these figures say nothing"
    ]
