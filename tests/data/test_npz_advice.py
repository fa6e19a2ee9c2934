"""What the reader advises is done, and then works; what files cannot serve is decided when they are opened."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ris_fast.commands.cli import main
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, ConfigError, Data, Task
from ris_fast.data.errors import DataError
from ris_fast.data.npz_notes import snr_notes
from ris_fast.data.open_source import open_source
from ris_fast.health.preflight import truth
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models import Prediction
from ris_fast.training import parts
from ris_fast.training.trainer import Trainer
from ris_fast.training.validation import scene_nmse
from tests.data.make_npz import SMALL, original_arrays, write_folders, write_npz

SIZES = [
    f"task.{name}={getattr(SMALL, name)}"
    for name in ("bs_antennas", "ris_horizontal", "ris_vertical", "snapshots", "max_sources")
]
QUICK = [*SIZES, "training.compile=false", "model.options.width=32", "model.options.grid=9", "report.plots=false"]


def flags(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def advised(text: str) -> list[str]:
    """The words of a command that a message spells out: --preset NAME and --set KEY=VALUE."""
    return [word for pair in re.findall(r"(--preset|--set) (\S+?)(?=[;.]? |$|;)", text) for word in pair]


def trainer(path: Path, *overrides: str, preset: str = "laptop") -> Trainer:
    return Trainer(
        load_config(preset=preset, overrides=[f"data.path={path}", *SIZES, "training.compile=false", *overrides])
    )


def test_check_advice_on_files_without_the_channel_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(tmp_path, drop=("H_full",))
    command = ["check", "--data", str(tmp_path), *flags(QUICK[:-3] + QUICK[-1:])]
    assert main(command) == 3
    words = advised(capsys.readouterr().err)
    assert words[:2] == ["--preset", "original"]
    assert main(["check", "--data", str(tmp_path), *flags(QUICK), *words]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_open_source_advice_on_sizes_works(tmp_path: Path) -> None:
    task = replace(SMALL, ris_horizontal=5, ris_vertical=5)
    write_folders(tmp_path, task=task)
    with pytest.raises(DataError) as caught:
        open_source(Config(data=Data(path=str(tmp_path))), "cpu")
    overrides = [word for word in advised(caught.value.todo) if word != "--set"]
    assert load_config(overrides=overrides).task == task
    assert open_source(load_config(overrides=[*overrides, f"data.path={tmp_path}"]), "cpu").size("train") == 40


# ---- terms that the files cannot serve ------------------------------------------------------------------------------


def test_trainer_leaves_out_subspace_on_a_dense_target(tmp_path: Path) -> None:
    run = trainer(write_folders(tmp_path, jitter=0.003), *QUICK[-3:], preset="original")
    assert run.config.loss.subspace == 0.0 and "subspace" not in run.loss.weights and "angle" in run.loss.weights
    assert any(note.startswith("loss.subspace = 0.05 is left out") for note in run.source.notes)
    scenes = run.source.batch("train", torch.arange(8))
    assert bool(
        run.loss(run.model(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db), scenes)[0].isfinite()
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_trainer_leaves_out_subspace_if_one_split_is_dense(tmp_path: Path, split: str) -> None:
    write_folders(tmp_path)
    for file in (tmp_path / split).iterdir():
        file.unlink()
    write_npz(tmp_path / split / "a.npz", original_arrays(12, split=split, jitter=0.003))
    assert trainer(tmp_path, "loss.subspace=0.05").config.loss.subspace == 0.0


def test_trainer_keeps_terms_that_the_files_serve(tmp_path: Path) -> None:
    run = trainer(write_folders(tmp_path), "loss.subspace=0.05")
    assert run.config.loss.subspace == 0.05 and not any("left out" in note for note in run.source.notes)


@pytest.mark.parametrize("options", [{"jitter": 0.003}, {"drop": ("H_full",)}])
def test_trainer_refuses_unserved_terms_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(parts, "build_model", build)
    asked = (
        ["model.options.inputs=effective_channel", "loss.beta=0.1"]
        if "drop" in options
        else ["loss.cov=0", "loss.cov_pred=0"]
    )
    with pytest.raises(ConfigError, match="loss.beta = 0" if "drop" in options else "no term tells"):
        trainer(write_folders(tmp_path, **options), *asked, preset="original")


# ---- angles are judged as they are stored ---------------------------------------------------------------------------


def label_findings(run: Trainer) -> list[str]:
    return [finding.evidence for finding in truth.labels(PreflightContext(run))]


def test_labels_check_allows_positions_the_reader_moved(tmp_path: Path) -> None:
    run = trainer(write_folders(tmp_path, train=240), "training.batch_size=256")
    assert run.source.reach[1].azimuth > 1.01 * np.deg2rad(60)
    assert label_findings(run) == []


def _noisy(far: np.ndarray) -> np.ndarray:
    limit, edge = SMALL.range_max_m, np.quantile(far[far > 0], 0.99)
    return np.where(far > edge, 1.06 * limit, far)


@pytest.mark.parametrize(
    "change, cause, certain, said",
    [
        (_noisy, "task_differs", False, "range_max_m=11."),
        (lambda far: 1.5 * far, "task_differs", True, "range_max_m=15."),
        (lambda far: 100.0 * far, "wrong_units", True, "in centimetres"),
    ],
    ids=["label noise", "another task", "centimetres"],
)
def test_ranges_past_the_limit_are_of_another_unit_or_another_task(
    tmp_path: Path, change: Any, cause: str, certain: bool, said: str
) -> None:
    for split, scenes in (("train", 200), ("val", 24)):
        arrays = original_arrays(scenes, split=split)
        ranges = arrays["ptr"][:, 2 * SMALL.max_sources :]
        ranges[:] = change(ranges)
        write_npz(tmp_path / split / "shard_000.npz", arrays)
    (found,) = truth.labels(PreflightContext(trainer(tmp_path, "training.batch_size=64")))
    assert (found.cause, found.certain) == (cause, certain)
    assert said in found.evidence + found.advice


def test_trainer_widens_the_sector_to_the_served_sources(tmp_path: Path) -> None:
    """Near sources, seen from half an element off, lie outside the files' own sector; the pursuit finds them all the
    same."""
    path = write_folders(tmp_path / "set", train=1000, val=60)
    kept = trainer(path, "task.azimuth_deg=60", "task.elevation_deg=30")
    wider = trainer(path)
    assert kept.config.task.azimuth_deg == 60 < wider.config.task.azimuth_deg and any(
        "task.azimuth_deg = " in note for note in wider.source.notes
    )
    scenes = wider.source.batch("train", torch.arange(1000))
    beyond = (scenes.azimuth.abs().amax(1) > 1.05) & (scenes.snr_db > 0)
    inputs = scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db
    scores = [
        scene_nmse(Prediction(run.model.classical(run.model.features(*inputs)).factor), scenes)[beyond].mean()
        for run in (kept, wider)
    ]
    assert float(scores[1]) < 0.75 * float(scores[0])


@pytest.mark.slow
def test_run_config_keeps_the_sector_of_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_folders(tmp_path / "set", train=240, val=20)
    run = str(tmp_path / "run")
    command = [
        "train",
        "--data",
        str(path),
        "--out",
        run,
        "--epochs",
        "1",
        *flags([*QUICK[:-3], QUICK[-1], "health.preflight=false"]),
    ]
    main(command)
    recorded = load_config(Path(run) / "config.toml")
    assert recorded.task.azimuth_deg > 60
    assert main(["evaluate", run]) == 0
    capsys.readouterr()
    main(["train", "--resume", run, "--set", "training.epochs=2"])
    assert "resumed from" in capsys.readouterr().out


@pytest.mark.parametrize("jitter", [0.0, 0.003])
def test_labels_check_finds_stored_angles_beyond_the_task(tmp_path: Path, jitter: float) -> None:
    run = trainer(write_folders(tmp_path, jitter=jitter), "task.azimuth_deg=30")
    assert [text.split(";")[0].startswith("the files' azimuths go up to") for text in label_findings(run)] == [True]


def test_labels_check_finds_scenes_beyond_the_files(tmp_path: Path) -> None:
    run = trainer(write_folders(tmp_path))
    serve = run.source.batch
    run.source.batch = lambda split, index: replace(serve(split, index), azimuth=serve(split, index).azimuth * 57.3)
    assert "the files say" in label_findings(run)[0]


@pytest.mark.parametrize(
    "labels, said",
    [
        (torch.arange(800) % 4 * 5.0, False),  # a campaign in steps of 5 dB
        (torch.linspace(0.0, 15.0, 40).repeat_interleave(20), False),  # 20 scenes of each walk
        ((10.0 * torch.randn(800, generator=torch.Generator().manual_seed(0))).clamp(-5.0, 20.0), True),
        (torch.full((800,), 10.0), False),
    ],
    ids=["steps", "walks", "clipped", "one"],
)
def test_snr_labels_are_clipped_where_an_end_comes_more_often_than_others(labels: Tensor, said: bool) -> None:
    assert any("pile up" in note for note in snr_notes(labels, Task())) == said
