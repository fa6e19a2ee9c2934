"""Captured steps are the plain steps: bit for bit, in every setting, without a host read, with a way back to eager.

On a CPU the graph is replaced by a second run of the captured function; on CUDA it is the graph itself.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from ris_fast.training import trainer as loop
from ris_fast.training.capture import CapturedCall, CapturedStep, CudaGraph, attempt, why_not
from ris_fast.training.step_seed import seed_step
from ris_fast.training.trainer import Trainer
from tests.training.capture_helpers import Rerun, Rows, captured_trainer, change_settings, config_of, same

SETTINGS = [
    ("hybrid", 1),
    ("hybrid", 2),
    ("backprojection", 1),
    ("backprojection", 2),
    ("symbols of every snapshot", 1),
]


# ---- on a CPU, with a stand-in for the graph ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("model", "accumulate"), SETTINGS)
def test_captured_run_is_the_plain_run(model: str, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model, f"training.accumulate={accumulate}", "training.epochs=3")
    plain, plain_rows = Trainer(config, callbacks=[rows := Rows()]), rows
    trainer = captured_trainer(config, monkeypatch, through := Rows())
    for each in (plain, trainer):
        change_settings(each)
        each.fit()
    assert trainer.capture.recording.replays > 5 and trainer.validation_runner.recording.replays > 2
    assert through.rows == plain_rows.rows and not same(trainer, plain)


def test_captured_step_is_replayed_for_full_unwatched_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = captured_trainer(config_of("backprojection"), monkeypatch)
    replayed = []
    count = trainer.optimizer.count_replay
    trainer.optimizer.count_replay = lambda: (count(), replayed.append(trainer.state.step + 1))
    trainer.fit()
    full = [step for step in range(1, 29) if step % 14]  # 13 full batches and a ragged one, two epochs
    assert replayed == [step for step in full if step > 8 and step % 4]


def test_captured_step_warms_up_without_telemetry_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = captured_trainer(config_of("backprojection", "training.epochs=1"), monkeypatch)
    trainer.step.telemetry.enabled = False
    trainer.fit()
    assert trainer.capture.warm == 3 and trainer.capture.recording.replays == 10


@pytest.mark.slow
def test_captured_run_report_that_arrives_late_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a report is read when the next one is ordered; nothing that it reads may have changed by then."""
    config = config_of("hybrid")
    Trainer(config, callbacks=[prompt := Rows()]).fit()
    trainer = captured_trainer(config, monkeypatch, late := Rows())
    monkeypatch.setattr(loop, "own_stream", lambda device: nullcontext())
    monkeypatch.setattr(loop, "seed_step", lambda device, *place: seed_step(torch.device("cpu"), *place))
    delivered = []
    reporter, flush = trainer.reporter, trainer.reporter.flush
    reporter.flush = lambda: (delivered.append((reporter.pending is not None, trainer.state.step)), flush())[1]
    reporter.device = torch.device("cuda")  # what the loop goes by; its tensors are on the CPU
    object.__setattr__(trainer, "device", reporter.device)
    trainer.step.device = torch.device("cpu")
    trainer.fit()
    assert [step for there, step in delivered if there][:4] == [2, 3, 4, 5]  # the report of step n at step n + 1
    assert late.rows == prompt.rows


def test_applied_steps_know_skipped_ones_one_report_later(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config_of("backprojection"))
    group, optimizer = next(trainer._groups()), trainer.optimizer
    poisoned = [
        scenes.apply(lambda value: value * float("nan") if value.is_floating_point() else value) for scenes in group
    ]
    trainer.step(group, 10)
    trainer.step(poisoned, 10)
    copied = optimizer.counter_states()
    trainer.step(group, 10)
    optimizer.count_replay()
    assert optimizer.applied_steps() == 4
    assert optimizer.counters(copied)["skipped"] == 1 and optimizer.applied_steps() == 3
    assert optimizer.counters()["attempted"] == 3 and optimizer.applied_steps() == 2  # the replay was none


# ---- ways back to eager -------------------------------------------------------------------------------------------


def test_capture_that_fails_warns_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(body: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    config = config_of("backprojection")
    plain = Trainer(config)
    plain.fit()
    trainer = captured_trainer(config, monkeypatch, record=refuse)
    with pytest.warns(
        RuntimeWarning, match="kernel by kernel: operation not permitted when stream is capturing$"
    ) as told:
        trainer.fit()
    assert len(told) == 2 and not same(trainer, plain)  # once for the step, once for validation
    assert (
        trainer.capture.refused
        == trainer.validation_runner.refused
        == "operation not permitted when stream is capturing"
    )


def test_capture_that_fails_says_what_broke_it() -> None:
    """torch ends a capture whatever happened in it, and the error of that end replaces the one that mattered."""

    def record(body: Any) -> Any:
        try:
            return body()
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nand more")

    def body() -> None:
        raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture\nand more")

    with pytest.warns(RuntimeWarning, match="kernel by kernel"):
        recording, why = attempt(record, body, "the step")
    assert recording is None and why == (
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture; then: "
        "CUDA error: operation failed due to a previous error during capture"
    )


def test_a_graph_is_captured_without_collection_and_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    @contextmanager
    def graph(*_: Any, **options: Any) -> Iterator[None]:
        given.update(options, collecting=gc.isenabled())
        yield

    for name, value in (("CUDAGraph", object), ("graph", graph), ("current_stream", str), ("default_stream", str)):
        monkeypatch.setattr(torch.cuda, name, value)
    assert CudaGraph(lambda: 7).result == 7
    assert given == {"stream": None, "capture_error_mode": "thread_local", "collecting": False} and gc.isenabled()


def test_capture_does_not_hide_an_error_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(body: Any) -> Any:
        raise ValueError("CovarianceLoss: something is missing")

    with pytest.raises(ValueError, match="something is missing"):
        captured_trainer(config_of("backprojection"), monkeypatch, record=broken).fit()


def test_capture_names_a_tensor_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = captured_trainer(config_of("backprojection", "data.train_scenes=80", "training.epochs=1"), monkeypatch)
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    with pytest.warns(RuntimeWarning, match="no loss reaches 1 tensors, the first is 'unused'"):
        trainer.fit()
    assert trainer.capture.recording is None


def test_why_not_says_what_prevents_capture() -> None:
    trainer = Trainer(config_of("backprojection"))
    on_gpu = type("OnGPU", (), {"index_device": torch.device("cuda")})()
    asked = replace(trainer.config, training=replace(trainer.config.training, capture=False))
    assert why_not(trainer.step, on_gpu, asked) == "as asked"
    assert "not in the device's memory" in why_not(trainer.step, trainer.source, trainer.config)
    assert "not as a kernel" in why_not(trainer.step, on_gpu, trainer.config)
    trainer.step.optimizer = type("Fused", (), {"backend": "triton"})()
    assert why_not(trainer.step, on_gpu, trainer.config) == ""


def test_captured_step_without_a_graph_is_the_plain_step() -> None:
    config = config_of("hybrid", "training.accumulate=2")
    plain, trainer = Trainer(config), Trainer(config)
    by_number = CapturedStep(trainer.step, trainer.source, config)
    for group, indices in zip(plain._groups(), trainer._index_groups()):
        assert plain.step(group, 20).loss.equal(by_number(indices, 20).loss)
    assert by_number.recording is None and by_number.refused and not same(plain, trainer)


def test_captured_call_is_run_then_captured_then_replayed() -> None:
    class Buffers:
        """Something to pretend on."""

    ran: list[int] = []
    call = CapturedCall("a test", lambda body: Rerun(body, Buffers()))
    for _ in range(4):
        call(lambda: ran.append(1))
    assert len(ran) == 4 and call.recording.replays == 3


# ---- on CUDA, with the graph itself -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "accumulate", "precision", "compile"),
    [(*setting, precision, False) for setting in SETTINGS for precision in ("fp32", "bf16")]
    + [("backprojection", 1, "bf16", True), ("backprojection", 2, "fp32", True), ("hybrid", 1, "bf16", True)],
    ids=lambda value: ("compiled" if value else "as written") if isinstance(value, bool) else None,
)
def test_captured_replay_equals_eager_bitwise(model: str, accumulate: int, precision: str, compile: bool) -> None:
    """Weights, moments, averages, counters, every reported number and every validation, with settings that change."""
    runs = []
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for captured in (False, True):
            config = config_of(
                model,
                f"training.accumulate={accumulate}",
                f"training.precision={precision}",
                "training.device=cuda",
                f"training.compile={str(compile).lower()}",
                f"training.capture={str(captured).lower()}",
                "training.epochs=3",
            )
            trainer = Trainer(config, callbacks=[rows := Rows()])
            change_settings(trainer)
            trainer.fit()
            runs.append((trainer, rows))
    (plain, plain_rows), (trainer, through) = runs
    assert trainer.capture.recording is not None and trainer.validation_runner.recording is not None, (
        trainer.capture.refused
    )
    assert plain.capture.recording is None
    assert not same(trainer, plain)
    assert through.rows == plain_rows.rows


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "accumulate"), SETTINGS)
def test_captured_epoch_never_syncs(model: str, accumulate: int) -> None:
    """The second epoch, from its first scene number to its last step, reports included."""
    trainer = Trainer(config_of(model, f"training.accumulate={accumulate}", "training.device=cuda"))
    groups = trainer._index_groups

    def watched() -> Any:
        torch.cuda.set_sync_debug_mode("error" if trainer.state.epoch else "default")
        try:
            yield from groups()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._index_groups = watched
    trainer.fit()
    assert trainer.state.epoch == 2 and trainer.capture.recording is not None, trainer.capture.refused


@pytest.mark.gpu
def test_capture_takes_fp16_with_a_loss_scale() -> None:
    trainer = Trainer(config_of("hybrid", "training.precision=fp16", "training.device=cuda"))
    trainer.fit()
    assert trainer.capture.recording is not None, trainer.capture.refused
    assert trainer.optimizer.counters()["applied"] > 10
