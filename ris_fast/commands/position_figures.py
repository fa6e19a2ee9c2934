"""Positions of the test scenes by a network and by classical estimators, scored beside the Cramer-Rao bound.

Legend: B batch, K sources (padded).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ris_fast.commands.scene_figures import scene_batches
from ris_fast.config.schema import Task
from ris_fast.data.source import SceneSource
from ris_fast.localize.bootstrap import LEVEL, RESAMPLES, Bootstrap
from ris_fast.localize.bounds import deterministic_bound
from ris_fast.localize.groups import group_scores, groups
from ris_fast.localize.matching import NARROW, WIDE
from ris_fast.localize.metrics import Scores, confusion, score
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.localize.spectrum_map import spectrum_map
from ris_fast.physics.scenes import Scenes
from ris_fast.report.scene_plot import Example
from ris_fast.training.step import network_inputs

Estimator = Callable[[Scenes], Sources]


class Found(NamedTuple):
    """The sources of the test scenes, true and estimated; on the CPU."""

    truth: Sources
    bound: Deviations
    snr_db: Tensor  # (B,)
    estimates: dict[str, Sources]
    milliseconds: dict[str, float]  # a scene


def first_scene(source: SceneSource) -> Scenes:
    """One test scene, which shows what all of them carry."""
    return source.batch("test", torch.zeros(1, dtype=torch.int64, device=source.index_device))


def missing_for_positions(scene: Scenes) -> str | None:
    """Why positions cannot be scored on scenes like this one, for a person; None where they can."""
    if scene.azimuth is not None and scene.power is not None:
        return None
    return "positions are not scored: the test scenes carry a covariance, but not the positions of their sources"


@torch.no_grad()
def find_sources(
    estimators: Mapping[str, Estimator],
    task: Task,
    source: SceneSource,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The sources of the first `size` test scenes by each estimator, and the bound of the true ones."""
    truths, bounds, snrs, done = [], [], [], 0
    found: dict[str, list[Sources]] = {name: [] for name in estimators}
    seconds = dict.fromkeys(estimators, 0.0)
    for scenes in scene_batches(source, "test", size):
        for name, estimate in estimators.items():
            began = time.monotonic()
            found[name].append(_on_cpu(estimate(scenes)))
            seconds[name] += time.monotonic() - began
        truths.append(_on_cpu(Sources.of_scenes(scenes)))
        bounds.append(_bound(task, scenes))
        snrs.append(scenes.snr_db.cpu())
        done += scenes.batch
        if progress is not None:
            progress(done, size)
    return Found(
        _joined(truths),
        Deviations(*(torch.cat(each) for each in zip(*bounds))),
        torch.cat(snrs),
        {name: _joined(parts) for name, parts in found.items()},
        {name: 1e3 * each / size for name, each in seconds.items()},
    )


def _bound(task: Task, scenes: Scenes) -> Deviations:
    """The deterministic bound on the CPU; NaN without the channel, which it is made of."""
    if scenes.channel is None:
        return Deviations(*[torch.full(scenes.power.shape, torch.nan).double()] * 4)
    return Deviations(*(each.cpu() for each in deterministic_bound(task, scenes)))


def position_figures(found: Found, method: str) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Plain numbers of every estimator by SNR, number of sources and range, and the scores behind them.

    Args: method: how the network's positions were found, in words.
    """
    bootstrap = Bootstrap(len(found.snr_db))
    split = list(groups(found.truth.active, found.snr_db, found.truth.range_m))
    scores = {name: score(sources, found.truth, found.bound) for name, sources in found.estimates.items()}
    estimators = {
        name: {
            "milliseconds": found.milliseconds[name],
            "confusion": confusion(each).tolist(),
            "groups": group_scores(each, split, bootstrap),
        }
        for name, each in scores.items()
    }
    return {
        "method": method,
        "tolerances": {"wide": WIDE._asdict(), "narrow": NARROW._asdict()},
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "estimators": estimators,
    }, scores


def _on_cpu(sources: Sources) -> Sources:
    return Sources(*(each.cpu() for each in sources))


def _joined(parts: list[Sources]) -> Sources:
    """The scenes of all parts; rows of parts with fewer of them are padded with zeros."""
    wide = max(part.power.shape[1] for part in parts)
    padded = [
        [torch.nn.functional.pad(each, (0, wide - each.shape[1])) for each in part[:4]] + [part.count] for part in parts
    ]
    return Sources(*(torch.cat(each) for each in zip(*padded)))


@torch.no_grad()
def example_scene(model: nn.Module, task: Task, source: SceneSource, found: Found) -> Example:
    """A scene for a picture: with three sources, or as near to that as there is, and of those nearest to 12.5 dB."""
    unlike = 1000.0 * (found.truth.count - 3).abs() + (found.snr_db - 12.5).abs()
    index = int(unlike.argmin())
    scenes = source.batch("test", torch.tensor([index], device=source.index_device))
    estimate, one = next(iter(found.estimates.values())), slice(index, index + 1)
    factor = model(*network_inputs(scenes)).factor
    spectrum = spectrum_map(factor, task, estimate.count[one].to(factor.device))
    return Example(index, float(found.snr_db[index]), spectrum, found.truth.take(one), estimate.take(one))
