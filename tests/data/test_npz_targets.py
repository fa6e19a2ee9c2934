"""Files whose rows, conjugates, array or symbols are not what the task and the other keys say: named; healthy files:
silent.

Every folder is written by the original's own formulas (make_npz.py), with exact positions or with its element jitter.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_fast.commands.suspect_scenes import wrong_targets
from ris_fast.config.schema import Config, Data, Task, Training
from ris_fast.data.fit_array import Labels, fit_array, fit_of
from ris_fast.health.finding import Finding, ranked
from ris_fast.health.preflight import information as check_information
from ris_fast.health.preflight import scene_parts
from ris_fast.health.preflight import scenes as check_scenes
from ris_fast.health.preflight import targets as check_targets
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.physics.array import RISArray
from ris_fast.physics.real_complex import conj
from ris_fast.training.trainer import Trainer
from tests.data.make_npz import SMALL, original_arrays, write_npz

Arrays = dict[str, np.ndarray]
MINUS = np.array([1, -1], np.float32)
ORDER = np.random.default_rng(1).permutation(SMALL.elements)
CHECKS = (check_targets.targets, scene_parts.physics, check_scenes.splits)


@cache
def arrays(scenes: int, split: str, jitter: float, task: Task = SMALL, seed: int = 0) -> Arrays:
    return original_arrays(scenes, split=split, jitter=jitter, task=task, seed=seed)


def folder(
    root: Path,
    change: Callable[[Arrays], Arrays] = dict,
    *,
    jitter: float = 0.0,
    task: Task = SMALL,
    train: int = 120,
    seed: int = 0,
    shards: int = 1,
    changed_shards: int = 99,
) -> Path:
    """root/train in some shards, of which the first few are changed, and root/val, changed like the first."""
    whole = arrays(train, "train", jitter, task, seed)
    for part, rows in enumerate(np.array_split(np.arange(train), shards)):
        some = {key: value[rows] for key, value in whole.items()}
        write_npz(root / "train" / f"shard_{part:03d}.npz", change(some) if part < changed_shards else some)
    val = arrays(40, "val", jitter, task, seed)
    write_npz(root / "val" / "shard_000.npz", change(val) if changed_shards > shards else val)
    return root


def subject_of(path: Path, task: Task = SMALL) -> PreflightContext:
    return PreflightContext(
        Trainer(Config(task=task, data=Data(path=str(path)), training=Training(batch_size=32, device="cpu")))
    )


def findings(path: Path, task: Task = SMALL) -> list[Finding]:
    context = subject_of(path, task)
    return ranked(finding for check in CHECKS for finding in check(context))


def shuffled(*names: str) -> Callable[[Arrays], Arrays]:
    def change(some: Arrays) -> Arrays:
        order = np.random.default_rng(1).permutation(len(some["y"]))
        return some | {name: some[name][order] for name in names}

    return change


FAULTS: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "R shuffled": ("shuffled_labels", shuffled("R")),
    "R rolled": ("shuffled_labels", lambda some: some | {"R": np.roll(some["R"], 1, 0)}),
    "R conjugated": ("conjugation_error", lambda some: some | {"R": some["R"] * MINUS}),
    "ptr shuffled": ("shuffled_labels", shuffled("ptr", "K")),
    "angles exchanged": (
        "wrong_layout",
        lambda some: some | {"ptr": some["ptr"].reshape(-1, 3, 3)[:, [1, 0, 2]].reshape(-1, 9)},
    ),
    "y conjugated": ("wrong_layout", lambda some: some | {"y": some["y"] * MINUS}),
    "y transposed": ("wrong_layout", lambda some: some | {"y": some["y"].swapaxes(1, 2).reshape(some["y"].shape)}),
    "y shuffled": ("mismatched_channel", shuffled("y")),
    "H shuffled": ("mismatched_channel", shuffled("H_full", "H")),
    "snr permuted": ("snr_labels_differ", shuffled("snr")),
    "snr linear": ("snr_labels_differ", lambda some: some | {"snr": 10 ** (some["snr"] / 10)}),
    "snr too high": ("snr_labels_differ", lambda some: some | {"snr": some["snr"] + 10}),
    "codes conjugated": ("wrong_layout", lambda some: some | {"codes": some["codes"] * MINUS}),
    "codes rolled": ("wrong_layout", lambda some: some | {"codes": np.roll(some["codes"], 1, 1)}),
    "y of noise": (
        "parts_unrelated",
        lambda some: (
            some | {"y": np.random.default_rng(len(some["y"])).standard_normal(some["y"].shape).astype(np.float32)}
        ),
    ),
    "elements of R permuted": ("parts_unrelated", lambda some: some | {"R": some["R"][:, ORDER][:, :, ORDER]}),
    "angles negated": (
        "wrong_layout",
        lambda some: some | {"ptr": some["ptr"] * np.repeat([-1, -1, 1], 3).astype(np.float32)},
    ),
    "H conjugated": ("wrong_layout", lambda some: some | {"H_full": some["H_full"] * MINUS, "H": some["H"] * MINUS}),
}


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [0.0, 0.05], ids=["exact", "jitter"])
@pytest.mark.parametrize("name", FAULTS)
def test_target_checks_name_labels_of_other_scenes(tmp_path: Path, name: str, jitter: float) -> None:
    cause, change = FAULTS[name]
    found = findings(folder(tmp_path, change, jitter=jitter))
    assert [(finding.cause, finding.certain) for finding in found] == [(cause, True)], [
        str(finding) for finding in found
    ]


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [0.0, 0.05], ids=["exact", "jitter"])
@pytest.mark.parametrize("name", ["R shuffled", "R conjugated", "y shuffled", "H shuffled", "y conjugated"])
def test_target_checks_find_one_wrong_shard(tmp_path: Path, name: str, jitter: float) -> None:
    cause, change = FAULTS[name]
    found = findings(folder(tmp_path, change, jitter=jitter, shards=6, changed_shards=1))
    assert [(finding.cause, finding.certain) for finding in found] == [(cause, True)], [
        str(finding) for finding in found
    ]


@pytest.mark.parametrize(
    "name, cause", [("R", "shuffled_labels"), ("y", "mismatched_channel"), ("H_full", "mismatched_channel")]
)
def test_target_checks_find_half_of_the_rows_wrong(tmp_path: Path, name: str, cause: str) -> None:
    def half(some: Arrays) -> Arrays:
        rows = np.flatnonzero(np.random.default_rng(2).random(len(some["y"])) < 0.5)
        mixed = some[name].copy()
        mixed[rows] = some[name][np.roll(rows, 3)]
        return some | {name: mixed}

    found = findings(folder(tmp_path, half, jitter=0.05))
    assert [(finding.cause, finding.certain) for finding in found] == [(cause, True)], [
        str(finding) for finding in found
    ]


def snr(low: float, high: float) -> dict[str, float]:
    return {"snr_min_db": low, "snr_max_db": high}


@pytest.mark.parametrize(
    "jitter, options",
    [
        (0.0, {}),
        (0.05, {}),
        (0.2, {}),
        (0.05, {"symbols": "per_snapshot"}),
        (0.0, {"symbols": "per_snapshot"}),
        (0.05, {"max_sources": 1}),
        (0.05, {"max_sources": 5}),
        (0.05, snr(-5, -5)),
        (0.0, snr(-25, -20)),
        (0.05, snr(-25, -20)),
        (0.05, {"wavefront": "spherical"}),
        (0.05, {"spacing_wavelengths": 0.3, "wavelength_m": 0.1}),
    ],
)
def test_target_checks_pass_healthy_files(tmp_path: Path, jitter: float, options: dict[str, Any]) -> None:
    task = replace(SMALL, **options)
    found = findings(folder(tmp_path, jitter=jitter, task=task, train=80, seed=10), task)
    assert found == [], [str(finding) for finding in found]


# ---- the task is not the files'
# ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [0.0, 0.05], ids=["exact", "jitter"])
@pytest.mark.parametrize(
    "made, said",
    [
        ({"wavelength_m": 0.0857}, {"wavelength_m": 0.3}),
        ({}, {"wavelength_m": 0.1}),
        ({}, {"spacing_wavelengths": 0.25}),
        ({"spacing_wavelengths": 0.25}, {}),
        ({"wavefront": "spherical"}, {}),
        ({}, {"ris_horizontal": 4, "ris_vertical": 6}),
        ({}, {"ris_horizontal": 12, "ris_vertical": 2}),
        ({"spacing_wavelengths": 0.4, "wavelength_m": 0.1}, {}),
    ],
)
def test_task_differs_advises_the_settings_of_the_files(tmp_path: Path, made: dict, said: dict, jitter: float) -> None:
    """The advice is executed: with its settings nothing is found, and they are the ones that the files were made
    with."""
    right, wrong = replace(SMALL, **made), replace(SMALL, **said)
    path = folder(tmp_path, jitter=jitter, task=right)
    (finding,) = findings(path, wrong)
    assert finding.cause == "task_differs" and finding.certain, str(finding)
    settings = [word.split("=") for word in shlex.split(finding.advice.rstrip(".")) if word.startswith("task.")]
    assert {name.removeprefix("task.") for name, _ in settings} == {name for name in (*made, *said)}
    for name, value in settings:
        key = name.removeprefix("task.")
        own = getattr(right, key)
        assert (
            value == own if isinstance(own, str) else float(value) == pytest.approx(own, rel=4e-2 if jitter else 1e-5)
        ), finding.advice
    kinds = {"wavefront": str, "ris_horizontal": int, "ris_vertical": int}
    advised = replace(
        wrong,
        **{name.removeprefix("task."): kinds.get(name.removeprefix("task."), float)(value) for name, value in settings},
    )
    assert findings(path, advised) == []


@pytest.mark.parametrize("times, cause", [(100.0, "wrong_units"), (2.0, "task_differs")])
def test_ranges_in_centimetres_are_no_other_wavelength(tmp_path: Path, times: float, cause: str) -> None:
    def scaled(some: Arrays) -> Arrays:
        places = some["ptr"].copy()
        places[:, 2 * SMALL.max_sources :] *= times
        return some | {"ptr": places}

    (finding,) = findings(folder(tmp_path, scaled))
    assert finding.cause == cause


def test_wrong_layout_names_the_vertical_index_fastest(tmp_path: Path) -> None:
    order = np.arange(SMALL.elements).reshape(SMALL.ris_vertical, SMALL.ris_horizontal).T.ravel()

    def renumbered(some: Arrays) -> Arrays:
        return some | {
            "R": some["R"][:, order][:, :, order],
            "H_full": some["H_full"][:, :, order],
            "codes": some["codes"][:, :, order],
        }

    (finding,) = findings(folder(tmp_path, renumbered))
    assert (
        finding.cause == "wrong_layout"
        and "vertical index fastest" in finding.evidence
        and "horizontal index fastest" in finding.advice
    )


@pytest.mark.parametrize("seed", range(2))
def test_fit_array_finds_the_array_to_the_last_digit(seed: int) -> None:
    task = replace(SMALL, wavelength_m=0.0123, spacing_wavelengths=0.37, range_min_m=0.02, range_max_m=0.4)
    made = arrays(80, "train", 0.0, task, seed)
    labels = Labels.of(*(torch.from_numpy(made[key]) for key in ("ptr", "K", "R")))
    found = fit_array(RISArray.of(SMALL), labels)
    assert found is not None and found.fit < 1e-9
    assert (found.array.wavelength_m, found.spacing_wavelengths) == (
        pytest.approx(0.0123, rel=1e-6),
        pytest.approx(0.37, rel=1e-6),
    )
    assert float(fit_of(found.array, labels).max()) < 1e-6


@pytest.mark.parametrize("jitter", [0.0, 0.05], ids=["exact", "jitter"])
@pytest.mark.parametrize("made, said", [("per_snapshot", "static"), ("static", "per_snapshot")])
def test_task_differs_names_symbols_of_the_other_kind(tmp_path: Path, made: str, said: str, jitter: float) -> None:
    path = folder(tmp_path, jitter=jitter, task=replace(SMALL, symbols=made))
    (finding,) = findings(path, replace(SMALL, symbols=said))
    assert finding.cause == "task_differs" and finding.certain and f"--set task.symbols={made}" in finding.advice
    assert findings(path, replace(SMALL, symbols=made)) == []


# ---- the reader's own words
# --------------------------------------------------------------------------------------------------


def test_npz_source_describes_target_fit(tmp_path: Path) -> None:
    for jitter, below in ((0.0, 1e-9), (0.05, 0.05)):
        source = subject_of(folder(tmp_path / str(jitter), jitter=jitter)).trainer.source
        fit = source.target_fit("train")
        assert (
            len(fit) == source.size("train")
            and float(fit.median()) < below
            and (jitter == 0) == (float(fit.max()) < 1e-6)
        )
        assert f"median {float(fit.median()):.2g}, largest {float(fit.max()):.2g}" in source.describe()


def test_npz_source_notes_how_many_targets_do_not_belong(tmp_path: Path) -> None:
    source = subject_of(folder(tmp_path, FAULTS["R shuffled"][1], shards=4, changed_shards=1)).trainer.source
    apart = int((source.target_fit("train") > 0.5).sum())
    assert 20 < apart <= 30 and any(
        f"In {apart} of 120 train scenes" in note and "does not belong" in note for note in source.notes
    )


def test_npz_source_notes_snr_beyond_task_and_conjugate_codes(tmp_path: Path) -> None:
    notes = subject_of(folder(tmp_path / "snr", FAULTS["snr linear"][1])).trainer.source.notes
    assert any("snr labels go up to" in note and "the task says 20" in note for note in notes)
    notes = subject_of(folder(tmp_path / "codes", FAULTS["codes conjugated"][1])).trainer.source.notes
    assert any("H_full times the conjugate of c_l" in note for note in notes)


def test_npz_source_accuses_no_scene_of_large_jitter(tmp_path: Path) -> None:
    source = subject_of(folder(tmp_path, jitter=0.4)).trainer.source
    assert float(source.target_fit("train").max()) > 0.5 and not any("does not belong" in note for note in source.notes)


@pytest.mark.parametrize(
    "change, said",
    [(dict, ""), (shuffled("R"), "R does not belong"), (shuffled("R", "ptr", "K"), "not of the same scenes")],
)
def test_wrong_targets_names_test_targets_of_other_scenes(tmp_path: Path, change: Any, said: str) -> None:
    path = folder(tmp_path)
    write_npz(path / "test" / "shard_000.npz", change(arrays(40, "test", 0.0)))
    lines = wrong_targets(subject_of(path).trainer.source, SMALL, 40)
    assert [said in line for line in lines] == [True] * bool(said), lines


def test_npz_source_counts_one_copy_as_one(tmp_path: Path) -> None:
    path = folder(tmp_path, lambda some: {key: np.concatenate((value[:-1], value[:1])) for key, value in some.items()})
    assert "1 of 120 train scenes repeats an earlier one" in subject_of(path).trainer.source.notes


def test_target_fit_of_one_pool_is_that_of_its_own_rows(tmp_path: Path) -> None:
    path = folder(tmp_path, FAULTS["R rolled"][1], jitter=0.05) / "train"
    context = subject_of(path)
    assert len(context.trainer.source.target_fit("val")) == context.trainer.source.size("val")
    assert [finding.cause for finding in findings(path)] == ["shuffled_labels"]


# ---- the leak
# ----------------------------------------------------------------------------------------------------------------


def test_split_overlap_advice_fixes_the_leak(tmp_path: Path) -> None:
    path = folder(tmp_path)
    write_npz(path / "val" / "shard_000.npz", {key: value[5:45] for key, value in arrays(120, "train", 0.0).items()})
    (finding,) = findings(path)
    assert finding.cause == "split_overlap" and "40 of 40 val scenes" in finding.evidence
    words = shlex.split(finding.advice)
    advised = Path(words[words.index("--data") + 1].rstrip(":"))
    assert findings(advised) == [] and subject_of(advised).trainer.source.size("val") > 0


# ---- a classical estimate above 1, and what could not be looked at
# -----------------------------------------------------------


@pytest.mark.parametrize(
    "cause, change", [("conjugation_error", conj), ("shuffled_labels", lambda factor: factor.roll(5, 0))]
)
def test_input_information_names_an_estimate_worse_than_zero(tmp_path: Path, cause: str, change: Any) -> None:
    context = subject_of(folder(tmp_path))
    serve = context.trainer.source.batch
    assert list(check_information.input_information(context)) == []
    context.trainer.source.batch = lambda split, index: replace(
        scenes := serve(split, index), factor=change(scenes.factor)
    )
    found = {finding.cause: finding.certain for finding in check_information.input_information(context)}
    assert found[cause] or cause == "shuffled_labels"  # which is certain where chance alone explains few of the pairs


def test_input_information_compares_with_a_dense_target(tmp_path: Path) -> None:
    context = subject_of(folder(tmp_path, jitter=0.05))
    assert list(check_information.input_information(context)) == [] and "pursuit" in context.note
    context = subject_of(folder(tmp_path / "wrong", FAULTS["R shuffled"][1], jitter=0.05))
    assert "shuffled_labels" in [finding.cause for finding in check_information.input_information(context)]


def test_physics_check_notes_what_it_could_not_check(tmp_path: Path) -> None:
    task = replace(SMALL, snr_min_db=-60.0, snr_max_db=-50.0)
    context = subject_of(folder(tmp_path, task=task), task)
    assert list(scene_parts.physics(context)) == [] and "not checked: too few" in context.note
