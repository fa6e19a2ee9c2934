"""`ris-fast predict` writes what the predictor finds, whole or not at all, and answers every mistake in one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_fast import Predictor, SceneGenerator, build_model, load, load_config, simulate
from ris_fast.commands.cli import main
from ris_fast.commands.predict import never_learned
from ris_fast.commands.run_folder import RunFolder
from ris_fast.data.write import write_shards
from ris_fast.inference import predictor as module
from ris_fast.training.checkpoint import load_checkpoint, save_checkpoint
from ris_fast.training.trainer import Trainer
from tests.data.make_npz import as_complex, write_npz
from tests.training.test_trainer import SMALL, small

SCENES = 12
SETTINGS = [part for text in SMALL if text.startswith("task.") for part in ("--set", text)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = small(epochs=1)
    Trainer(config, folder, callbacks=[RunFolder(folder, config)]).fit()
    return folder


def measured() -> dict[str, np.ndarray]:
    scenes = simulate(small(epochs=1).task, SCENES, SceneGenerator(0, "test"))
    return {name: getattr(scenes, name).numpy().copy() for name in ("snapshots", "channel", "codes", "snr_db")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "data.npz", measured())


def predict(*arguments: str | Path) -> int:
    return main(["predict", *map(str, arguments), "--device", "cpu"])


def opened(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("method", ["likelihood", "music", "mvdr", "pursuit"])
def test_predict_writes_what_the_predictor_finds(
    method: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(run, "--data", data, "--out", tmp_path / "new" / "a.npz", "--method", method) == 0
    expected = load(run, device="cpu").predict(**measured(), method=method).numpy()
    close(opened(tmp_path / "new" / "a.npz"), expected)
    said = capsys.readouterr().out
    assert f"{expected['count'].sum()} sources" in said and f"by {method}" in said and "a.npz" in said


@pytest.mark.parametrize(
    "verdict, best, warned", [("stalled", 0.9, True), ("stopped", 0.1, False), ("learned", 0.1, False)]
)
def test_predict_warns_of_a_run_that_never_learned(verdict: str, best: float, warned: bool, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(
        json.dumps({"verdict": verdict, "best_val_nmse": best, "baselines": {"zero": 1.0, "mean": 0.8}})
    )
    lines = never_learned(tmp_path)
    assert len(lines) == warned and all("has not learned (stalled: best validation NMSE 0.9" in line for line in lines)
    assert never_learned(tmp_path / "nowhere") == []


def test_predict_streams_many_chunks_to_every_ending(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(run, "--data", data, "--out", tmp_path / "whole.npz") == 0
    monkeypatch.setattr("ris_fast.commands.predict.CHUNK", 5)
    for ending in ("npz", "safetensors", "csv"):
        assert predict(run, "--data", data, "--out", tmp_path / f"a.{ending}", "--no-factor") == 0
    whole, found = opened(tmp_path / "whole.npz"), opened(tmp_path / "a.npz")
    close(found, {name: value for name, value in whole.items() if name != "factor"})
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    first = [float(row["range_m"]) for row in rows if row["source"] == "1"]
    np.testing.assert_allclose(first, whole["range_m"][whole["count"] > 0, 0], rtol=1e-4)
    assert {int(row["scene"]) for row in rows} == set(range(SCENES))


def test_predict_reads_a_data_set_by_split(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.toml", overrides=["task.snr_max_db=30.0", "task.max_sources=3"])
    write_shards(config, tmp_path / "set", {"train": 5, "val": 3, "test": 4})
    for flags, split, count in (((), "test", 4), (("--split", "train"), "train", 5), (("--scenes", "2"), "test", 2)):
        assert predict(run, "--data", tmp_path / "set", "--out", tmp_path / "a.npz", *flags) == 0
        scenes = simulate(config.task, count, SceneGenerator(config.data.seed, split))
        assert scenes.channel is not None
        found = load(run, device="cpu").predict(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)
        close(opened(tmp_path / "a.npz"), found.numpy())


@pytest.mark.parametrize("kind", ["factor", "covariance"])
def test_predictions_from_elsewhere_are_located_like_a_networks(
    kind: str, run: Path, data: Path, tmp_path: Path
) -> None:
    """What a run's network says, fed back as a file, is located as the network's own."""
    assert predict(run, "--data", data, "--out", tmp_path / "own.npz") == 0
    own = opened(tmp_path / "own.npz")
    factor = as_complex(own["factor"])
    given = factor if kind == "factor" else factor @ factor.conj().swapaxes(1, 2)
    theirs, out = write_npz(tmp_path / "theirs.npz", {kind: given}), tmp_path / "again.npz"
    for task in ([str(run)], SETTINGS):
        assert predict(*task, "--predictions", theirs, "--data", data, "--out", out) == 0
        again = opened(out)
        assert np.array_equal(again["count"], own["count"])
        near = np.abs(again["azimuth_deg"] - own["azimuth_deg"]) < 0.1 * own["azimuth_sd_deg"]
        assert np.mean(near[~np.isnan(own["azimuth_deg"])]) > 0.8
    assert predict(*SETTINGS, "--predictions", theirs, "--out", out) == 0
    alone = opened(out)
    assert np.isnan(alone["azimuth_sd_deg"]).all() and np.isnan(alone["snr_db"]).all() and alone["count"].min() > 0


WRONG_DATA: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "shape": (lambda a: a | {"snapshots": a["snapshots"][:, :5]}, "'snapshots': found shape (12, 5, 4, 2)"),
    "no channel": (lambda a: {k: v for k, v in a.items() if k != "channel"}, "'channel': found no such array"),
    "products": (
        lambda a: {"snapshots": a["snapshots"], "codes": a["codes"], "H": a["snapshots"]},
        "'channel': found no such array; expected it, which the network of this run needs",
    ),
    "nan": (lambda a: a | {"channel": a["channel"] * np.nan}, "'channel': found NaN or infinite values"),
    "late nan": (
        lambda a: a | {"snr_db": np.where(np.arange(12) == 9, np.inf, a["snr_db"])},
        "'snr_db': found infinite values or numbers beyond 3.4e38, the first in scene 9",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_predict_answers_wrong_data_in_one_line(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is wrong in the last scenes, before any scene is worked on."""
    change, says = WRONG_DATA[case]
    monkeypatch.setattr(module.Predictor, "predict_measured", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setattr("ris_fast.commands.predict.CHUNK", 5)
    data = write_npz(tmp_path / "data.npz", change(measured()))
    assert predict(run, "--data", data, "--out", tmp_path / "a.npz") == 3
    said = capsys.readouterr()
    assert said.err.startswith("ris-fast: ") and says in said.err and said.err.count("\n") == 1 and said.out == ""
    assert list(tmp_path.iterdir()) == [data]


WRONG_USE: dict[str, tuple[list[str], int, str]] = {
    "ending": (["RUN", "--data", "data.npz", "--out", "a.txt"], 2, "Give a name in .npz, .safetensors, .csv"),
    "no data": (["RUN", "--data", "no.npz", "--out", "a.npz"], 3, "no.npz: found no such file or folder"),
    "no run": (["nothing", "--data", "data.npz", "--out", "a.npz"], 2, "not a run folder"),
    "neither": (["--data", "data.npz", "--out", "a.npz"], 2, "Give a RUN, or covariances with --predictions"),
    "no scenes": (["RUN", "--out", "a.npz"], 2, "there are no scenes. Give --data"),
    "no out": (["RUN", "--data", "data.npz"], 2, "--out"),
    "over the data": (
        ["RUN", "--data", "data.npz", "--out", "./data.npz"],
        2,
        "would write over what is read or recorded",
    ),
    "a folder": (["RUN", "--data", "data.npz", "--out", "folder.npz"], 3, "folder.npz cannot be written"),
    "method": (["RUN", "--data", "data.npz", "--out", "a.npz", "--method", "esprit"], 2, "esprit"),
    "count": (["RUN", "--data", "data.npz", "--out", "a.npz", "--count", "9"], 2, "count is 9; expected 0 to 2"),
    "count word": (["RUN", "--data", "data.npz", "--out", "a.npz", "--count", "few"], 2, "count is 'few'"),
    "half a count": (["RUN", "--data", "data.npz", "--out", "a.npz", "--count", "1.5"], 2, "not a whole number"),
    "too many": (["RUN", "--data", "data.npz", "--out", "a.npz", "--scenes", "13"], 2, "there are 12"),
    "split": (["RUN", "--data", "data.npz", "--out", "a.npz", "--split", "val"], 3, "no splits"),
    "settings": (["RUN", "--data", "data.npz", "--out", "a.npz", "--set", "task.snapshots=4"], 2, "for good"),
    "other task": (["--predictions", "f.npz", "--data", "data.npz", "--out", "a.npz"], 3, "(scenes, 16, 16)"),
    "no predictions": ([*SETTINGS, "--predictions", "no.npz", "--out", "a.npz"], 3, "no.npz: found no such file"),
    "other scenes": (
        [*SETTINGS, "--predictions", "f.npz", "--data", "data.npz", "--out", "a.npz"],
        3,
        "key 'factor': found 3 scenes; expected 12, as --data has",
    ),
    "no measurement": (
        [*SETTINGS, "--predictions", "f.npz", "--out", "a.npz", "--method", "pursuit"],
        2,
        "'pursuit' needs snapshots",
    ),
    "no network": (
        [*SETTINGS, "--predictions", "f.npz", "--out", "a.npz", "--count", "network"],
        2,
        "--predictions takes its place",
    ),
    "device": (["RUN", "--data", "data.npz", "--out", "a.npz", "--device", "gpu"], 2, "--device is 'gpu'"),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_predict_answers_wrong_use_in_one_line_and_leaves_nothing(
    case: str,
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, code, says = WRONG_USE[case]
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "f.npz", {"factor": np.ones((3, 16, 2), np.complex64)})
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.setattr(module.Predictor, "predict_measured", lambda *_, **__: pytest.fail("computed"))
    assert main(["predict", *(str(run) if word == "RUN" else word for word in arguments)]) == code
    said = capsys.readouterr()
    assert said.err.startswith("ris-fast: ") and says in said.err and said.err.count("\n") == 1 and said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "f.npz", "folder.npz"]
    np.testing.assert_array_equal(opened(data)["snapshots"], measured()["snapshots"])


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(
    "out", ["set/a.npz", "set/new.csv", "set/below/new.npz", "elsewhere.npz", "RUN", "RUN/new.npz", "RUN/own"]
)
def test_predict_never_writes_among_what_it_reads(
    out: str, link: bool, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither over measurements and checkpoints, nor beside them, where they would be read as such."""
    (tmp_path / "set").mkdir()
    data.rename(tmp_path / "elsewhere.npz")
    (tmp_path / "set" / "a.npz").symlink_to(tmp_path / "elsewhere.npz")
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    before = {path: path.read_bytes() for each in (tmp_path, run) for path in each.rglob("*") if path.is_file()}
    checkpoints = run / "checkpoints"
    own = {
        "RUN": checkpoints / "best.safetensors",
        "RUN/new.npz": checkpoints / "new.npz",
        "RUN/own": run / "tensors.csv",
    }
    given = own.get(out, tmp_path / out)
    runs, folder = (tmp_path / "run", tmp_path / "link") if link else (run, tmp_path / "set")
    for each in (runs, runs / "checkpoints" / "best.safetensors"):
        assert predict(each, "--data", folder, "--out", given) == 2
        said = capsys.readouterr().err
        assert said.startswith("ris-fast: predict: --out") and said.count("\n") == 1
    after = {path: path.read_bytes() for each in (tmp_path, run) for path in each.rglob("*") if path.is_file()}
    assert after == before and predict(run, "--data", folder, "--out", run / "predictions.npz") == 0
    (run / "predictions.npz").unlink()


@pytest.mark.parametrize("snr", [None, np.nan])
def test_predict_from_products_asks_for_the_snr_before_any_work(
    snr: float | None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = measured()
    given |= {"H": given["snapshots"]} | ({} if snr is None else {"snr_db": np.full(SCENES, snr)})
    for name in ("channel", *(["snr_db"] if snr is None else [])):
        given.pop(name)
    factor = {"factor": np.ones((SCENES, 16, 2), np.complex64)}
    task = [*SETTINGS, "--predictions", write_npz(tmp_path / "f.npz", factor)]
    monkeypatch.setattr("ris_fast.commands.predict.locate_sources", lambda *_, **__: pytest.fail("computed"))
    assert predict(*task, "--data", write_npz(data, given), "--out", tmp_path / "a.npz") == 3
    said = capsys.readouterr().err
    assert "data.npz, key 'snr_db': found" in said and "without the channel" in said and said.count("\n") == 1


def test_predict_counts_by_a_network_only_where_it_counts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any data are read."""
    task = small(epochs=1).task
    silent = Predictor(build_model("backprojection", task, width=16), task)
    monkeypatch.setattr("ris_fast.commands.predict.load", lambda *_, **__: silent)
    assert predict(run, "--data", tmp_path / "no.npz", "--out", tmp_path / "a.npz", "--count", "network") == 2
    assert "says no number of sources. Leave it out." in capsys.readouterr().err


def test_predict_takes_endings_of_either_case(run: Path, data: Path, tmp_path: Path) -> None:
    for ending in ("NPZ", "SafeTensors", "CSV"):
        assert predict(run, "--data", data.rename(tmp_path / "DATA.NPZ"), "--out", tmp_path / f"a.{ending}") == 0
        (tmp_path / "DATA.NPZ").rename(data)
    assert opened(tmp_path / "a.NPZ")["count"].shape == (SCENES,)


def test_predict_refuses_a_data_set_of_another_array(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(run / "config.toml", overrides=["task.wavefront=spherical"])
    write_shards(config, tmp_path / "set", {"train": 1, "val": 1, "test": 1})
    assert predict(run, "--data", tmp_path / "set", "--out", tmp_path / "a.npz") == 3
    assert "wavefront 'spherical'; expected wavefront 'fresnel'" in capsys.readouterr().err


def test_predict_interrupted_leaves_the_old_file(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    whole = Predictor.predict_measured

    def second(self, measured, start=0, **options):
        calls.append(start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, measured, start, **options)

    monkeypatch.setattr("ris_fast.commands.predict.CHUNK", 5)
    monkeypatch.setattr(module.Predictor, "predict_measured", second)
    (tmp_path / "a.csv").write_text("old")
    assert predict(run, "--data", data, "--out", tmp_path / "a.csv") == 130
    assert (tmp_path / "a.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    assert "nothing was written, and a file of an earlier call is as it was" in capsys.readouterr().err


def test_predict_names_the_scene_without_a_finite_answer(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text((run / "config.toml").read_text())
    groups, manifest = load_checkpoint(run / "checkpoints", "best")
    for kind in ("model", "ema"):
        groups[kind]["fuse.weight"] = torch.full_like(groups[kind]["fuse.weight"], torch.nan)
    save_checkpoint(folder / "checkpoints", "best", groups, manifest)
    assert predict(folder, "--data", data, "--out", tmp_path / "a.npz") == 3
    assert "not finite for 12 of 12 scenes, the first is scene 0" in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()
