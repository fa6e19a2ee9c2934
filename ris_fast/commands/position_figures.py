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
from ris_fast.localize.angle_map import AngleMap, angle_map
from ris_fast.localize.bootstrap import LEVEL, RESAMPLES, Bootstrap
from ris_fast.localize.bounds import deterministic_bound
from ris_fast.localize.groups import group_scores, groups
from ris_fast.localize.locate import locate
from ris_fast.localize.matching import NARROW, WIDE
from ris_fast.localize.metrics import Scores, confusion, score
from ris_fast.localize.opponents import Answer
from ris_fast.localize.sources import Deviations, Sources
from ris_fast.models.classical import Classical
from ris_fast.physics.scenes import Scenes
from ris_fast.report.scene_plot import Example
from ris_fast.training.step import network_inputs
from ris_fast.training.validation import estimate_nmse, estimate_parts

MAP = (121, 241, 20)  # elevations, azimuths and ranges of the spectrum that is drawn

Estimator = Callable[[Scenes], Answer]


class Found(NamedTuple):
    """The sources of the test scenes, true and estimated; on the CPU."""

    truth: Sources
    bound: Deviations
    snr_db: Tensor  # (B,)
    estimates: dict[str, Sources]
    nmse: dict[str, Tensor]  # (B,) of the covariance of each estimator
    milliseconds: dict[str, float]  # a scene


def first_scene(source: SceneSource) -> Scenes:
    """One test scene, which shows what all of them carry."""
    return source.batch("test", torch.zeros(1, dtype=torch.int64, device=source.index_device))


def missing_for_positions(scene: Scenes, opponents: bool) -> list[str]:
    """What cannot be scored on scenes like this one, and why, for a person."""
    if scene.azimuth is None:
        return ["positions are not scored: the test scenes carry no positions of their sources"]
    which = {"the Cramer-Rao bound": scene.channel is None or scene.power is None}
    which |= {"classical estimators": opponents and scene.channel is None}
    lost = [name for name, missing in which.items() if missing]
    carried = "channel" if scene.channel is None else "powers of their sources"
    return [f"positions are scored without {' and '.join(lost)}: the test scenes carry no {carried}"] if lost else []


def true_sources(scenes: Scenes) -> Sources:
    """The truth of scenes that carry positions; of unit power, in the scene's order, where powers are not known."""
    if scenes.power is not None:
        return Sources.of_scenes(scenes)
    there = torch.arange(scenes.azimuth.shape[1], device=scenes.count.device) < scenes.count[:, None]
    return Sources(scenes.azimuth, scenes.elevation, scenes.range_m, there.float(), scenes.count)


@torch.no_grad()
def find_sources(
    estimators: Mapping[str, Estimator],
    task: Task,
    source: SceneSource,
    size: int,
    constant: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The sources of the first `size` test scenes by each estimator, and the bound of the true ones.

    Args: constant: the mean covariance (N, N, 2), towards which an estimate of the field is shrunk for its NMSE.
    """
    found, parts = ({name: [] for name in estimators} for _ in range(2))
    seconds, truths, bounds, snrs, done = dict.fromkeys(estimators, 0.0), [], [], [], 0
    for scenes in scene_batches(source, "test", size):
        for name, estimate in estimators.items():
            began = time.monotonic()
            answer = estimate(scenes)
            sources = locate(answer.factor, task) if answer.sources is None else answer.sources
            found[name].append(_on_cpu(sources))
            seconds[name] += time.monotonic() - began
            classical = Classical(name, answer.factor, field=answer.sources is None)
            parts[name].append(estimate_parts(classical, scenes, constant))
        truths.append(_on_cpu(true_sources(scenes)))
        bounds.append(_bound(task, scenes))
        snrs.append(scenes.snr_db.cpu())
        done += scenes.batch
        if progress is not None:
            progress(done, size)
    return Found(
        _joined(truths),
        Deviations(*(torch.cat(each) for each in zip(*bounds))),
        torch.cat(snrs),
        {name: _joined(each) for name, each in found.items()},
        {name: estimate_nmse(torch.cat(each)).cpu() for name, each in parts.items()},
        {name: 1e3 * each / size for name, each in seconds.items()},
    )


def _bound(task: Task, scenes: Scenes) -> Deviations:
    """The deterministic bound on the CPU; NaN without the channel and the powers, which it is made of."""
    if scenes.channel is None or scenes.power is None:
        return Deviations(*[torch.full(scenes.azimuth.shape, torch.nan).double()] * 4)
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
    factor = model(*network_inputs(scenes)).factor[0]
    spectrum = angle_map(factor, task, count=max(1, int(estimate.count[index])), shape=MAP)
    return Example(
        index,
        float(found.snr_db[index]),
        AngleMap(*(each.cpu() for each in spectrum)),
        found.truth.take(one),
        estimate.take(one),
    )
