"""An exported network answers as its run does, for any number of scenes; what does not is never written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ris_fast import SceneGenerator, build_model, simulate
from ris_fast.commands.cli import main
from ris_fast.commands.run_folder import RunFolder
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.inference import export as module
from ris_fast.inference.export import META, ExportError, export_run
from ris_fast.inference.opened_run import OpenedRun, open_run
from ris_fast.inference.operators import operators_called
from ris_fast.kernels.field.op import aperture_field
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import SMALL, small

SIZES = (1, 2, 21)
WITHOUT_US = """
import sys
sys.modules["ris_fast"] = None
import torch
program, given = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
torch.save(program.module()(*given), sys.argv[3])
"""


def trained(folder: Path, config: Config) -> Path:
    Trainer(config, folder, callbacks=[RunFolder(folder, config)]).fit()
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("hybrid") / "run", small())


@pytest.fixture(scope="module")
def pursuit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = [each for each in SMALL if not each.startswith("model.")]
    task = ["task.max_sources=1", "model.options.width=16", "model.options.depth=1"]
    config = load_config(preset="laptop", overrides=[*kept, *task, "training.epochs=1", "data.train_scenes=64"])
    return trained(tmp_path_factory.mktemp("pursuit") / "run", config)


def scenes_for(run: Path, size: int) -> tuple[Tensor, ...]:
    scenes = simulate(open_run(run).config.task, torch.arange(900, 900 + size), SceneGenerator(5, "test"))
    assert scenes.channel is not None
    return scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db


def answers(run: Path, given: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [each for each in open_run(run).network()(*given) if each is not None]


@pytest.mark.parametrize("name", [pytest.param("hybrid", marks=pytest.mark.slow), "pursuit"])
def test_torch_export_answers_as_the_run_at_any_batch_size(name: str, request: Any, tmp_path: Path) -> None:
    run, extra = request.getfixturevalue(name), {META: ""}
    found = export_run(run, "torch-export", tmp_path / "net.pt2", scenes=8)
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    for size in SIZES:
        given = scenes_for(run, size)
        for ours, theirs in zip(answers(run, given), program(*given), strict=True):
            torch.testing.assert_close(theirs, ours)
    said = json.loads(extra[META])
    assert said["outputs"][0] == "factor" and said["agreement"] == found["agreement"]
    assert said["needs"] == ["import ris_fast.inference.operators"]


def test_portable_export_runs_where_ris_fast_cannot_be_imported(hybrid: Path, monkeypatch: Any, tmp_path: Path) -> None:
    """The operator of the field in a few steps; the whole `hybrid` takes half a minute, and docs/export.md has it."""
    with_network(monkeypatch, field := FieldAlone())
    assert operators_called(field, scenes_for(hybrid, 2)) == {"ris_fast.aperture_field"}
    assert export_run(hybrid, "torch-export", tmp_path / "net.pt2", portable=True, scenes=12)["needs"] == []
    given, files = scenes_for(hybrid, 6), [str(tmp_path / each) for each in ("net.pt2", "given.pt", "found.pt")]
    torch.save(given, files[1])
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_US, *files], check=True, cwd=tmp_path)
    (factor,) = torch.load(files[2])
    assert apart(factor, field(*given).detach()) < 1e-3


class FieldAlone(nn.Module):
    """An answer by one of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Tensor:
        return self.gain * aperture_field(channel, codes, snapshots, snr_db, steps=2)


def apart(found: Tensor, expected: Tensor) -> float:
    """The relative difference of the scene that differs most."""
    return ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


@pytest.mark.slow
def test_onnx_answers_as_the_run_at_any_batch_size(hybrid: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = export_run(hybrid, "onnx", tmp_path / "net.onnx", scenes=8)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    for size in SIZES:
        given = scenes_for(hybrid, size)
        named = {name: value.numpy() for name, value in zip(("snapshots", "channel", "codes", "snr_db"), given)}
        for ours, theirs in zip(answers(hybrid, given), session.run(found["outputs"], named), strict=True):
            assert apart(torch.from_numpy(theirs), ours) < 1e-3


def test_onnx_refuses_the_pursuit_before_anything_is_written(pursuit: Path, capsys: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert main(["export", str(pursuit), "--format", "onnx", "--out", str(tmp_path / "new" / "net.onnx")]) == 3
    said = capsys.readouterr().err
    assert "ris_fast::pursuit_features" in said and "--format torch-export" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_onnx_names_the_extra_where_a_package_is_missing(pursuit: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ValueError, match=r"needs onnxruntime. Run: pip install 'ris-fast\[onnx\]'"):
        export_run(pursuit, "onnx", tmp_path / "net.onnx")


def test_safetensors_holds_the_better_weights_bit_for_bit(hybrid: Path, tmp_path: Path) -> None:
    export_run(hybrid, "safetensors", tmp_path / "net.safetensors", scenes=8)
    opened = open_run(hybrid)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        about = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    network = build_model(about["model"], opened.config.task, **json.loads(about["options"]))
    network.load_state_dict(weights)
    given = scenes_for(hybrid, 5)
    with torch.no_grad():
        assert torch.equal(network.eval()(*given).factor, answers(hybrid, given)[0])
    assert about["weights"] == opened.kind and "[task]" in about["settings"]
    assert json.loads(about["agreement"])["largest"] == 0.0


class Own(nn.Module):
    """What a user may bring: it answers with a complex factor, and here with a fault."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.gain, self.fault = nn.Parameter(torch.tensor(0.5)), fault

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Tensor:
        h, y = torch.view_as_complex(channel), torch.view_as_complex(snapshots)
        factor = self.gain * (h.conj().transpose(1, 2) @ y.transpose(1, 2))
        if self.fault == "random":
            factor = factor * (1.0 + torch.rand_like(snr_db))[:, None, None]
        if self.fault == "branch" and snr_db.mean() > 1e3:
            factor = -factor
        return factor.reshape(8, *factor.shape[1:]) if self.fault == "fixed" else factor


def with_network(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    monkeypatch.setattr(OpenedRun, "network", lambda self: network.eval())


def test_own_network_with_a_complex_factor_is_exported(hybrid: Path, monkeypatch: Any, tmp_path: Path) -> None:
    with_network(monkeypatch, own := Own())
    found = export_run(hybrid, "torch-export", tmp_path / "own.pt2", scenes=8)
    assert found["outputs"] == ["factor"] and found["needs"] == []
    given = scenes_for(hybrid, 3)
    (factor,) = torch.export.load(tmp_path / "own.pt2").module()(*given)
    torch.testing.assert_close(torch.view_as_complex(factor), own(*given))


@pytest.mark.parametrize(
    "fault, words",
    [
        ("random", "answers otherwise than the run: NMSE"),
        ("branch", "cannot trace this network"),
        ("fixed", "cannot trace this network"),
    ],
)
def test_what_is_not_the_run_leaves_nothing_behind(
    fault: str, words: str, hybrid: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    with_network(monkeypatch, Own(fault))
    (old := tmp_path / "old.pt2").write_bytes(b"of an earlier call")
    for out in (old, tmp_path / "new" / "net.pt2"):
        with pytest.raises(ExportError, match=words) as caught:
            export_run(hybrid, "torch-export", out, scenes=8)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert [path.name for path in tmp_path.rglob("*")] == ["old.pt2"] and old.read_bytes() == b"of an earlier call"


def test_export_does_not_write_among_the_checkpoints(hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="among the run's own files"):
        export_run(hybrid, "safetensors", hybrid / "checkpoints" / "best.safetensors")


def test_export_command_says_what_was_compared(hybrid: Path, capsys: Any, tmp_path: Path) -> None:
    words = ["export", str(hybrid), "--format", "safetensors", "--out", str(tmp_path / "net.safetensors")]
    assert main([*words, "--scenes", "6"]) == 0
    said = capsys.readouterr().out
    assert "of 6 test scenes" in said and "written: " in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0] == "factor"
