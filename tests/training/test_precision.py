"""training.precision = "auto": what is chosen, what is said of it, and that a run in bf16 resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast.commands.run_folder import RunFolder
from ris_fast.config.load import load_config
from ris_fast.config.schema import ConfigError
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.inference.opened_run import run_config
from ris_fast.training import precision as module
from ris_fast.training.precision import refuse_tf32
from ris_fast.training.step import autocast
from ris_fast.training.trainer import Trainer
from tests.training.test_trainer import Recorder, small, weights

has_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products here")


def rates(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
    monkeypatch.setattr(module, "peak_matmul_rate", lambda device, name, seconds: {"fp32": fp32, "bf16": bf16}[name])


def automatic(**sizes: int) -> Trainer:
    return Trainer(small("training.precision=auto", **sizes))


@has_bf16
@pytest.mark.parametrize("bf16, chosen", [(4.2e11, "bf16"), (2.2e11, "fp32")])
def test_auto_precision_follows_the_measured_products(
    bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(monkeypatch, 2e11, bf16)
    trainer = automatic()
    assert trainer.config.training.precision == chosen
    (note,) = (note for note in trainer.notes if note.startswith("precision"))
    assert note.startswith(f"precision {chosen}: bf16 products run at {bf16 / 1e9:.0f} GFLOP/s here, fp32 at 200")


@has_bf16
def test_auto_precision_is_fp32_where_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, 2e11, 8e11)
    wrong = lambda *a: 3.0 * (a[-1] == "bf16") + right(*a)  # noqa: E731
    right = module._gradient
    monkeypatch.setattr(module, "_gradient", wrong)
    trainer = automatic()
    assert trainer.config.training.precision == "fp32" and "its gradient differs by" in trainer.notes[-1]


@has_bf16
def test_a_resumed_run_keeps_the_precision_that_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("training.precision=auto")
    rates(monkeypatch, 2e11, 8e11)
    Trainer(config, tmp_path).fit()
    rates(monkeypatch, 2e11, 1e11)
    assert Trainer(config, tmp_path, resume=True).config.training.precision == "bf16"
    assert Trainer(config, tmp_path).config.training.precision == "fp32"


@has_bf16
def test_gradient_gap_of_bf16_is_its_rounding() -> None:
    trainer = Trainer(small())
    scenes = trainer.source.batch("train", torch.arange(16))
    assert 0.0 < module.gradient_gap(trainer.model, trainer.loss, scenes, trainer.device) < module.AGREES


def test_auto_precision_is_fp32_without_bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert automatic().config.training.precision == "fp32"


@has_bf16
def test_auto_precision_leaves_the_random_numbers_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, chosen = Trainer(small()), None
    state = torch.random.get_rng_state()
    chosen = automatic()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, weights(chosen)[name]) for name, value in weights(plain).items())


def test_preset_original_alone_chooses_its_precision() -> None:
    found = {name: load_config(preset=name).training.precision for name in ("laptop", "full", "original")}
    assert found == {"laptop": "fp32", "full": "bf16", "original": "auto"}


def test_autocast_takes_no_precision_that_was_not_chosen() -> None:
    with pytest.raises(ConfigError, match="Pass the configuration that it has, trainer.config"):
        autocast(torch.device("cpu"), "auto")


@has_bf16
def test_run_folder_holds_the_precision_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, 2e11, 4e11)
    trainer = automatic()
    RunFolder(tmp_path, trainer.config).on_train_start({})
    assert run_config(tmp_path).training.precision == "bf16"
    (line,) = (each for each in (tmp_path / "config.toml").read_text().splitlines() if each.startswith("precision"))
    assert line.split() == ["precision", "=", '"bf16"', "#", "precision", "auto"]


def stopped(folder: Path, epochs: int) -> None:
    """One epoch of a run of several, then Ctrl-C."""
    trainer = Trainer(small("training.precision=bf16", epochs=epochs), folder)
    epoch = trainer._epoch

    def until_the_second() -> Any:
        if trainer.state.epoch == 1:
            raise KeyboardInterrupt
        return epoch()

    trainer._epoch = until_the_second
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_run_in_bf16_repeats_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        runs.append(Trainer(small("training.precision=bf16", epochs=3), callbacks=[whole := Recorder()]))
        runs[-1].fit()
    stopped(tmp_path, 3)
    again = Recorder()
    runs.append(Trainer(small("training.precision=bf16", epochs=3), tmp_path, callbacks=[again], resume=True))
    runs[-1].fit()
    first, second, resumed = map(weights, runs)
    assert all(torch.equal(value, second[name]) and torch.equal(value, resumed[name]) for name, value in first.items())
    assert again.epochs[-1]["val_nmse_ema"] == whole.epochs[-1]["val_nmse_ema"]


def test_telemetry_in_bf16_reads_fp32s_gradient_norms() -> None:
    norms = {}
    for precision in ("fp32", "bf16"):
        recorder = Recorder()
        Trainer(small(f"training.precision={precision}"), callbacks=[recorder]).fit()
        norms[precision] = [row["grad_norm"] for row in recorder.steps]
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.03) and norms["bf16"] != norms["fp32"]


def test_preflight_finds_nothing_in_a_run_in_bf16() -> None:
    assert [finding.cause for finding in Watchdog(Trainer(small("training.precision=bf16"))).preflight()] == []


@pytest.mark.parametrize(
    "device, precision, allowed", [("cuda", "fp32", False), ("cuda", "bf16", True), ("cpu", "fp32", True)]
)
def test_fp32_on_a_gpu_is_no_tf32(device: str, precision: str, allowed: bool) -> None:
    with torch.backends.cudnn.flags(allow_tf32=True):
        refuse_tf32(torch.device(device), precision)
        assert torch.backends.cudnn.allow_tf32 is allowed
