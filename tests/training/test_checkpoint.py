"""A checkpoint is loaded as it was written or not at all, and the error says which file is whole; the best one is never
lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ris_fast.training.checkpoint import CheckpointError, load_checkpoint, read_whole, save_checkpoint
from ris_fast.training.resume import finished
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import Recorder, small

GROUPS = {
    "model": {"layer.weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(3)},
    "ema": {"layer.weight": torch.ones(3, 4)},
    "optimizer": {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0)},
}


def flip(path: Path, place: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def without_hashes(path: Path) -> None:
    """The file as it was written before there were hashes."""
    with safe_open(path, framework="pt") as file:
        manifest = {key: value for key, value in json.loads(file.metadata()["manifest"]).items() if key != "sha256"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, path, {"format": "pt", "manifest": json.dumps(manifest)})


def test_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "last", GROUPS, {"state": {"step": 3}})
    groups, manifest = load_checkpoint(tmp_path, "last")
    assert manifest["state"] == {"step": 3} and "note" not in manifest and groups.keys() == GROUPS.keys()
    assert all(
        torch.equal(groups[group][key], value) for group, values in GROUPS.items() for key, value in values.items()
    )


def test_checkpoint_with_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "last", GROUPS, {"model": "backprojection", "state": {"step": 3}})
    whole = path.read_bytes()
    for place in (*range(0, len(whole), 9), len(whole) - 1):
        flip(path, place, bit=place % 7)
        assert read_whole(tmp_path, "last") is None, f"byte {place}: {whole[place - 20 : place + 20]!r}"
        path.write_bytes(whole)
    assert load_checkpoint(tmp_path, "last")


@pytest.mark.parametrize("damaged, whole", [("last", "best"), ("best", "last")])
def test_checkpoint_error_names_the_one_that_is_whole(damaged: str, whole: str, tmp_path: Path) -> None:
    for name in (damaged, whole):
        save_checkpoint(tmp_path, name, GROUPS, {})
    flip(tmp_path / f"{damaged}.safetensors", -20)
    with pytest.raises(
        CheckpointError,
        match=f"{damaged}.safetensors is damaged: 1 of 5 tensors .*'{whole}' is whole; give .*{whole}.safetensors",
    ):
        load_checkpoint(tmp_path, damaged)
    flip(tmp_path / f"{whole}.safetensors", -20)
    with pytest.raises(CheckpointError, match="(?!.*is whole)"):
        load_checkpoint(tmp_path, damaged)


def test_checkpoint_without_hashes_is_loaded_with_a_note(tmp_path: Path) -> None:
    Trainer(small(), tmp_path).fit()
    for name in ("last", "best"):
        without_hashes(tmp_path / "checkpoints" / f"{name}.safetensors")
    resumed = Trainer(small(epochs=2), tmp_path, callbacks=[told := Recorder()], resume=True)
    assert resumed.fit()["epochs"] == 2
    assert any("last.safetensors: an earlier version wrote this" in note for note in told.info["notes"])
    assert load_checkpoint(tmp_path / "checkpoints", "last")[1].get("note") is None


@pytest.mark.slow
def test_best_checkpoint_survives_a_worse_continuation(tmp_path: Path) -> None:
    Trainer(small(), tmp_path).fit()
    checkpoints = tmp_path / "checkpoints"
    shutil.copy(checkpoints / "last.safetensors", tmp_path / "earlier")
    Trainer(small("optimizer.head_lr=3e-3", "optimizer.backbone_lr=3e-3", epochs=6), tmp_path, resume=True).fit()
    best = read_whole(checkpoints, "best")[1]["state"]
    shutil.copy(tmp_path / "earlier", checkpoints / "last.safetensors")
    resumed = Trainer(small("optimizer.head_lr=1e-9", "optimizer.backbone_lr=1e-9", epochs=2), tmp_path, resume=True)
    assert (
        resumed.state.epoch == 1 and resumed.state.best_nmse == best["best_nmse"] < 0.999 * resumed.state.val_nmse_raw
    )
    summary = resumed.fit()
    assert read_whole(checkpoints, "best")[1]["state"] == best and summary["best_val_nmse"] == best["best_nmse"]


@pytest.mark.slow
@pytest.mark.parametrize("lose", [Path.unlink, lambda path: flip(path, -20)])
def test_best_checkpoint_that_is_lost_is_made_anew(lose, tmp_path: Path) -> None:
    Trainer(small(epochs=2), tmp_path).fit()
    lose(tmp_path / "checkpoints" / "best.safetensors")
    resumed = Trainer(small("optimizer.head_lr=1e-9", "optimizer.backbone_lr=1e-9", epochs=3), tmp_path, resume=True)
    assert finished(resumed.config.training, resumed.state) == "" and any(
        "the best weights so far are lost" in note for note in resumed.notes
    )
    assert resumed.fit()["best_val_nmse"] == read_whole(tmp_path / "checkpoints", "best")[1]["state"]["best_nmse"]
