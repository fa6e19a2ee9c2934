"""How good a trained run is: NMSE on its test scenes, by SNR and number of sources, beside floors and the Bayes line.

Legend: B batch, N RIS elements, K atoms.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from ris_fast.config import Config, ConfigError, Task
from ris_fast.data.source import SceneSource, open_source
from ris_fast.models import Prediction, build_model
from ris_fast.models.features import PursuitFeatures
from ris_fast.physics.floors import constant_nmse, mean_covariance, target_energy
from ris_fast.physics.scenes import Scenes
from ris_fast.report.floors import bayes_nmse
from ris_fast.settings import load_config
from ris_fast.training.checkpoint import load_checkpoint, load_weights
from ris_fast.training.devices import choose_device
from ris_fast.training.validation import scene_nmse

CHUNK = 500                # scenes at a time
FACTS = ("count", "snr_db", "network")
MEAN_SCENES = 4000         # training scenes behind the floor `mean`
SNR_BIN_DB = 5.0


@dataclass(frozen=True)
class Run:
    """A run folder opened for reading: its settings, and the better of its two sets of weights."""

    folder: Path
    config: Config
    weights: dict[str, Tensor]
    kind: str                    # "raw" or "ema"
    epoch: int


def evaluate(run: str | Path, scenes: int | None = None, device: str = "auto", data: str | None = None,
             progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """NMSE of a run's best weights on its test scenes, in float32 and evaluation mode.

    Args: run: run folder, its checkpoints folder, or a file in it. scenes: how many test scenes; all by default.
        data: folder of another data set of the same task, or of the run's own where it was moved.
        progress: called with (scenes read, scenes in all) while data files are read.
    Returns: plain numbers and texts: `nmse` (mean, median), `floors`, `bayes` (None for another task than RIS-12x12),
        and the same for each group of `by_snr` and `by_count`; see `group_figures`.
    Raises: ConfigError where there is no run or too few scenes, CheckpointError, DataError.
    """
    opened = open_run(run)
    if data is not None:
        opened = replace(opened, config=replace(opened.config, data=replace(opened.config.data, source="auto", path=data)))
    place = choose_device(device)
    source = open_source(opened.config, place, progress)
    size = _test_size(source, scenes)
    model = build_model(opened.config.model.name, opened.config.task, **opened.config.model.options)
    load_weights(model, opened.weights, str(opened.folder))
    began = time.monotonic()
    figures = scene_figures(model.to(place).eval(), opened.config.task, source, size)
    seconds = time.monotonic() - began
    standard = opened.config.task == Task()
    return {"run": str(opened.folder), "model": opened.config.model.name, "weights": opened.kind,
            "epoch": opened.epoch, "parameters": sum(each.numel() for each in model.parameters()),
            "device": str(place), "source": source.describe(), "scenes": size, "seconds": seconds,
            **group_figures(figures, standard), "by_snr": by_snr(figures, standard), "by_count": by_count(figures, standard)}


def open_run(path: str | Path) -> Run:
    """Finds the run around `path` and reads its settings and its best checkpoint."""
    path = Path(path)
    folder = next((each for each in (path, *path.parents[:2]) if (each / "config.toml").is_file()), None)
    if folder is None or not path.exists():
        raise ConfigError(f"{path} is not a run folder: there is no config.toml. Give the folder that train printed.")
    config = load_config(folder / "config.toml")
    groups, manifest = load_checkpoint(folder / "checkpoints", "best")
    kind = manifest["state"]["best_weights"]
    return Run(folder, config, groups["ema" if kind == "ema" else "model"], kind, manifest["state"]["epoch"])


@torch.no_grad()
def scene_figures(model: nn.Module, task: Task, source: SceneSource, size: int) -> dict[str, Tensor]:
    """Per test scene: `count`, `snr_db`, `network` (its NMSE) and the NMSE of each floor; (B,) on the CPU."""
    constant = mean_covariance(_batches(source, "train", min(MEAN_SCENES, source.size("train"))))
    usable = source.channel and task.symbols == "static"
    classical = PursuitFeatures(task, task.max_sources).to(source.device) if usable else None
    parts = [_batch_figures(model, classical, scenes, constant) for scenes in _batches(source, "test", size)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _batch_figures(model: nn.Module, classical: PursuitFeatures | None, scenes: Scenes,
                   constant: Tensor) -> dict[str, Tensor]:
    channel = scenes.collapsed if scenes.channel is None else scenes.channel
    inputs = (scenes.snapshots, channel, scenes.codes, scenes.snr_db)
    energy = target_energy(scenes)
    pursuit = {} if classical is None else {"pursuit": scene_nmse(found_sources(classical, *inputs), scenes).double()}
    return {"count": scenes.count, "snr_db": scenes.snr_db.double(), "network": scene_nmse(model(*inputs), scenes).double(),
            "zero": torch.ones_like(energy), "identity": 1.0 - scenes.codes.shape[-2] / energy,
            "mean": constant_nmse(constant, scenes), **pursuit}


def found_sources(classical: PursuitFeatures, *inputs: Tensor) -> Prediction:
    """The pursuit's own answer: columns s_k a_k of the atoms it found, (B, N, K, 2), without any network."""
    return Prediction(classical.sources(classical(*inputs)))


def group_figures(figures: dict[str, Tensor], standard: bool) -> dict[str, Any]:
    """`scenes`, `nmse` (mean and median), `floors` (means), `bayes` (mean of the line at each scene, or None)."""
    network = figures["network"]
    bayes = [bayes_nmse(k, snr) for k, snr in zip(figures["count"].tolist(), figures["snr_db"].tolist())] if standard else []
    return {"scenes": network.numel(), "nmse": {"mean": network.mean().item(), "median": network.quantile(0.5).item()},
            "floors": {name: values.mean().item() for name, values in figures.items() if name not in FACTS},
            "bayes": math.fsum(bayes) / len(bayes) if bayes else None}


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


def _split(figures: dict[str, Tensor], key: Tensor, standard: bool,
           label: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    groups = ((each, {name: values[key == each] for name, values in figures.items()}) for each in key.unique().tolist())
    return [label(each) | group_figures(part, standard) for each, part in groups]


def _batches(source: SceneSource, split: str, size: int) -> Iterator[Scenes]:
    return (source.batch(split, index) for index in torch.arange(size, device=source.index_device).split(CHUNK))


def _test_size(source: SceneSource, scenes: int | None) -> int:
    have = source.size("test")
    if have == 0:
        raise ConfigError(f"evaluate: there are no test scenes ({source.describe()}). Add a test split to the data.")
    wanted = have if scenes is None else scenes
    if not 1 <= wanted <= have:
        raise ConfigError(f"evaluate: {wanted} test scenes asked for; this run has {have}. Give --scenes 1 to {have}.")
    return wanted
