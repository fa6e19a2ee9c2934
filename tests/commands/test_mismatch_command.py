"""`ris-fast mismatch`: each run is tested on the scenes of each task with the array that it believes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.commands.evaluate import evaluate, open_run
from ris_fast.commands.mismatch import changed_tasks, mismatch
from ris_fast.commands.run_folder import RunFolder
from ris_fast.config.schema import ConfigError, Task
from ris_fast.data.write import write_shards
from ris_fast.models import build_model
from ris_fast.physics.random import SceneGenerator
from ris_fast.physics.scenes import simulate
from ris_fast.report.mismatch import mismatch_text
from ris_fast.training.checkpoint import load_weights
from ris_fast.training.trainer import Trainer
from ris_fast.training.validation import scene_nmse
from tests.training.test_trainer import small

CHANGES = {"ideal": (), "rough": ("task.phase_error_deg=20", "task.channel_snr_db=10"), "wide": ("task.snapshots=4",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("runs"), {}
    for name, changes in CHANGES.items():
        config = small("data.test_scenes=24", *changes, epochs=1)
        Trainer(config, root / name, callbacks=[RunFolder(root / name, config)]).fit()
        found[name] = root / name
    return found


def test_mismatch_on_a_runs_own_task_is_its_evaluation(runs: dict[str, Path]) -> None:
    result = mismatch([runs["ideal"], runs["rough"]], device="cpu")
    assert [test["test"] for test in result["tests"]] == [{}, {"phase_error_deg": 20.0, "channel_snr_db": 10.0}]
    for name, test in zip(("ideal", "rough"), result["tests"]):
        alone = evaluate(runs[name], device="cpu")
        assert test["runs"][name]["nmse"] == pytest.approx(alone["nmse"], rel=1e-5)
        assert test["runs"][name]["baselines"] == pytest.approx(alone["baselines"], rel=1e-5)
        assert [cell["trained"] for cell in test["runs"].values()] == [each == name for each in result["runs"]]


def test_mismatch_network_believes_in_the_task_of_its_run(runs: dict[str, Path]) -> None:
    """Scenes of another wavefront, spacing and number of sources reach a network that was built for its own."""
    against = ["task.wavefront=spherical", "task.spacing_wavelengths=0.4", "task.max_sources=3"]
    result = mismatch([runs["ideal"]], against, device="cpu")
    config = small(epochs=1)
    model = build_model(config.model.name, config.task, **config.model.options).eval()
    load_weights(model, open_run(runs["ideal"]).weights, "the run")
    for task, test in zip(changed_tasks(config.task, against), result["tests"][1:], strict=True):
        scenes = simulate(task, 24, SceneGenerator(config.data.seed, "test"))
        with torch.no_grad():
            nmse = scene_nmse(model(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db), scenes)
        assert test["runs"]["ideal"]["nmse"]["mean"] == pytest.approx(nmse.mean().item(), rel=1e-5)


def test_mismatch_prints_a_table_and_leaves_files(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    words = ["mismatch", str(runs["ideal"]), str(runs["rough"]), "--against", "task.phase_error_deg=0,45"]
    assert main([*words, "--scenes", "9", "--device", "cpu", "--out", str(tmp_path / "new" / "report")]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("phase_error_deg 45 ")]
    assert len(rows) == 2 and "phase_error_deg 0" not in text  # the ideal run's own task, which has its row
    record = json.loads((tmp_path / "new" / "report" / "mismatch.json").read_text())
    assert mismatch_text(record) in text and [test["scenes"] for test in record["tests"]] == [9, 9, 9]
    assert (tmp_path / "new" / "report" / "mismatch.png").stat().st_size > 10_000
    assert main([*words, "--scenes", "9", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record


def test_mismatch_takes_the_test_scenes_of_a_data_set(runs: dict[str, Path], tmp_path: Path) -> None:
    config = small("data.test_scenes=24", *CHANGES["rough"], epochs=1)
    write_shards(config, tmp_path / "set", {"train": 40, "val": 8, "test": 24})
    simulated, files = mismatch([runs["rough"], runs["ideal"]], data=[tmp_path / "set"], device="cpu")["tests"][::2]
    assert (simulated["data"], files["data"]) == (None, str(tmp_path / "set"))
    assert files["test"] == {} and files["scenes"] == 24
    for name in ("rough", "ideal"):
        assert files["runs"][name]["nmse"] == pytest.approx(simulated["runs"][name]["nmse"], rel=1e-4)
        assert not files["runs"][name]["trained"]
    assert "set: task of rough" in mismatch_text(mismatch([runs["rough"]], data=[tmp_path / "set"], device="cpu"))


@pytest.mark.parametrize(
    "names, against, said",
    [
        (["ideal"], ["task.snapshots=4"], "task.snapshots = 4 do not fit the network of ideal, .* task.snapshots = 8"),
        (["ideal", "wide"], [], "task.snapshots = 8 do not fit the network of wide"),
        (["ideal", "ideal"], [], "given twice"),
        (["ideal"], ["data.seed=1,2"], "expected task.key=value,value"),
        (["ideal"], ["task.phase_error_deg"], "expected task.key=value,value"),
        (["ideal"], ["task.phase_error=1"], "no key 'phase_error'. Did you mean 'phase_error_deg'"),
        (["ideal"], ["task.phase_error_deg=1,x"], "task.phase_error_deg = 'x' .* expected a number"),
        (["ideal"], ["task.channel_snr_db=-3"], "task.channel_snr_db = -3.0 is too small"),
    ],
)
def test_mismatch_refuses_what_cannot_be_compared(
    runs: dict[str, Path], names: list[str], against: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        mismatch([runs[name] for name in names], against, device="cpu")


def test_changed_tasks_are_in_the_order_given() -> None:
    tasks = changed_tasks(Task(), ["task.phase_error_deg=5,10", "task.symbols=per_snapshot"])
    assert [(task.phase_error_deg, task.symbols) for task in tasks] == [
        (5.0, "static"),
        (10.0, "static"),
        (0.0, "per_snapshot"),
    ]
