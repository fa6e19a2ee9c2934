"""What the tests of captured steps share: small runs, a recorder, and a stand-in for a CUDA graph on a machine without
one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.training import capture
from ris_fast.training.callback import Callback
from ris_fast.training.capture import CapturedCall, CapturedStep
from ris_fast.training.trainer import Trainer

TINY = [
    "task.ris_horizontal=4",
    "task.ris_vertical=4",
    "task.bs_antennas=4",
    "task.snapshots=8",
    "task.max_sources=2",
    "data.val_limit=24",
    "data.val_scenes=24",
    "training.batch_size=8",
    "training.epochs=2",
    "training.compile=false",
    "training.precision=fp32",
    "report.every_steps=4",
]
MODELS = {
    "hybrid": (
        "original",
        [
            "model.options.width=32",
            "model.options.heads=4",
            "model.options.grid=5",
            "model.options.feedforward=32",
            "model.options.layers=1",
        ],
    ),
    "backprojection": ("full", ["model.options.width=32", "training.precision=fp32"]),
    "symbols of every snapshot": (
        "full",
        ["model.options.width=32", "training.precision=fp32", "task.symbols=per_snapshot"],
    ),
}
RAGGED = 8 * 13 + 5  # scenes: thirteen full batches and a ragged one
CLOCKS = ("seconds", "scenes_per_s")


def config_of(model: str, *overrides: str) -> Config:
    preset, options = MODELS[model]
    return load_config(preset=preset, overrides=[*TINY, f"data.train_scenes={RAGGED}", *options, *overrides])


class Rows(Callback):
    """Keeps every event but what clocks say."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.info: dict[str, Any] = {}

    def on_train_start(self, info: Any) -> None:
        self.info = dict(info)

    def on_log(self, row: Any) -> None:
        self.rows.append({key: value for key, value in row.items() if key not in CLOCKS})

    on_epoch_end = on_train_end = on_log


class Rerun:
    """Stands in for a CUDA graph: building it runs nothing, a replay runs the body as a capture sees it.

    As in a capture, the optimizer sends no hyperparameter from inside the body and counts no step for the host: both
    are left to who replays.
    """

    made = 0

    def __init__(self, body: Callable[[], Any], buffers: Any) -> None:
        self.body, self.buffers, self.replays = body, buffers, 0
        type(self).made += 1

    def replay(self) -> Any:
        self.replays += 1
        self.buffers.capturing = lambda: True
        try:
            return self.body()
        finally:
            del self.buffers.capturing


def captured_trainer(
    config: Config, monkeypatch: Any, callback: Callback | None = None, record: Callable[..., Any] | None = None
) -> Trainer:
    """A trainer on the CPU whose steps and validation go the way of captured ones."""
    trainer = Trainer(config, callbacks=[callback] if callback else [])
    monkeypatch.setattr(capture, "why_not", lambda *_: "")
    record = record or (lambda body: Rerun(body, trainer.optimizer.buffers))

    def install() -> None:
        trainer.capture = CapturedStep(trainer.step, trainer.source, trainer.config, record)
        trainer.validation_runner = CapturedCall("validation", record)

    trainer._capture = install
    return trainer


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, moments, averages and counters."""
    return {
        name: value.detach().cpu().clone()
        for group in ({"model": trainer.model.state_dict()} | trainer.optimizer.checkpoint_tensors()).values()
        for name, value in group.items()
    }


def same(one: Trainer, other: Trainer) -> list[str]:
    """Names of the tensors of two trainers that differ in a bit."""
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def change_settings(trainer: Trainer) -> None:
    """Clip threshold and decay of the average change during the run, between steps; learning rates do anyway."""
    advance = trainer._advance

    def changing(scenes: int) -> None:
        advance(scenes)
        if trainer.state.step % 5 == 0:
            trainer.optimizer.max_grad_norm = 0.5 + 0.1 * (trainer.state.step % 7)
            trainer.optimizer.ema_decay = 0.9 if trainer.state.step % 2 else 0.99

    trainer._advance = changing
