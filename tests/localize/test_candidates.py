"""The pursuit's atoms as sources: where its features say, and where the sources are."""

import pytest
import torch

from ris_fast.config.schema import Task
from ris_fast.localize.candidates import pursuit_sources
from ris_fast.localize.sources import Sources
from ris_fast.models.simultaneous_pursuit import features_for
from ris_fast.physics.array import RISArray, steering
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import simulate


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
def test_positions_are_those_of_the_features_columns(symbols: str) -> None:
    task = Task(symbols=symbols)
    scenes = simulate(task, 8, SceneGenerator(5, "test"))
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    found = pursuit_sources(task, *given, 3)
    features = features_for(task, 3)
    columns = to_complex(features.atom_columns(features(*given))).mT  # (B, K, N)
    columns = columns.gather(1, columns.norm(dim=2).argsort(dim=1, descending=True)[..., None].expand_as(columns))
    steer = to_complex(steering(RISArray.of(task), found.azimuth, found.elevation, found.range_m))
    alike = (columns.conj() * steer).sum(2).abs() / columns.norm(dim=2)
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.power.sum(1), torch.ones(8))


def test_one_source_is_found() -> None:
    task = Task(max_sources=1, snr_min_db=20.0)
    scenes = simulate(task, 100, SceneGenerator(5, "test"))
    found = pursuit_sources(task, scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db, 1)
    true = Sources.of_scenes(scenes)
    assert (found.azimuth - true.azimuth).abs().median() < 0.02
    assert found.count.eq(1).all()


def test_count_keeps_the_atoms_of_most_worth() -> None:
    task = Task(max_sources=2, snr_min_db=20.0)
    scenes = simulate(task, 50, SceneGenerator(6, "test"))
    given = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    one, own = (pursuit_sources(task, *given, count=count) for count in (torch.ones(50, dtype=torch.int64), "order"))
    assert one.count.eq(1).all() and not one.power[:, 1:].any()
    assert (own.count == scenes.count).float().mean() > 0.75  # some second sources are below the noise
