"""NMSE of every test scene, of a network and of each baseline, and the means by SNR and by number of sources.

Legend: B batch, N RIS elements, K atoms.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Task
from ris_fast.data.source import SceneSource
from ris_fast.localize.bootstrap import Bootstrap
from ris_fast.localize.groups import snr_bins
from ris_fast.localize.metrics import Ratios
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


@torch.no_grad()
def scene_figures(model: nn.Module, task: Task, source: SceneSource, size: int, constant: Tensor) -> dict[str, Tensor]:
    """Per test scene: `count`, `snr_db`, `network` (its NMSE) and the NMSE of each baseline; (B,) on the CPU.

    Behind the constant baselines: what the network's own inputs say without it, and the pursuit.
    Args: constant: the mean covariance, see `training_mean`.
    """
    pursuit = Pursuit(task).to(source.device) if source.channel else None
    parts = [_batch_figures(model, pursuit, task, scenes, constant) for scenes in scene_batches(source, "test", size)]
    return {name: estimate_nmse(torch.cat([part[name] for part in parts])).cpu() for name in parts[0]}


def training_mean(source: SceneSource) -> Tensor:
    """The mean covariance of some training scenes, (N, N, 2)."""
    return mean_covariance(scene_batches(source, "train", min(MEAN_SCENES, source.size("train"))))


class Pursuit(nn.Module):
    """The pursuit of a task as a network without a trainable part."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.features = features_for(task)

    def classical(self, features: Features) -> Classical:
        """Columns s_k a_k of the sources that it answers with, (B, N, K, 2)."""
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


class Grouped:
    """Means of the figures of groups of scenes, with bootstrap intervals of the network's.

    Args: figures: what `scene_figures` returns; standard: whether the MMSE bound is known for the task.
    """

    def __init__(self, figures: dict[str, Tensor], standard: bool) -> None:
        self.figures, self.standard = figures, standard
        self.bootstrap = Bootstrap(len(figures["count"]))

    def group(self, there: Tensor | None = None) -> dict[str, Any]:
        """`scenes`, `nmse` (mean and median), `nmse_interval`, `baselines` (means), `mmse_bound` (of these scenes, or
        None). Args: there: (B,) bool, all by default."""
        there = torch.ones_like(self.figures["count"], dtype=torch.bool) if there is None else there
        figures = {name: values[there] for name, values in self.figures.items()}
        network, scenes = figures["network"], (figures["count"].tolist(), figures["snr_db"].tolist())
        mean = Ratios(
            ("nmse",), network[None], torch.ones_like(network)[None], torch.tensor([False]), there.nonzero()[:, 0]
        )
        return {
            "scenes": network.numel(),
            "nmse": {"mean": network.mean().item(), "median": network.quantile(0.5).item()},
            "nmse_interval": self.bootstrap.intervals(mean)["nmse"],
            "baselines": {name: values.mean().item() for name, values in figures.items() if name not in FACTS},
            "mmse_bound": mmse_bound(*scenes) if self.standard else None,
        }

    def by(self, *axes: str) -> list[dict[str, Any]]:
        """One entry for each group that holds a scene: of each 5 dB, with `snr_db` = (from, to), each number of
        `sources`, or both."""
        bins, ends = snr_bins(self.figures["snr_db"])
        count = self.figures["count"]
        choices = {
            "snr_db": [(end, bins == each) for each, end in enumerate(ends)],
            "sources": [(each, count == each) for each in count.unique().tolist()],
        }
        cells = product(*(choices[axis] for axis in axes))
        groups = (
            (dict(zip(axes, labels)), torch.stack(masks).all(0)) for labels, masks in (zip(*cell) for cell in cells)
        )
        return [label | self.group(there) for label, there in groups if there.any()]


def scene_batches(source: SceneSource, split: str, size: int) -> Iterator[Scenes]:
    """The first `size` scenes of a split, CHUNK at a time."""
    return (source.batch(split, index) for index in torch.arange(size, device=source.index_device).split(CHUNK))
