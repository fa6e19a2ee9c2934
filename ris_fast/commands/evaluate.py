"""How good a trained run is: NMSE on its test scenes, by SNR and number of sources, beside baselines and the MMSE bound.

Legend: B batch, N RIS elements, K atoms.
"""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.commands.run_folder import run_config
from ris_fast.config.schema import Config, ConfigError, Task
from ris_fast.data.errors import DataError
from ris_fast.data.fingerprints import find_overlap, scene_hashes
from ris_fast.data.npz_load import APART, clearly_apart
from ris_fast.data.open_source import open_source
from ris_fast.data.source import SceneSource
from ris_fast.health.preflight.pairing import belonging, with_factor
from ris_fast.health.preflight.probe import FEWEST
from ris_fast.models import Prediction, build_model
from ris_fast.models.features import SceneFeatures
from ris_fast.models.simultaneous_pursuit import features_for
from ris_fast.physics.baselines import constant_nmse, mean_covariance, target_energy
from ris_fast.physics.scenes import Scenes
from ris_fast.report.baselines import FEW, bayes_nmse
from ris_fast.training.checkpoint import CHECKPOINTS, better_weights, checkpoint_of, load_weights
from ris_fast.training.compiled_model import choose_device
from ris_fast.training.validation import scene_nmse

CHUNK = 500  # scenes at a time
FACTS = ("count", "snr_db", "network")
MEAN_SCENES = 4000  # training scenes behind the baseline `mean`
SNR_BIN_DB = 5.0
SETTINGS_ADVICE = re.compile(r"--set|--preset|\btask\.|settings")  # what a run that is being evaluated cannot be given


@dataclass(frozen=True)
class Run:
    """A run folder opened for reading: its settings, and the better of the two sets of weights of one checkpoint."""

    folder: Path
    config: Config
    checkpoint: str  # its name: "best", "last"
    weights: dict[str, Tensor]
    kind: str  # "raw" or "ema"
    epoch: int
    notes: tuple[str, ...]


class EvaluationError(ValueError):
    """An evaluation without a figure; the message says where it is lost. Exit code 3."""

    exit_code = 3


def evaluate(
    run: str | Path,
    scenes: int | None = None,
    device: str = "auto",
    data: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """NMSE of a run's weights on its test scenes, in float32 and evaluation mode.

    Args: run: run folder or its checkpoints folder, whose best checkpoint is meant, or a checkpoint. scenes: how many
        test scenes; all by default.
        data: folder of another data set of the same task, or of the run's own where it was moved.
        progress: called with (scenes read, scenes in all) while data files are read.
    Returns: plain numbers and texts: `nmse` (mean, median), `baselines`, `mmse_bound` (None for another task than RIS-12x12,
        and for fewer than FEW scenes), and the same for each group of `by_snr` and `by_count`, see `group_figures`;
        `notes` for a person.
    Raises: ConfigError where there is no run or too few scenes, CheckpointError, DataError; EvaluationError where the
        network's answers are not finite.
    """
    opened = open_run(run)
    if data is not None:
        opened = replace(
            opened, config=replace(opened.config, data=replace(opened.config.data, source="auto", path=data))
        )
    place = choose_device(device)
    source = _test_scenes(opened, place, progress)
    size = _test_size(source, scenes)
    model = build_model(opened.config.model.name, opened.config.task, **opened.config.model.options)
    load_weights(model, opened.weights, str(opened.folder))
    began = time.monotonic()
    figures = scene_figures(model.to(place).eval(), opened.config.task, source, size)
    _refuse_nonfinite(figures["network"], opened)
    seconds = time.monotonic() - began
    standard = opened.config.task == Task()
    return {
        "run": str(opened.folder),
        "model": opened.config.model.name,
        "checkpoint": opened.checkpoint,
        "weights": opened.kind,
        "notes": [*opened.notes, *training_scenes(source, size), *wrong_targets(source, opened.config.task, size)],
        "standard": standard,
        "epoch": opened.epoch,
        "parameters": sum(each.numel() for each in model.parameters()),
        "device": str(place),
        "source": source.describe(),
        "scenes": size,
        "seconds": seconds,
        **group_figures(figures, standard),
        "by_snr": by_snr(figures, standard),
        "by_count": by_count(figures, standard),
    }


def _test_scenes(run: Run, device: torch.device, progress: Callable[[int, int], None] | None) -> SceneSource:
    """The run's data. Raises: DataError whose advice `evaluate` can follow: a trained network has its task for good."""
    try:
        return open_source(run.config, device, progress)
    except DataError as error:
        if not SETTINGS_ADVICE.search(error.todo):
            raise
        file = shlex.quote(str(run.folder / "config.toml"))
        raise DataError(
            error.where,
            error.key,
            error.found,
            error.expected,
            "The network was trained for the task of its run. "
            f"Write scenes of it: ris-fast simulate {file} --out DIR --scenes 1000, and give --data DIR.",
        ) from None


def open_run(path: str | Path) -> Run:
    """Reads the settings of a run and one checkpoint: the best one of a run folder, or the one that `path` names."""
    path = Path(path)
    folder, name = checkpoint_of(path)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{path} is not a run folder: there is no config.toml. Give the folder that train printed.")
    config = run_config(folder)
    weights, kind, manifest = better_weights(folder / CHECKPOINTS, name)
    return Run(
        folder,
        config,
        name,
        weights,
        kind,
        manifest["state"]["epoch"],
        (manifest["note"],) if "note" in manifest else (),
    )


def _refuse_nonfinite(nmse: Tensor, run: Run) -> None:
    """Raises EvaluationError where the network's answer to a scene is not finite."""
    lost = (~nmse.isfinite()).nonzero().flatten()
    if not len(lost):
        return
    weights = [
        name for name, value in run.weights.items() if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    why = f"its weights are not, first '{weights[0]}'" if weights else "its weights are"
    raise EvaluationError(
        f"{run.folder}, checkpoint '{run.checkpoint}': the network's answer is not finite for {len(lost)} of"
        f" {nmse.numel()} test scenes, first scene {int(lost[0])}; {why}. There is no mean NMSE. Evaluate another"
        " checkpoint of this run."
    )


def training_scenes(source: SceneSource, size: int) -> list[str]:
    """What is to be said of test scenes that are training scenes, bit for bit; simulated splits have nothing in
    common."""
    if source.name == "simulate":
        return []
    hashes = {
        split: [value for scenes in _batches(source, split, most) for value in scene_hashes(scenes.snapshots)]
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
    scenes = with_factor(source.batch("test", few))
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


@torch.no_grad()
def scene_figures(model: nn.Module, task: Task, source: SceneSource, size: int) -> dict[str, Tensor]:
    """Per test scene: `count`, `snr_db`, `network` (its NMSE) and the NMSE of each baseline; (B,) on the CPU."""
    constant = mean_covariance(_batches(source, "train", min(MEAN_SCENES, source.size("train"))))
    classical = features_for(task, task.max_sources).to(source.device) if source.channel else None
    parts = [_batch_figures(model, classical, scenes, constant) for scenes in _batches(source, "test", size)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _batch_figures(
    model: nn.Module, classical: SceneFeatures | None, scenes: Scenes, constant: Tensor
) -> dict[str, Tensor]:
    channel = scenes.effective_channel if scenes.channel is None else scenes.channel
    inputs = (scenes.snapshots, channel, scenes.codes, scenes.snr_db)
    energy = target_energy(scenes)
    pursuit = {} if classical is None else {"pursuit": scene_nmse(found_sources(classical, *inputs), scenes).double()}
    return {
        "count": scenes.count,
        "snr_db": scenes.snr_db.double(),
        "network": scene_nmse(model(*inputs), scenes).double(),
        "zero": torch.ones_like(energy),
        "identity": 1.0 - scenes.codes.shape[-2] / energy,
        "mean": constant_nmse(constant, scenes),
        **pursuit,
    }


def found_sources(classical: SceneFeatures, *inputs: Tensor) -> Prediction:
    """The pursuit's own answer: columns s_k a_k of the atoms it found, (B, N, K, 2), without any network."""
    return Prediction(classical.sources(classical(*inputs)))


def group_figures(figures: dict[str, Tensor], standard: bool) -> dict[str, Any]:
    """`scenes`, `nmse` (mean and median), `baselines` (means), `mmse_bound` (mean of the line at each scene, or None).

    The line is an expectation: the mean over a few scenes may be on either side of it, so that fewer than FEW have
        none.
    """
    network = figures["network"]
    enough = standard and network.numel() >= FEW
    mmse_bound = (
        [bayes_nmse(k, snr) for k, snr in zip(figures["count"].tolist(), figures["snr_db"].tolist())] if enough else []
    )
    return {
        "scenes": network.numel(),
        "nmse": {"mean": network.mean().item(), "median": network.quantile(0.5).item()},
        "baselines": {name: values.mean().item() for name, values in figures.items() if name not in FACTS},
        "mmse_bound": math.fsum(mmse_bound) / len(mmse_bound) if mmse_bound else None,
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
