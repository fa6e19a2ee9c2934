"""What scenes show before the first step: their distributions, what is read twice, which of them are learned from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as fn

from bench.faults.healthy import with_shards
from bench.faults.patches import on_batches, on_features, on_output, wrap
from ris_fast.health.preflight.distributions import distributions, two_sample_distance
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.rereads import features_again, scenes_again
from ris_fast.health.preflight.scene_gradients import micro_batches, scenes_learned_from
from ris_fast.physics.scenes import Scenes
from ris_fast.training.trainer import Trainer
from tests.health.preflight.checking import small


def said(check: Any, trainer: Trainer) -> list[tuple[str, bool]]:
    context = PreflightContext(trainer)
    context.model.train()
    return [(finding.cause, finding.certain) for finding in check(context)]


def served(change: Callable[[Scenes], Scenes], split: str | None = None, twin: str = "backprojection") -> Trainer:
    trainer = Trainer(small(twin))
    on_batches(trainer, change, split)
    return trainer


# ---- distributions
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "change, certain",
    [
        (lambda scenes: replace(scenes, snr_db=scenes.snr_db + 70), True),
        (lambda scenes: replace(scenes, count=torch.ones_like(scenes.count)), False),
        (lambda scenes: replace(scenes, snapshots=3 * scenes.snapshots), False),
        (lambda scenes: replace(scenes, channel=scenes.channel + 0.3), False),
        (lambda scenes: replace(scenes, azimuth=scenes.azimuth.abs()), False),
    ],
    ids=["SNR beyond the task", "one source", "louder", "channel with a mean", "one side"],
)
def test_distributions_names_a_split_that_is_unlike(change: Any, certain: bool, split: str) -> None:
    assert said(distributions, served(change, split)) == [("distributions_differ", certain)]


@pytest.mark.parametrize(
    "settings",
    [
        {"task.snr_min_db": 15.0, "task.snr_max_db": 15.0},
        {"task.max_sources": 1, "loss.cross": 0.0, "loss.count": 0.0},
        {"data.train_scenes": 16, "data.fixed": True, "training.batch_size": 4},
        {"training.batch_size": 1},
        {"task.power": "path_loss", "task.phase_error_deg": 20.0, "task.channel_snr_db": 10.0},
    ],
    ids=["one SNR", "one source is the task", "sixteen scenes", "one scene a batch", "miscalibrated"],
)
def test_distributions_is_silent_about_splits_of_one_task(settings: dict[str, Any]) -> None:
    assert said(distributions, Trainer(small("backprojection", **settings))) == []


def test_distributions_only_notes_files_that_the_task_describes_loosely(tmp_path: Path) -> None:
    config = with_shards(small("backprojection"), tmp_path)
    trainer = Trainer(config)
    on_batches(trainer, lambda scenes: replace(scenes, snr_db=scenes.snr_db + 20))
    context = PreflightContext(trainer)
    assert list(distributions(context)) == [] and "the task says 10 to 20" in context.note
    trainer = Trainer(config)
    on_batches(trainer, lambda scenes: replace(scenes, snr_db=scenes.snr_db + 20), "val")
    assert said(distributions, trainer) == [("distributions_differ", False)]


def test_two_sample_distance_of_two_halves_is_one() -> None:
    values = torch.linspace(0, 1, 10).double()
    assert two_sample_distance(values, values) == 0.0 and two_sample_distance(values, values + 2) == 1.0
    assert two_sample_distance(values, values + 0.55) == pytest.approx(0.5)


# ---- what is read twice
# -----------------------------------------------------------------------------------------------


def noisy(scenes: Scenes) -> Scenes:
    return replace(scenes, snapshots=scenes.snapshots + 0.1 * torch.randn_like(scenes.snapshots))


def test_scenes_again_is_certain_of_validation_scenes_alone() -> None:
    assert said(scenes_again, served(noisy, "val")) == [("scenes_change", True)]
    assert said(scenes_again, served(noisy, "train")) == [("scenes_change", False)]  # it may be augmentation


def test_scenes_again_names_a_buffer_that_is_used_again() -> None:
    trainer, buffers = Trainer(small("backprojection")), {}

    def reused(batch: Callable) -> Callable:
        def read(split: str, index: Tensor) -> Scenes:
            scenes = batch(split, index)
            buffer = buffers.setdefault((split, len(index)), scenes.snapshots)
            return replace(scenes, snapshots=buffer.copy_(scenes.snapshots))

        return read

    wrap(trainer.source, "batch", reused)
    assert said(scenes_again, trainer) == [("scenes_change", True)]


@pytest.mark.parametrize("key", [lambda y: y.shape, lambda y: y.data_ptr()], ids=["shape", "address"])
def test_features_again_names_a_cache_by_a_key_that_scenes_share(key: Any) -> None:
    trainer, kept = Trainer(small("backprojection")), {}

    def cached(features: Callable) -> Callable:
        return lambda y, *rest: kept[key(y)] if key(y) in kept else kept.setdefault(key(y), features(y, *rest))

    on_features(trainer, cached)
    assert said(features_again, trainer) == [("scenes_change", True)]


def test_reread_checks_are_silent_about_caches_by_content_and_noise_in_features() -> None:
    trainer, kept = Trainer(small("backprojection")), {}
    on_features(
        trainer,
        lambda features: (
            lambda y, *rest: (
                kept[float(y.sum())] if float(y.sum()) in kept else kept.setdefault(float(y.sum()), features(y, *rest))
            )
        ),
    )
    assert said(features_again, trainer) == said(scenes_again, trainer) == []
    trainer = Trainer(small("backprojection"))
    on_features(
        trainer,
        lambda features: (
            lambda *given: (lambda made: made._replace(inputs=made.inputs + torch.randn_like(made.inputs)))(
                features(*given)
            )
        ),
    )
    assert said(features_again, trainer) == []


@pytest.mark.parametrize("twin", ["hybrid", "accumulate"])
def test_scene_checks_are_silent_about_healthy_trainers(twin: str) -> None:
    trainer = Trainer(small(twin))
    for check in (distributions, scenes_again, features_again, scenes_learned_from, micro_batches):
        assert said(check, trainer) == []


# ---- what is learned from
# ---------------------------------------------------------------------------------------------


def of_rows(rows: slice) -> Trainer:
    """The loss is that of some scenes of a batch."""
    trainer = Trainer(small("hybrid"))
    wrap(
        trainer.loss,
        "forward",
        lambda forward: lambda guess, scenes: forward(guess.apply(lambda value: value[rows]), scenes[rows]),
    )
    return trainer


def test_scenes_learned_from_counts_scenes_without_a_gradient() -> None:
    assert said(scenes_learned_from, of_rows(slice(0, 1))) == [("scenes_left_out", True)]
    assert said(scenes_learned_from, of_rows(slice(0, 20))) == [("scenes_left_out", False)]
    assert said(scenes_learned_from, of_rows(slice(0, 30))) == []


def test_scenes_learned_from_looks_inside_the_network() -> None:
    trainer = Trainer(small("backprojection"))
    on_output(trainer.model.head, lambda x: torch.cat((x[:4], x[4:].detach())))
    (finding,) = scenes_learned_from(PreflightContext(trainer))
    assert finding.cause == "scenes_left_out" and "norm" in finding.evidence


def test_scenes_learned_from_allows_scenes_dropped_by_chance() -> None:
    trainer = Trainer(small("backprojection"))
    on_output(trainer.model.blocks[0].outer, lambda x: fn.dropout1d(x[:, None], 0.4)[:, 0])
    assert said(scenes_learned_from, trainer) == []


def test_micro_batches_tells_numbers_from_scenes_and_from_chance() -> None:
    def with_path(reached: Callable[[Tensor], bool]) -> Trainer:
        trainer = Trainer(small("accumulate"))
        on_output(trainer.model.fuse, lambda x: x if reached(x) else x.detach())
        return trainer

    calls = iter(range(10**6))
    (finding,) = micro_batches(PreflightContext(with_path(lambda x: next(calls) % 3 > 0)))
    assert finding.cause == "micro_batches_differ" and "every third call" in finding.evidence and not finding.certain
    first = float(Trainer(small("accumulate"))._groups().__next__()[0].snapshots.sum())
    trainer, shown = Trainer(small("accumulate")), []
    wrap(trainer.step, "predict", lambda predict: lambda scenes: (shown.append(scenes), predict(scenes))[1])
    on_output(trainer.model.fuse, lambda x: x.detach() if float(shown[-1].snapshots.sum()) == first else x)
    assert said(micro_batches, trainer) == [("micro_batches_differ", False)]
    assert said(micro_batches, with_path(lambda x: bool(torch.rand(()) < 0.5))) == []
