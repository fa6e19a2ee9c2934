"""Preflight of a network that torch compiled: silent, compiled once for preflight and run together, and a wrong graph
is named."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.health.monitor.watchdog import Watchdog
from ris_fast.health.preflight import calls as check_calls
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.prediction import Prediction
from ris_fast.training import compiled_model as devices
from ris_fast.training.compiled_model import missing_compiler
from ris_fast.training.trainer import Trainer

needs_compiler = pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="no compiler")


@pytest.mark.slow
@needs_compiler
def test_preflight_compiles_once_and_names_a_wrong_graph() -> None:
    """One test, because one compilation is what it costs: about ten seconds."""
    trainer = Trainer(changed(TWINS["backprojection"](), {"training.compile": True}))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    graphs, watchdog = counters["stats"]["unique_graphs"], Watchdog(trainer)
    assert watchdog.preflight() == [] and not [check.failed for check in watchdog.checks if check.failed]
    note = trainer.compile_note
    trainer._compile()
    assert (
        counters["stats"]["unique_graphs"] - graphs == 1
        and trainer.compile_note == note
        and note.startswith("compiled with torch.compile in ")
    )
    assert [check.note for check in watchdog.checks if check.name == "the network is compiled"] == [note]
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    right = trainer.network.trunk
    trainer.network.trunk = lambda features: (lambda answer: answer._replace(factor=answer.factor.roll(1, 0)))(
        right(features)
    )
    assert Watchdog(trainer).preflight()[0].cause == "compiled_differs"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("twin", ["hybrid", "dropout"])
def test_preflight_and_training_share_one_graph(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced does not depend on who makes kernels of it; tracing anew in training would raise."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()
    trainer = Trainer(changed(TWINS[twin](), {"training.compile": True, "training.epochs": 1}))
    watchdog = Watchdog(trainer)
    assert watchdog.preflight() == [] and not [check.failed for check in watchdog.checks if check.failed]
    assert counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.fit()
    assert counters["stats"]["unique_graphs"] == 1 and trainer.network.ready


# ---- what a graph may get wrong, with a function in its place
# -----------------------------------------------------------

Trunk = Callable[[Any], Prediction]


def compiled_as(make: Callable[[Trunk], Trunk], twin: str, monkeypatch: pytest.MonkeyPatch) -> PreflightContext:
    """A trainer whose trunk is 'compiled' by `make`."""
    monkeypatch.setattr(devices, "missing_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda trunk, **options: make(trunk))
    return PreflightContext(Trainer(changed(TWINS[twin](), {"training.compile": True})))


def other_random_numbers(trunk: Trunk) -> Trunk:
    def called(features: Any) -> Prediction:
        torch.rand(3)
        return trunk(features)

    return called


def weights_of_before(trunk: Trunk) -> Trunk:
    return deepcopy(trunk.__self__).trunk  # type: ignore[attr-defined]


def always_in_evaluation(trunk: Trunk) -> Trunk:
    def called(features: Any) -> Prediction:
        model = trunk.__self__  # type: ignore[attr-defined]
        before = model.training
        model.eval()
        try:
            return trunk(features)
        finally:
            model.train(before)

    return called


def column_dropped(trunk: Trunk) -> Trunk:
    def called(features: Any) -> Prediction:
        answer = trunk(features)
        return answer._replace(factor=torch.cat((answer.factor[:, :, :-1], 0 * answer.factor[:, :, -1:]), 2))

    return called


def wrong_backward(trunk: Trunk) -> Trunk:
    def called(features: Any) -> Prediction:
        answer = trunk(features)
        if answer.factor.requires_grad:
            answer.factor.register_hook(lambda slope: slope * torch.linspace(0.5, 1.5, slope.shape[1])[:, None, None])
        return answer

    return called


@pytest.mark.slow
def test_preflight_tells_the_run_of_a_failed_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trunk: Trunk) -> Trunk:
        def called(features: Any) -> Prediction:
            raise RuntimeError("CppCompileError: g++ returned 1")

        return called

    trainer = compiled_as(broken, "hybrid", monkeypatch).trainer
    watchdog = Watchdog(trainer)
    assert watchdog.preflight() == [] and not [check.failed for check in watchdog.checks if check.failed]
    assert (
        trainer.compile_note == "eager: compilation failed (CppCompileError: g++ returned 1)"
        and not trainer.network.compiled
    )


@pytest.mark.parametrize(
    ("make", "twin", "cause"),
    [
        (other_random_numbers, "hybrid", None),
        (other_random_numbers, "dropout", None),
        (weights_of_before, "hybrid", "stale_compiled_graph"),
        (weights_of_before, "dropout", "stale_compiled_graph"),
        (always_in_evaluation, "hybrid", None),
        (always_in_evaluation, "dropout", "eval_mode_in_training"),
        (column_dropped, "hybrid", "compiled_differs"),
        (column_dropped, "dropout", "compiled_differs"),
        (wrong_backward, "hybrid", "compiled_differs"),
    ],
)
def test_same_network_names_a_wrong_graph(
    make: Callable[[Trunk], Trunk], twin: str, cause: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = compiled_as(make, twin, monkeypatch)
    assert context.by_torch
    assert [finding.cause for finding in check_calls.same_network(context)] == ([cause] if cause else [])


def test_same_network_names_dropout_compiled_in_eval_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where nothing says that it was compiled, and where dropout is a function and no module."""
    trainer = Trainer(TWINS["dropout"]())
    trainer.step.network = devices.Network(trainer.model, compile=False)
    trainer.step.network.trunk = trainer.step.network.as_written = always_in_evaluation(trainer.model.trunk)
    assert [finding.cause for finding in check_calls.same_network(PreflightContext(trainer))] == [
        "eval_mode_in_training"
    ]
