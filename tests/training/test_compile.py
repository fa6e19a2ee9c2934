"""The trunk is compiled once, before the clock starts, and never again; where it cannot be, the run goes on and says
why."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ris_fast.training import compiled_model as devices
from ris_fast.training.compiled_model import compile_now, missing_compiler
from ris_fast.training.trainer import Trainer
from tests.training.capture_helpers import Rows, config_of

needs_compiler = pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="no compiler")


@pytest.fixture(autouse=True)
def counted_anew() -> Iterator[None]:
    counters.clear()
    yield


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("model", "backend"), [("hybrid", "aot_eager"), ("backprojection", "aot_eager"), ("backprojection", "inductor")]
)
def test_trainer_compiles_once_for_a_whole_run(model: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs with a ragged last batch and validation of another size, raw and averaged; a recompilation would
    raise.

    What is traced, guarded and traced anew does not depend on who makes kernels of it, which takes a minute for the
    hybrid.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    rows = Rows()
    trainer = Trainer(config_of(model, "training.compile=true"), callbacks=[rows])
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer._compile()
        after_warm_up = counters["stats"]["unique_graphs"]
        trainer.fit()
    assert after_warm_up == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]
    assert rows.info["compile"].startswith("compiled with torch.compile in ") and trainer.network.compiled
    assert trainer.state.step == 28


@pytest.mark.slow
@needs_compiler
def test_trainer_compile_trains_nothing() -> None:
    """Weights, gradients and random numbers are those of a run that was not compiled."""
    trainer = Trainer(config_of("backprojection", "training.compile=true"))
    before, state = {name: value.clone() for name, value in trainer.model.state_dict().items()}, torch.get_rng_state()
    trainer._compile()
    assert all(value.equal(before[name]) for name, value in trainer.model.state_dict().items())
    assert torch.get_rng_state().equal(state) and all(p.grad is None for p in trainer.model.parameters())
    assert trainer.optimizer.counters()["attempted"] == 0


def test_trainer_runs_eager_when_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        def call(features: Any) -> Any:
            raise RuntimeError("CppCompileError: g++ returned 1\nfour hundred lines of it")

        return call

    monkeypatch.setattr(devices, "missing_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", broken)
    rows = Rows()
    trainer = Trainer(config_of("backprojection", "training.compile=true", "training.epochs=1"), callbacks=[rows])
    trainer.fit()
    assert rows.info["compile"] == "eager: compilation failed (CppCompileError: g++ returned 1)"
    assert not trainer.network.compiled and trainer.state.step == 14


def test_compile_now_raises_what_is_not_the_compilers() -> None:
    trainer = Trainer(config_of("backprojection"))

    def wrong() -> None:
        raise ValueError("backprojection: channel is missing")

    with pytest.raises(ValueError, match="channel is missing"):
        compile_now(trainer.network, wrong, torch.device("cpu"))


def test_trainer_says_why_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "missing_compiler", lambda device: "no C++ compiler was found")
    trainer = Trainer(config_of("backprojection", "training.compile=true"))
    assert trainer.compile_note == "eager: no C++ compiler was found" and not trainer.network.compiled


def test_trainer_does_not_compile_for_partial_batches() -> None:
    rows = Rows()
    trainer = Trainer(
        config_of("backprojection", "training.compile=true", "data.train_scenes=5", "training.epochs=1"),
        callbacks=[rows],
    )
    trainer.fit()
    assert "no batch reaches 8 scenes" in rows.info["compile"] and not counters["stats"]["unique_graphs"]
