"""`ris-fast evaluate` measures what was named, on scenes that say something, or refuses; its words claim no more than
its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ris_fast.commands.cli import main
from ris_fast.commands.evaluate import EvaluationError, evaluate
from ris_fast.commands.run_folder import RunFolder
from ris_fast.commands.scene_figures import Grouped
from ris_fast.config.load import load_config
from ris_fast.physics.mmse_bound import FEW
from ris_fast.report.baselines import MEANINGS, MILESTONES, judge
from ris_fast.report.evaluation import evaluation_text
from ris_fast.training.checkpoint import load_checkpoint, save_checkpoint
from ris_fast.training.trainer import Trainer
from tests.data.make_npz import write_folders
from tests.training.test_trainer import small


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three epochs, of which the second is the best: the last checkpoint is another one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = small("data.test_scenes=30", epochs=3)
    Trainer(config, folder, callbacks=[RunFolder(folder, config)]).fit()
    checkpoints = folder / "checkpoints"
    groups, manifest = load_checkpoint(checkpoints, "best")
    for kind in ("model", "ema"):
        groups[kind] = {name: 0.9 * value for name, value in groups[kind].items()}
    state = manifest["state"] | {"epoch": 2, "best_nmse": 0.5, "best_weights": "raw"}
    save_checkpoint(checkpoints, "best", groups, manifest | {"state": state})
    return folder


def test_evaluate_reads_the_named_checkpoint(run: Path, capsys) -> None:
    best, last = evaluate(run, device="cpu"), evaluate(run / "checkpoints" / "last.safetensors", device="cpu")
    assert (best["checkpoint"], best["epoch"], last["checkpoint"], last["epoch"]) == ("best", 2, "last", 3)
    assert best["nmse"]["mean"] != last["nmse"]["mean"]
    assert [evaluate(run / name, device="cpu")["nmse"] for name in ("checkpoints", "checkpoints/best.safetensors")] == [
        best["nmse"]
    ] * 2
    assert main(["evaluate", str(run / "checkpoints" / "last.safetensors"), "--device", "cpu"]) == 0
    assert "weights of epoch 3 (checkpoint 'last')" in capsys.readouterr().out


def test_evaluate_last_uses_the_better_of_raw_and_ema(run: Path) -> None:
    state = load_checkpoint(run / "checkpoints", "last")[1]["state"]
    better = "ema" if state["val_nmse_ema"] < state["val_nmse_raw"] else "raw"
    assert evaluate(run / "checkpoints" / "last.safetensors", device="cpu")["weights"] == better


def test_evaluate_shows_what_the_networks_inputs_say_beside_the_pursuit(run: Path) -> None:
    """The names of the run's own baselines, and the pursuit, which any network is compared with."""
    shown = evaluate(run, device="cpu")["baselines"]
    assert ["zero", "identity", "mean", "pursuit"] == [name for name in shown if name != "lmmse"]
    assert set(MEANINGS) > set(shown) and 0 < shown["lmmse"] < 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("config.toml", "no checkpoint"),
        ("checkpoints/last.json", "no checkpoint"),
        ("nothing", "not there"),
        ("plots", "not a run folder"),
        ("checkpoints/other.safetensors", "no checkpoint"),
    ],
)
def test_evaluate_refuses_what_is_no_checkpoint(name: str, words: str, run: Path, capsys) -> None:
    (run / "plots").mkdir(exist_ok=True)
    assert main(["evaluate", str(run / name), "--device", "cpu"]) in (2, 3)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_evaluate_exits_3_on_non_finite_answers(json_too: list[str], run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text((run / "config.toml").read_text())
    groups, manifest = load_checkpoint(run / "checkpoints", "best")
    groups["model"]["fuse.weight"][0, 0] = float("nan")
    save_checkpoint(folder / "checkpoints", "best", groups, manifest)
    assert main(["evaluate", str(folder), "--device", "cpu", *json_too]) == 3
    said = capsys.readouterr()
    assert "not finite for 30 of 30 test scenes" in said.err and "first 'fuse.weight'" in said.err and said.out == ""
    with pytest.raises(EvaluationError):
        evaluate(folder, device="cpu")


def figures(scenes: int) -> dict[str, torch.Tensor]:
    return {
        "count": torch.ones(scenes, dtype=torch.int64),
        "snr_db": torch.zeros(scenes).double(),
        "network": torch.full((scenes,), 0.01).double(),
        "zero": torch.ones(scenes).double(),
        "mean": torch.ones(scenes).double(),
    }


@pytest.mark.parametrize("scenes, compared", [(1, False), (FEW - 1, False), (FEW, True)])
def test_grouped_figures_omit_mmse_bound_for_few_scenes(scenes: int, compared: bool) -> None:
    group = Grouped(figures(scenes), True).group()
    result = {
        "model": "m",
        "weights": "raw",
        "epoch": 1,
        "checkpoint": "best",
        "parameters": 1,
        "device": "cpu",
        "source": "s",
        "notes": ["n"],
        "standard": True,
        "by_snr": [{"snr_db": (-5.0, 0.0), **group}],
        "by_count": [{"sources": 1, **group}],
        "positions": None,
        **group,
    }
    text = evaluation_text(result)
    assert (group["mmse_bound"] is not None) == compared == ("passed: " in text)
    assert compared == ("times the MMSE bound of these scenes (" in text)
    assert "note: n" in text and f"None for fewer than {FEW} scenes" in text


def test_report_words_never_claim_the_optimum() -> None:
    words = " ".join([*MEANINGS.values(), *MILESTONES.values(), judge(1e-9, {"mean": 0.98}, mmse_bound=0.016)])
    assert "best that any" not in words and "Bayes" not in words and min(MILESTONES) > 0.02


def test_evaluate_notes_test_scenes_seen_in_training(tmp_path: Path) -> None:
    data = write_folders(tmp_path / "data")
    for copied in (False, True):
        if copied:
            (data / "test" / "shard_000.npz").write_bytes((data / "train" / "shard_000.npz").read_bytes())
        options = [
            "training.compile=false",
            "task.bs_antennas=4",
            "task.ris_horizontal=6",
            "task.ris_vertical=4",
            "task.snapshots=8",
            "task.max_sources=3",
            f"data.path={json.dumps(str(data))}",
            "training.epochs=1",
            "model.options.width=16",
        ]
        config = load_config(preset="laptop", overrides=options, flags={"training.device": "cpu"})
        folder = tmp_path / f"run-{copied}"
        trainer = Trainer(config, folder)
        trainer.callbacks.append(RunFolder(folder, trainer.config))  # with the sector that the files ask for
        trainer.fit()
        result = evaluate(folder, device="cpu")
        expected = [
            f"{result['scenes']} of {result['scenes']} test scenes are training scenes: these figures say nothing of"
            " new scenes"
        ]
        assert result["notes"] == (expected if copied else [])
