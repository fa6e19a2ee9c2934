"""NMSE of every test scene, of a network and of each baseline, and the means by SNR and by number of sources.

Legend: B batch, N RIS elements, K atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Task
from ris_fast.data.source import SceneSource
from ris_fast.models.classical import Classical, classical_estimate
from ris_fast.models.features import Features
from ris_fast.models.simultaneous_pursuit import features_for
from ris_fast.physics.baselines import constant_nmse, mean_covariance, target_energy
from ris_fast.physics.mmse_bound import mmse_bound
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import network_inputs
from ris_fast.training.validation import estimate_nmse, estimate_parts, scene_nmse

CHUNK = 500  # scenes at a time
FACTS = ("count", "snr_db", "network")
MEAN_SCENES = 4000  # training scenes behind the baseline `mean`
SNR_BIN_DB = 5.0


@torch.no_grad()
def scene_figures(model: nn.Module, task: Task, source: SceneSource, size: int) -> dict[str, Tensor]:
    """Per test scene: `count`, `snr_db`, `network` (its NMSE) and the NMSE of each baseline; (B,) on the CPU.

    Behind the constant baselines: what the network's own inputs say without it, and the pursuit.
    """
    constant = mean_covariance(scene_batches(source, "train", min(MEAN_SCENES, source.size("train"))))
    pursuit = Pursuit(task).to(source.device) if source.channel else None
    parts = [_batch_figures(model, pursuit, task, scenes, constant) for scenes in scene_batches(source, "test", size)]
    return {name: estimate_nmse(torch.cat([part[name] for part in parts])).cpu() for name in parts[0]}


class Pursuit(nn.Module):
    """The pursuit of a task as a network without a trainable part."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.features = features_for(task, task.max_sources)

    def classical(self, features: Features) -> Classical:
        """Columns s_k a_k of the atoms that were found, (B, N, K, 2)."""
        return Classical("pursuit", self.features.sources(features))


def _batch_figures(
    model: nn.Module, pursuit: Pursuit | None, task: Task, scenes: Scenes, constant: Tensor
) -> dict[str, Tensor]:
    """Estimates in parts, see `estimate_nmse`."""
    inputs, energy = network_inputs(scenes), target_energy(scenes)
    figures = {
        "count": scenes.count,
        "snr_db": scenes.snr_db.double(),
        "network": scene_nmse(model(*inputs), scenes).double(),
        "zero": torch.ones_like(energy),
        "identity": 1.0 - scenes.codes.shape[-2] / energy,
        "mean": constant_nmse(constant, scenes),
    }
    for each in filter(None, (model, pursuit)):
        if "pursuit" not in figures:  # a network of a pursuit shows its own
            found = classical_estimate(each, each.features(*inputs), scenes, static=task.symbols == "static")
            figures |= {} if found is None else {found.name: estimate_parts(found, scenes, constant)}
    return figures


def group_figures(figures: dict[str, Tensor], standard: bool) -> dict[str, Any]:
    """`scenes`, `nmse` (mean and median), `baselines` (means), `mmse_bound` (of these scenes, or None)."""
    network, scenes = figures["network"], (figures["count"].tolist(), figures["snr_db"].tolist())
    return {
        "scenes": network.numel(),
        "nmse": {"mean": network.mean().item(), "median": network.quantile(0.5).item()},
        "baselines": {name: values.mean().item() for name, values in figures.items() if name not in FACTS},
        "mmse_bound": mmse_bound(*scenes) if standard else None,
    }


def by_snr(figures: dict[str, Tensor], standard: bool) -> list[dict[str, Any]]:
    """One entry for each 5 dB that holds a scene, with `snr_db` = (from, to); the last bin keeps its upper end."""
    snr = figures["snr_db"]
    first = math.floor(snr.min().item() / SNR_BIN_DB)
    last = max(first, math.ceil(snr.max().item() / SNR_BIN_DB) - 1)
    bins = (snr / SNR_BIN_DB).floor().clamp(first, last).to(torch.int64)
    return _split(figures, bins, standard, lambda each: {"snr_db": (each * SNR_BIN_DB, (each + 1) * SNR_BIN_DB)})


def by_count(figures: dict[str, Tensor], standard: bool) -> list[dict[str, Any]]:
    """One entry for each number of `sources` that occurs."""
    return _split(figures, figures["count"], standard, lambda each: {"sources": each})


def _split(
    figures: dict[str, Tensor], key: Tensor, standard: bool, label: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    groups = ((each, {name: values[key == each] for name, values in figures.items()}) for each in key.unique().tolist())
    return [label(each) | group_figures(part, standard) for each, part in groups]


def scene_batches(source: SceneSource, split: str, size: int) -> Iterator[Scenes]:
    """The first `size` scenes of a split, CHUNK at a time."""
    return (source.batch(split, index) for index in torch.arange(size, device=source.index_device).split(CHUNK))
