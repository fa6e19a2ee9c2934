"""A channel of the user's own: the built-in scenes from the built-in channel, and a line for every law it breaks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ris_fast.config.schema import ConfigError, Task
from ris_fast.physics import own_channel
from ris_fast.physics.channel import effective_channel
from ris_fast.physics.random import QUANTITIES, SPLITS, OwnGenerator, SceneGenerator
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import check_physics, simulate

SMALL = {"bs_antennas": 3, "ris_horizontal": 4, "ris_vertical": 5, "snapshots": 6}
BUILT_IN = """
from ris_fast.config.schema import Task
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate

def draw(task, index, generator):
    plain = task.changed(channel="", channel_snr_db=0.0)
    return simulate(plain, index, SceneGenerator(generator.seed, generator.split, generator.device)).channel
"""
NORMAL = "generator.normal(index, 'h', 120).view(-1, 3, 20, 2)"


def own(tmp_path: Path, body: str, name: str = "own.py", **task: object) -> Task:
    """A task whose channel is this function: its body, or a whole file."""
    text = body if "def draw" in body else f"import torch\ndef draw(task, index, generator):\n    {body}\n"
    (tmp_path / name).write_text(text)
    return Task(**SMALL, channel=f"{tmp_path / name}:draw", **task)


@pytest.mark.parametrize("symbols", ["static", "per_snapshot"])
@pytest.mark.parametrize("wavefront", ["fresnel", "spherical"])
def test_built_in_channel_as_ones_own_makes_the_built_in_scenes(tmp_path: Path, symbols: str, wavefront: str) -> None:
    task = own(tmp_path, BUILT_IN, symbols=symbols, wavefront=wavefront, phase_error_deg=5.0, channel_snr_db=20.0)
    mine = simulate(task, 9, SceneGenerator(4, "val"))
    plain = simulate(task.changed(channel="", channel_snr_db=0.0), 9, SceneGenerator(4, "val"))
    assert torch.equal(mine.snapshots, plain.snapshots) and torch.equal(mine.factor, plain.factor)
    away = (mine.channel - plain.channel).square().mean((1, 2, 3)) / plain.channel.square().mean((1, 2, 3))
    assert abs(float(away.mean()) - 0.01) < 0.002  # the error of its estimate is added to one's own, too


def test_own_channel_is_what_the_snapshots_went_through(tmp_path: Path) -> None:
    """Complex or real pairs; without noise y_l = H (c_l o x) of one source, whatever the unit of H."""
    bodies = (f"return 1e-6 * {NORMAL}", f"return torch.view_as_complex(1e-6 * {NORMAL}).to(torch.complex128)")
    made = []
    for number, body in enumerate(bodies):
        task = own(tmp_path, body, f"{number}.py", max_sources=1, snr_min_db=120.0, snr_max_db=120.0)
        assert check_physics(task, "cpu") == []
        made.append(simulate(task, 5, SceneGenerator(1)))
    scenes = made[0]
    assert torch.equal(scenes.channel, made[1].channel)
    field = scenes.factor.squeeze(2).transpose(0, 1)[:, :, None]  # (N, B, 1, 2)
    seen = effective_channel(
        torch.view_as_real(to_complex(scenes.channel) * to_complex(field)[..., 0].T[:, None]), scenes.codes
    )
    seen, there = to_complex(seen).flatten(1), to_complex(scenes.snapshots).flatten(1)
    overlap = (seen.conj() * there).sum(1).abs() / seen.norm(dim=1) / there.norm(dim=1)
    assert overlap.min() > 1 - 1e-5


@pytest.mark.parametrize(
    "body, said",
    [
        ("return torch.randn(len(index), 3, 20, 2)", "another channel when it is called again"),
        (f"h = {NORMAL}; return h / h.norm()", "scene 5 of train another channel alone"),
        (f"return {NORMAL}.flip(0)", "scene 5 of train another channel in another order|another channel alone"),
        ("return torch.ones(len(index), 20, 3, 2)", r"float32 of shape \(5, 20, 3, 2\) for 5 scenes"),
        ("return torch.ones(len(index), 3, 20)", "A real part alone is no channel"),
        ("return torch.ones(len(index), 3, 20, 2).long()", "gives torch.int64"),
        ("return [1.0]", "gives a list"),
        (f"h = {NORMAL}.clone(); h[index == 1] = float('nan'); return h", "NaN or infinity in scene 1 of train"),
        ("return torch.zeros(len(index), 3, 20, 2)", "rms 0 in scene 5"),
        (f"index += 1; return {NORMAL}", "changes the scene numbers"),
        ("return 1 / 0", r"raises ZeroDivisionError: division by zero \(own.py, line 3\)"),
    ],
)
def test_own_channel_that_breaks_a_law_is_named(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"task.channel = own.py:draw .*({said})") as raised:
        check_physics(own(tmp_path, body), "cpu")
    assert "\n" not in str(raised.value)


def test_own_channel_is_noted_where_all_scenes_share_it_or_only_rounding_differs(tmp_path: Path) -> None:
    (note,) = check_physics(own(tmp_path, "return torch.ones(len(index), 3, 20, 2)", "one.py"), "cpu")
    assert note == "task.channel = one.py:draw gives all scenes one channel"
    body = f"h = {NORMAL}; return h * (1 + 1e-6 * (len(index) > 1))"
    (note,) = check_physics(own(tmp_path, body, "rounding.py"), "cpu")
    assert "which is rounding" in note


def test_own_channel_error_within_a_capture_is_the_capture_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RuntimeError, which sends a training step back to eager launches, and no ConfigError, which would end it."""
    task = own(tmp_path, "raise RuntimeError('not permitted when stream is capturing')")
    monkeypatch.setattr(own_channel, "_captured", lambda _: True)
    with pytest.raises(RuntimeError, match="not permitted"):
        simulate(task, 2, SceneGenerator(0))


@pytest.mark.gpu
def test_own_channel_is_captured_with_a_training_step() -> None:
    """The example's two paths, on the task's own device; replays make the scenes of their numbers."""
    example = Path(__file__).parents[2] / "examples" / "own_channel.py"
    task = Task(channel=f"{example}:two_paths")
    index = torch.arange(8, device="cuda")
    generator = SceneGenerator(0, device="cuda")
    assert check_physics(task, "cuda") is not None
    simulate(task, index, generator)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = simulate(task, index, generator)
    index += 5
    graph.replay()
    eager = simulate(task, torch.arange(5, 13, device="cuda"), generator)
    for name in ("channel", "snapshots", "factor"):
        assert torch.equal(getattr(made, name), getattr(eager, name)), name


def test_own_channel_source_is_part_of_the_task(tmp_path: Path) -> None:
    before = own(tmp_path, f"return {NORMAL}")
    after = own(tmp_path, f"return 2 * {NORMAL}")
    assert before != after and before.identity()["channel_hash"] != after.identity()["channel_hash"]
    with pytest.raises(ConfigError, match="own.py:draw': the source has changed"):
        simulate(before, 2, SceneGenerator(0))


def test_own_draws_repeat_none_of_ours() -> None:
    """Streams of any name lie in their own half of all streams, and differ by name and split; draws are normal."""
    names = (*QUANTITIES, "a", "b", "")
    streams = {OwnGenerator(0, split).stream(name) for split in SPLITS for name in names}
    ours = {SceneGenerator(0, split).stream(name) for split in SPLITS for name in QUANTITIES}
    assert len(streams) == len(SPLITS) * len(names) and not streams & ours and max(streams) < 2**32
    draws = OwnGenerator(0).normal(torch.arange(2000), "a", 8)
    assert abs(float(draws.mean())) < 5 / math.sqrt(16000) and abs(float(draws.std()) - 1) < 0.03
    with pytest.raises(ValueError, match="no quantity 'sene'. Did you mean 'scene'"):
        SceneGenerator(0).normal(torch.arange(2), "sene", 1)
